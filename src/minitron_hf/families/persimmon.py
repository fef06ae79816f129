"""Persimmon: q, k and v interleaved per head, LayerNorm on every query and key head, biases everywhere."""

from .base import EMBEDDINGS, HEAD_DIM, HEADS, SQUARE, decoder, layer_tables, linear, norm

SPEC = decoder(
    "persimmon",
    outer=layer_tables(EMBEDDINGS, norm("model.final_layernorm")),
    layer=layer_tables(
        linear("self_attn.query_key_value", "heads*3*head_dim", "hidden"),
        linear("self_attn.dense", "hidden", "heads*head_dim"),
        norm("self_attn.q_layernorm", "self_attn.k_layernorm", width="head_dim"),
        linear("mlp.dense_h_to_4h", "ffn", "hidden"),
        linear("mlp.dense_4h_to_h", "hidden", "ffn"),
    ),
    final_norm="model.final_layernorm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="self_attn.dense",
    mlp_out="mlp.dense_4h_to_h",
    equal=SQUARE,
)
