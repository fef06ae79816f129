"""Nemotron-H: every layer is one of four kinds: state space, attention, a plain MLP, or experts beside a shared one.

Routed experts read and write the residual stream, or a narrower one between two projections. Layers for the prediction
of several tokens are no part of the stock model, and do not come along.
"""

from dataclasses import replace

from .axes import Axis
from .base import (
    FFN,
    GROUPED_EXPERTS_LEAST,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV,
    LAYERS,
    MOE_FFN,
    ROUTED_EXPERTS,
    ROUTER_GROUPS,
    VOCAB,
    layer_tables,
    linear,
    norm,
)
from .rules import ConfigRules
from .spec import ArchSpec
from .state_space import SSM_GROUPS, ssm_axes, ssm_hook_points, state_space

DIRECT = ArchSpec(
    model_type="nemotron_h",
    axes=(
        LAYERS,
        HIDDEN,
        FFN,
        ROUTED_EXPERTS,
        ROUTER_GROUPS,
        MOE_FFN,
        Axis("shared_ffn", ("moe_shared_expert_intermediate_size",), per_layer=True),
        *ssm_axes("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
        HEADS,
        KV,
        HEAD_DIM,
        VOCAB,
    ),
    layers_path="model.layers",
    outer=layer_tables(
        {"model.embeddings.weight": "vocab hidden"}, linear("lm_head", "vocab", "hidden"), norm("model.norm_f")
    ),
    layer=layer_tables(
        norm("norm"),
        state_space("mixer"),
        linear("mixer.q_proj", "heads*head_dim", "hidden"),
        linear("mixer.k_proj", "kv*head_dim", "hidden"),
        linear("mixer.v_proj", "kv*head_dim", "hidden"),
        linear("mixer.o_proj", "hidden", "heads*head_dim"),
        linear("mixer.up_proj", "ffn", "hidden"),
        linear("mixer.down_proj", "hidden", "ffn"),
        {
            "mixer.experts.up_proj": "experts moe_ffn hidden",
            "mixer.experts.down_proj": "experts hidden moe_ffn",
            "mixer.gate.weight": "experts hidden",
            "mixer.gate.e_score_correction_bias": "experts",
        },
        linear("mixer.shared_experts.up_proj", "shared_ffn", "hidden"),
        linear("mixer.shared_experts.down_proj", "hidden", "shared_ffn"),
    ),
    hook_points={
        "ffn": "mixer.down_proj",
        "experts": "mixer.experts",
        "moe_ffn": "mixer.experts",
        "shared_ffn": "mixer.shared_experts.down_proj",
        **ssm_hook_points("mixer"),
        "heads": "mixer.o_proj",
        "kv": "mixer.o_proj",
    },
    layer_norms=("norm",),
    final_norm="model.norm_f",
    groups=(("heads", "kv"), ("experts", "router_groups"), *SSM_GROUPS),
    gated_norms={"mixer.norm": "ssm_groups"},
    layer_lists=("layers_block_type",),
    needed_kinds=(("layers_block_type", ("full_attention",)),),  # the stock cache takes its length from one
    least=GROUPED_EXPERTS_LEAST,
    config_rules=ConfigRules(absent_parts=("num_nextn_predict_layers",)),
)

SPEC = replace(
    DIRECT,
    axes=(*DIRECT.axes, Axis("latent", ("moe_latent_size",), prunable=False)),
    layer={
        **DIRECT.layer,
        "mixer.experts.up_proj": "experts moe_ffn latent",
        "mixer.experts.down_proj": "experts latent moe_ffn",
        **linear("mixer.fc1_latent_proj", "latent", "hidden"),
        **linear("mixer.fc2_latent_proj", "hidden", "latent"),
    },
    variants=(("moe_latent_size", None, DIRECT),),
)
