"""Cohere Compass, the language model: Cohere 2's layout, with positions by kind of layer."""

from .base import decoder

SPEC = decoder("cohere_compass_text", norms=("input_layernorm",), layer_lists=("layer_types",))
