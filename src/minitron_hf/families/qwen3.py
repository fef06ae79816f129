"""Qwen3: Llama's layout with RMSNorm on every query and key head, and full or sliding attention by layer."""

from .base import GATED_MLP, GROUPED_ATTENTION, HEAD_NORMS, decoder, layer_tables

SPEC = decoder(
    "qwen3",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, HEAD_NORMS),
    layer_lists=("layer_types",),
    leading_layers=("max_window_layers",),
)
