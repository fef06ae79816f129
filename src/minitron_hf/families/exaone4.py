"""EXAONE 4: norms on what attention and MLP write, RMSNorm on every query and key head, sliding attention by layer."""

from .base import GATED_MLP, GROUPED_ATTENTION, HEAD_NORMS, decoder, layer_tables

SPEC = decoder(
    "exaone4",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, HEAD_NORMS),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    layer_lists=("layer_types",),
)
