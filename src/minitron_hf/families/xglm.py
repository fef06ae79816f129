"""XGLM: OPT's layout with scaled embeddings and sinusoidal positions."""

from dataclasses import replace

from .base import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    SINUSOIDAL,
    VOCAB,
    attention,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "xglm",
    axes=(
        replace(LAYERS, fields=("num_layers",)),
        replace(HIDDEN, fields=("d_model",)),
        replace(FFN, fields=("ffn_dim",)),
        replace(HEADS, fields=("attention_heads",)),
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    outer=layer_tables(
        {"model.embed_tokens.weight": "vocab hidden", "lm_head.weight": "vocab hidden"}, norm("model.layer_norm")
    ),
    layer=layer_tables(
        attention("self_attn", "out_proj"), linear("fc1", "ffn", "hidden"), linear("fc2", "hidden", "ffn")
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.layer_norm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="self_attn.out_proj",
    mlp_out="fc2",
    refused=SINUSOIDAL,
)
