"""GLM-MoE-DSA: DeepSeek-V3.2 where some layers use the indices of the layer before again."""

from .base import (
    COMPRESSED_ATTENTION,
    EXPERTS_MLP,
    GATED_MLP,
    INDEXER,
    INDEXER_AXES,
    LATENT_AXES,
    LISTED_LATENT_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)
from .rules import LayerRules

SPEC = decoder(
    "glm_moe_dsa",
    layer=layer_tables(COMPRESSED_ATTENTION, INDEXER, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    **{
        **LISTED_LATENT_EXPERTS,
        "attention_axes": (*LATENT_AXES, *INDEXER_AXES),
        "layer_lists": ("layer_types", "mlp_layer_types", "indexer_types"),
        "leading_layers": ("first_k_dense_replace",),
    },
    layer_rules=LayerRules(reusing_layers=(("indexer_types", "shared"),)),
)
