"""GLM-4-MoE: Llama's attention, heads normed by flag; leading MLPs, then experts in groups and shared ones."""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    GROUPED_ATTENTION,
    GROUPED_EXPERTS,
    HEAD_NORMS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "glm4_moe",
    layer=layer_tables(GROUPED_ATTENTION, HEAD_NORMS, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    **GROUPED_EXPERTS,
)
