"""CTRL: separate q, k and v, scaled embeddings and sinusoidal positions, biases everywhere."""

from dataclasses import replace

from .base import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    SINUSOIDAL,
    VOCAB,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "ctrl",
    axes=(
        replace(LAYERS, fields=("n_layer",)),
        replace(HIDDEN, fields=("n_embd",)),
        replace(FFN, fields=("dff",)),
        replace(HEADS, fields=("n_head",)),
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    layers_path="transformer.h",
    outer=layer_tables(
        {"transformer.w.weight": "vocab hidden"},
        linear("lm_head", "vocab", "hidden"),
        norm("transformer.layernorm"),
    ),
    layer=layer_tables(
        linear("multi_head_attention.Wq", "heads*head_dim", "hidden"),
        linear("multi_head_attention.Wk", "heads*head_dim", "hidden"),
        linear("multi_head_attention.Wv", "heads*head_dim", "hidden"),
        linear("multi_head_attention.dense", "hidden", "heads*head_dim"),
        linear("ffn.0", "ffn", "hidden"),
        linear("ffn.2", "hidden", "ffn"),
    ),
    norms=("layernorm1", "layernorm2"),
    final_norm="transformer.layernorm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="multi_head_attention.dense",
    mlp_out="ffn.2",
    refused=SINUSOIDAL,
)
