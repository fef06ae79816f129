"""Helium: Llama's layout; the heads together are as wide as the hidden size."""

from .base import decoder

SPEC = decoder("helium", equal=(("heads*head_dim", "hidden"),))
