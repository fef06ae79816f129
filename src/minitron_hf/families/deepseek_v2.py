"""DeepSeek-V2: latent attention; leading MLPs, then experts and shared ones; groups count by their best expert."""

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
    "deepseek_v2",
    layer=layer_tables(LATENT_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP),
    **{
        **LATENT_EXPERTS,
        "least": (("experts", "num_experts_per_tok"), ("experts", "num_experts_per_tok*n_group/topk_group")),
    },
    multiples=(("hidden", "heads"),),
)
