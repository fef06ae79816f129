"""Mistral Small 4: DeepSeek-V3's layout without a bias of the router; queries are scaled by position."""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    LATENT_ATTENTION,
    LATENT_EXPERTS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "mistral4",
    layer=layer_tables(LATENT_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP),
    **LATENT_EXPERTS,
)
