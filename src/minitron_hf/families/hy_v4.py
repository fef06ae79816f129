"""HY-V4: GLM-MoE-DSA with gated heads and sinks, whose residual stream is several streams that are mixed and fed."""

from .axes import Axis
from .base import (
    COMPRESSED_ATTENTION,
    EMBEDDINGS,
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
    linear,
    norm,
)
from .rules import LayerRules

SPEC = decoder(
    "hy_v4",
    outer=layer_tables(
        EMBEDDINGS,
        norm("model.norm"),
        {
            "model.hc_head.hc_fn": "streams streams*hidden",
            "model.hc_head.hc_base": "streams",
            "model.hc_head.hc_scale": "1",
        },
    ),
    layer=layer_tables(
        COMPRESSED_ATTENTION,
        INDEXER,
        linear("self_attn.gate_proj", "heads*head_dim", "hidden"),
        {"self_attn.sinks": "heads"},
        GATED_MLP,
        EXPERTS_MLP,
        SHARED_EXPERTS_MLP,
        ROUTER_BIAS,
        {
            "attn_hc.fn": "2*streams streams*hidden",
            "attn_hc.base": "2*streams",
            "attn_hc.scale": "2",
            "ffn_hc.fn": "2*streams streams*hidden",
            "ffn_hc.base": "2*streams",
            "ffn_hc.scale": "2",
        },
    ),
    **{
        **LISTED_LATENT_EXPERTS,
        "attention_axes": (*LATENT_AXES, *INDEXER_AXES, Axis("streams", ("hc_mult",), prunable=False)),
        "layer_lists": ("layer_types", "mlp_layer_types", "indexer_types"),
    },
    layer_rules=LayerRules(reusing_layers=(("indexer_types", "shared"),)),
    refused={
        "hidden": "its streams are normalised together by a norm without weights, so a cut cannot be compensated"
    },
)
