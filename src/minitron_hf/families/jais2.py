"""Jais 2: LayerNorm, biases everywhere, plain MLP with squared ReLU."""

from .base import GROUPED_ATTENTION, PLAIN_MLP, decoder, layer_tables

# Jais2Config inherits LlamaConfig's rule that hidden_size is a multiple of num_attention_heads.
SPEC = decoder("jais2", layer=layer_tables(GROUPED_ATTENTION, PLAIN_MLP), multiples=(("hidden", "heads"),))
