"""Arcee (AFM): Llama's attention and a plain MLP with squared ReLU."""

from .base import GROUPED_ATTENTION, PLAIN_MLP, decoder, layer_tables

SPEC = decoder(
    "arcee",
    layer=layer_tables(GROUPED_ATTENTION, PLAIN_MLP),
    # The config insists on hidden_size % num_attention_heads == 0, though head_dim is a field of its own.
    multiples=(("hidden", "heads"),),
)
