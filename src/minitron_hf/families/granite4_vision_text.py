"""Granite 4.0 Vision's language model: Granite's layout."""

from .base import decoder
from .rules import GRANITE_LOGITS

SPEC = decoder("granite4_vision_text", logits=GRANITE_LOGITS)
