"""GLM-4.5V's language model: leading MLPs, then experts in groups and shared ones, as GLM-4-MoE."""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    GROUPED_ATTENTION,
    GROUPED_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "glm4v_moe_text",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    **GROUPED_EXPERTS,
)
