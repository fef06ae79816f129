"""Mistral: Llama's layout without biases; any hidden size, as head_dim is a config field of its own."""

from .base import decoder, fixed_width_wrapper

SPEC = decoder(
    "mistral", wrappers=(fixed_width_wrapper("mistral3", "model.vision_tower", "model.multi_modal_projector"),)
)
