"""BLOOM: q, k and v interleaved per head, ALiBi, four neurons to a channel, a norm on the embeddings."""

from dataclasses import replace

from .base import (
    ALIBI,
    FOURFOLD,
    FOURFOLD_FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "bloom",
    axes=(
        replace(LAYERS, fields=("n_layer",)),
        HIDDEN,
        FOURFOLD_FFN,
        replace(HEADS, fields=("n_head",)),
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    layers_path="transformer.h",
    outer=layer_tables(
        {"transformer.word_embeddings.weight": "vocab hidden", "lm_head.weight": "vocab hidden"},
        norm("transformer.word_embeddings_layernorm", "transformer.ln_f"),
    ),
    layer=layer_tables(
        linear("self_attention.query_key_value", "heads*3*head_dim", "hidden"),
        linear("self_attention.dense", "hidden", "heads*head_dim"),
        linear("mlp.dense_h_to_4h", "ffn", "hidden"),
        linear("mlp.dense_4h_to_h", "hidden", "ffn"),
    ),
    final_norm="transformer.ln_f",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="self_attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    refused={**ALIBI, **FOURFOLD},
)
