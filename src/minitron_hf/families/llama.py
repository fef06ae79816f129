"""Llama: separate projections, grouped queries, gated MLP, RMSNorm, optional biases."""

from .base import AS_MISTRAL, decoder

# LlamaConfig insists on hidden_size % num_attention_heads == 0 even where head_dim is given.
SPEC = decoder(
    "llama",
    multiples=(("hidden", "heads"),),
    equivalent_classes=AS_MISTRAL,
)
