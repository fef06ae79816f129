"""Qwen3-VL's language model: Qwen3's layout without windows."""

from .base import GATED_MLP, GROUPED_ATTENTION, HEAD_NORMS, decoder, layer_tables

SPEC = decoder("qwen3_vl_text", layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, HEAD_NORMS))
