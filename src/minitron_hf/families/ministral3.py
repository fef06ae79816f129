"""Ministral 3: Mistral with YaRN, and queries scaled by position."""

from .base import decoder

SPEC = decoder("ministral3")
