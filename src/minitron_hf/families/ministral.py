"""Ministral: Mistral with full or sliding attention by layer."""

from .base import decoder

SPEC = decoder("ministral", layer_lists=("layer_types",))
