"""IQuest-Coder: Llama's classes under a config of its own."""

from .base import decoder

SPEC = decoder("iquestcoder", multiples=(("hidden", "heads"),))
