"""Cohere Compass, the language model: Cohere 2's layout, with positions by kind of layer."""

from .base import decoder
from .rules import COHERE_LOGITS

SPEC = decoder("cohere_compass_text", logits=COHERE_LOGITS, norms=("input_layernorm",), layer_lists=("layer_types",))
