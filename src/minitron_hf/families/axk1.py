"""A.X-K1: DeepSeek-V3 with a list of the layers that have experts, and a norm of what those write."""

from .base import (
    COMPRESSED_ATTENTION,
    EXPERTS_MLP,
    GATED_MLP,
    LISTED_LATENT_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "axk1",
    layer=layer_tables(COMPRESSED_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    output_norms=("mlp.post_mlp_layernorm",),
    **LISTED_LATENT_EXPERTS,
)
