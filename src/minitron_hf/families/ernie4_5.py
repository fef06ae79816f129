"""ERNIE 4.5, dense: Llama's layout with interleaved rotation."""

from .base import decoder

SPEC = decoder("ernie4_5")
