"""Hunyuan, dense: Llama's layout with RMSNorm on every query and key head, after the rotation."""

from .base import GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables, norm

SPEC = decoder(
    "hunyuan_v1_dense",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        norm("self_attn.query_layernorm", "self_attn.key_layernorm", width="head_dim"),
    ),
)
