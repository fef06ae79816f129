"""GLM-4-MoE-Lite: DeepSeek-V3 with a list of the layers that have experts."""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    LATENT_ATTENTION,
    LISTED_LATENT_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "glm4_moe_lite",
    layer=layer_tables(LATENT_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    **LISTED_LATENT_EXPERTS,
)
