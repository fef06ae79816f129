"""Qwen2: Llama's layout with biases on q, k and v, and full or sliding attention by layer."""

from .base import decoder

SPEC = decoder("qwen2", layer_lists=("layer_types",), leading_layers=("max_window_layers",))
