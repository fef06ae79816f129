"""HunyuanOCR's language model: Hunyuan's dense layout."""

from .base import GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables, norm

SPEC = decoder(
    "hunyuan_vl_text",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        norm("self_attn.query_layernorm", "self_attn.key_layernorm", width="head_dim"),
    ),
)
