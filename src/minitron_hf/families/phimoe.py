"""Phi-3.5-MoE: LayerNorm, and in every layer experts, of which the router always chooses two."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_FFN,
    GROUPED_ATTENTION,
    LOCAL_EXPERTS,
    decoder,
    layer_tables,
    stacked_experts,
)

SPEC = decoder(
    "phimoe",
    layer=layer_tables(GROUPED_ATTENTION, stacked_experts(router="router")),
    mlp_axes=(LOCAL_EXPERTS, EXPERTS_FFN),
    mlp_hook_points=EXPERT_HOOK_POINTS,
    least=(("experts", "2"),),
)
