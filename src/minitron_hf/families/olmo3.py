"""OLMo 3: OLMo 2 with full or sliding attention by layer."""

from .base import GATED_MLP, GROUPED_ATTENTION, WIDE_HEAD_NORMS, decoder, layer_tables

SPEC = decoder(
    "olmo3",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, WIDE_HEAD_NORMS),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    layer_lists=("layer_types",),
)
