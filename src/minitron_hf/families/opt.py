"""OPT: separate q, k and v, learned positions of which the first two are never used, biases everywhere.

Only the layout with a norm before attention and MLP, and embeddings as wide as the rest: all sizes but 350M.
"""

from dataclasses import replace

from .base import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    SQUARE,
    VOCAB,
    attention,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "opt",
    axes=(
        LAYERS,
        replace(HIDDEN, fields=("hidden_size", "word_embed_proj_dim")),
        replace(FFN, fields=("ffn_dim",)),
        HEADS,
        HEAD_DIM,
        VOCAB,
        POSITIONS,
    ),
    layers_path="model.decoder.layers",
    outer=layer_tables(
        {
            "model.decoder.embed_tokens.weight": "vocab hidden",
            "model.decoder.embed_positions.weight": "2+positions hidden",
            "lm_head.weight": "vocab hidden",
        },
        norm("model.decoder.final_layer_norm"),
    ),
    layer=layer_tables(
        attention("self_attn", "out_proj"), linear("fc1", "ffn", "hidden"), linear("fc2", "hidden", "ffn")
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.decoder.final_layer_norm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="self_attn.out_proj",
    mlp_out="fc2",
    equal=SQUARE,
)
