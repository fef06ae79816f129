"""Mellum: Qwen3's attention, sliding by layer; experts or a plain MLP, by layer."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    LOCAL_EXPERTS,
    MOE_FFN,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "mellum",
    layer=layer_tables(GROUPED_ATTENTION, HEAD_NORMS, GATED_MLP, EXPERTS_MLP),
    mlp_axes=(FFN, LOCAL_EXPERTS, MOE_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types", "mlp_layer_types"),
    least=(("experts", "num_experts_per_tok"),),
)
