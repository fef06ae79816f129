"""Granite: Llama's layout; embeddings, residuals, attention and logits have constant multipliers."""

from .base import decoder
from .rules import GRANITE_LOGITS

SPEC = decoder("granite", logits=GRANITE_LOGITS)
