"""Granite: Llama's layout; embeddings, residuals, attention and logits have constant multipliers."""

from .base import decoder

SPEC = decoder("granite")
