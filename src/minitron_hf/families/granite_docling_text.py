"""Granite Docling's language model: Granite's layout."""

from .base import decoder
from .rules import GRANITE_LOGITS

SPEC = decoder("granite_docling_text", logits=GRANITE_LOGITS)
