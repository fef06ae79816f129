"""Phi-3.5-MoE: LayerNorm, and in every layer experts, of which the router always chooses two."""

from .base import (
    EXPERT_TAPS,
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
    mlp_taps=EXPERT_TAPS,
    least=(("experts", "2"),),
)
