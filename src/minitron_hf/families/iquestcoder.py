"""IQuest-Coder: Llama's classes under a config of its own."""

from .base import AS_MISTRAL, decoder

SPEC = decoder("iquestcoder", multiples=(("hidden", "heads"),), equivalent_classes=AS_MISTRAL)
