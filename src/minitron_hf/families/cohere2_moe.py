"""Cohere 2 with experts, and shared ones as wide, or a plain MLP, by layer."""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_FFN,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)
from .rules import COHERE_LOGITS

SPEC = decoder(
    "cohere2_moe",
    logits=COHERE_LOGITS,
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP),
    norms=("input_layernorm",),
    mlp_axes=(
        EXPERTS,
        EXPERTS_FFN,
        replace(SHARED_EXPERTS, fields=("num_shared_experts",)),
        SHARED_EXPERTS_FFN,
        replace(FFN, fields=("prefix_dense_intermediate_size",), implied="moe_ffn"),
    ),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    equal=(("shared_experts*moe_ffn", "shared_ffn"),),
    layer_lists=("layer_types", "mlp_layer_types"),
    least=(("experts", "num_experts_per_tok"),),
)
