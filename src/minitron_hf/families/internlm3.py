"""InternLM3: Llama's classes under a config of its own."""

from .base import AS_MISTRAL, decoder

SPEC = decoder("internlm3", multiples=(("hidden", "heads"),), equivalent_classes=AS_MISTRAL)
