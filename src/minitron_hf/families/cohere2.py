"""Cohere 2 (Command R7B, A): attention and MLP side by side after one LayerNorm; sliding attention by layer."""

from .base import decoder
from .rules import COHERE_LOGITS

SPEC = decoder("cohere2", logits=COHERE_LOGITS, norms=("input_layernorm",), layer_lists=("layer_types",))
