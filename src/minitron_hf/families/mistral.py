"""Mistral: Llama's layout without biases; any hidden size, as head_dim is a config field of its own."""

from .base import decoder

SPEC = decoder("mistral")
