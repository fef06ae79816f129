"""Emu3's language model: Llama's layout. Images are tokens of its vocabulary."""

from .base import decoder

SPEC = decoder("emu3_text_model")
