"""Gemma: Llama's layout, norm weights stored minus one, embeddings multiplied by √hidden_size.

A student of another width multiplies its embeddings by its own √hidden_size: what is cut equals the teacher with dead
channels and that factor.
"""

from .base import decoder

SPEC = decoder("gemma")
