"""GPT-NeoX (Pythia): q, k and v interleaved per head, parallel residual, LayerNorm with biases."""

from .base import HEAD_DIM, HEADS, SQUARE, decoder, layer_tables, linear, norm

SPEC = decoder(
    "gpt_neox",
    layers_path="gpt_neox.layers",
    outer=layer_tables(
        {"gpt_neox.embed_in.weight": "vocab hidden", "lm_head.weight": "vocab hidden"},
        norm("gpt_neox.final_layer_norm"),
    ),
    layer=layer_tables(
        linear("attention.query_key_value", "heads*3*head_dim", "hidden"),
        linear("attention.dense", "hidden", "heads*head_dim"),
        linear("mlp.dense_h_to_4h", "ffn", "hidden"),
        linear("mlp.dense_4h_to_h", "hidden", "ffn"),
    ),
    final_norm="gpt_neox.final_layer_norm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    equal=SQUARE,
)
