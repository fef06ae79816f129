"""Mistral: Llama's layout without biases; any hidden size, as head_dim is a config field of its own."""

from .base import beside, decoder

SPEC = decoder("mistral", wrappers=(beside("mistral3", "model.vision_tower", "model.multi_modal_projector"),))
