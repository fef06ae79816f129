"""Gemma 4, text only: wider heads where attention is full, embeddings for every layer, shared keys and values, and in
one variant experts beside the MLP.
"""

from dataclasses import replace

from .axes import Axis
from .base import (
    EMBEDDINGS,
    EXPERTS,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    MOE_FFN,
    decoder,
    layer_tables,
    linear,
    norm,
)
from .rules import CAPPED_LOGITS, ConfigRules, LayerRules, StreamRules

NORMS = ("input_layernorm", "pre_feedforward_layernorm")
DENSE = decoder(
    "gemma4_text",
    logits=CAPPED_LOGITS,
    outer=layer_tables(
        EMBEDDINGS,
        norm("model.norm"),
        {
            "model.embed_tokens_per_layer.weight": "layer_vocab layers*layer_inputs",
            "model.per_layer_model_projection.weight": "layers*layer_inputs hidden",
            "model.per_layer_projection_norm.weight": "layer_inputs",
        },
    ),
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        HEAD_NORMS,
        linear("per_layer_input_gate", "layer_inputs", "hidden"),
        linear("per_layer_projection", "hidden", "layer_inputs"),
        {"layer_scalar": "1"},
    ),
    mlp_axes=(
        FFN,
        Axis("layer_inputs", ("hidden_size_per_layer_input",), prunable=False),
        Axis("layer_vocab", ("vocab_size_per_layer_input",), prunable=False),
    ),
    norms=NORMS,
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm"),
    stream=StreamRules(
        scaled_embeddings=True,
        stream_writers=(
            "post_attention_layernorm.weight",
            "post_feedforward_layernorm.weight",
            "post_per_layer_input_norm.weight",
        ),
        stream_readers=("per_layer_input_gate.weight", "model.per_layer_model_projection.weight"),
        hidden_powers=(("model.per_layer_model_projection.weight", -0.5),),
    ),
    layer_lists=("layer_types",),
    layer_rules=LayerRules(
        trailing_layers=("num_kv_shared_layers",), fixed_layers=(("kv_sharing_modes", "store"),), fixed_ends=(-1,)
    ),
    config_rules=ConfigRules(size_multipliers=(("ffn", "use_double_wide_mlp", "kv_sharing_modes", "reuse", 2),)),
    refused={
        "vocab": "every layer has embeddings of tokens of its own",
        "kv": "its last layers read the keys and values of earlier layers, so all would have to keep the same groups; "
        "and layers with full attention have another number of KV heads",
    },
)
SPEC = replace(
    DENSE,
    variants=(
        (
            "enable_moe_block",
            True,
            replace(
                DENSE,
                axes=(*DENSE.axes, EXPERTS, MOE_FFN),
                layer=layer_tables(
                    DENSE.layer,
                    {
                        "experts.gate_up_proj": "experts moe_ffn+moe_ffn hidden",
                        "experts.down_proj": "experts hidden moe_ffn",
                        "router.proj.weight": "experts hidden",
                        "router.scale": "hidden",
                        "router.per_expert_scale": "experts",
                    },
                    norm(
                        "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"
                    ),
                ),
                hook_points={**DENSE.hook_points, "experts": "experts", "moe_ffn": "experts"},
                layer_norms=(*NORMS, "pre_feedforward_layernorm_2", "router.norm"),
                stream=replace(DENSE.stream, hidden_powers=(*DENSE.stream.hidden_powers, ("router.scale", -0.5))),
                least=(("experts", "top_k_experts"),),
            ),
        ),
    ),
)
