"""LongCat-Flash: layers of two latent attentions and two MLPs, and a shortcut with experts, some the identity."""

from dataclasses import replace

from .axes import Axis
from .base import (
    COMPRESSED_ATTENTION,
    EXPERT_HOOK_POINTS,
    FFN,
    GATED_MLP,
    HIDDEN,
    LATENT_AXES,
    LAYERS,
    MOE_FFN,
    ROUTED_EXPERTS,
    VOCAB,
    decoder,
    layer_tables,
    linear,
    move_module,
)

_TWO = "every layer has two of them, and the config has one number for both"
_ROWS = "the stock class places identity experts, with unused weights, after the routed experts"

SPEC = decoder(
    "longcat_flash",
    axes=(
        replace(LAYERS, fields=("num_layers",)),
        HIDDEN,
        replace(FFN, fields=("ffn_hidden_size",)),
        ROUTED_EXPERTS,
        Axis("identity_experts", ("zero_expert_num",), implied="0", prunable=False),
        replace(MOE_FFN, fields=("expert_ffn_hidden_size",)),
        *LATENT_AXES,
        VOCAB,
    ),
    layer=layer_tables(
        move_module(COMPRESSED_ATTENTION, "self_attn", "self_attn.0"),
        move_module(COMPRESSED_ATTENTION, "self_attn", "self_attn.1"),
        move_module(GATED_MLP, "mlp", "mlps.0"),
        move_module(GATED_MLP, "mlp", "mlps.1"),
        {
            "mlp.experts.gate_up_proj": "experts+identity_experts moe_ffn+moe_ffn hidden",
            "mlp.experts.down_proj": "experts hidden moe_ffn",
            "mlp.router.e_score_correction_bias": "experts+identity_experts",
        },
        linear("mlp.router.classifier", "experts+identity_experts", "hidden"),
    ),
    norms=("input_layernorm.0", "post_attention_layernorm.0", "input_layernorm.1", "post_attention_layernorm.1"),
    hook_points={"heads": "self_attn.0.o_proj", "ffn": "mlps.0.down_proj", **EXPERT_HOOK_POINTS},
    groups=(),
    refused={
        "hidden": "queries and keys are multiplied by the square root of hidden_size",
        "heads": _TWO,
        "ffn": _TWO,
        "experts": _ROWS,
        "moe_ffn": _ROWS,
    },
)
