"""DeepSeek-V3: latent attention; leading MLPs, then experts in groups and shared ones."""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    LATENT_ATTENTION,
    LATENT_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "deepseek_v3",
    layer=layer_tables(LATENT_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    **LATENT_EXPERTS,
)
