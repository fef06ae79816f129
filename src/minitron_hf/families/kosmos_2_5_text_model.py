"""KOSMOS-2.5's language model: OPT's layout with a norm over neurons, scaled embeddings and sinusoidal positions."""

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
    "kosmos_2_5_text_model",
    axes=(
        replace(LAYERS, fields=("layers",)),
        replace(HIDDEN, fields=("embed_dim",)),
        replace(FFN, fields=("ffn_dim",)),
        replace(HEADS, fields=("attention_heads",)),
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    outer=layer_tables(
        {"model.embed_tokens.weight": "vocab hidden", "lm_head.weight": "vocab hidden"},
        {"model.segment_emb.weight": "2 hidden"},  # of text and of images
        norm("model.layer_norm"),
    ),
    layer=layer_tables(
        attention("self_attn", "out_proj"),
        linear("ffn.fc1", "ffn", "hidden"),
        norm("ffn.ffn_layernorm", width="ffn"),
        linear("ffn.fc2", "hidden", "ffn"),
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.layer_norm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="self_attn.out_proj",
    mlp_out="ffn.fc2",
    refused=SINUSOIDAL,
)
