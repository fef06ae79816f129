"""Cosmos 3 Edge's language model: grouped attention and a plain MLP with squared ReLU."""

from .base import GROUPED_ATTENTION, decoder, layer_tables, linear

SPEC = decoder(
    "cosmos3_edge_text",
    layer=layer_tables(GROUPED_ATTENTION, linear("mlp.fc1", "ffn", "hidden"), linear("mlp.fc2", "hidden", "ffn")),
    mlp_out="mlp.fc2",
    # The config insists on hidden_size % num_attention_heads == 0, though head_dim is a field of its own.
    multiples=(("hidden", "heads"),),
)
