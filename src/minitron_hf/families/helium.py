"""Helium: Llama's layout; the heads together are as wide as the hidden size."""

from .base import SQUARE, decoder

SPEC = decoder("helium", equal=SQUARE)
