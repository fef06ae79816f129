"""GPT-Neo: separate q, k and v without biases, global and local attention by layer, learned positions."""

from dataclasses import replace

from .base import (
    FFN,
    GPT_OUTER,
    GPT_POSITION_EMBEDDINGS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    VOCAB,
    attention,
    gpt,
    layer_tables,
    linear,
)
from .rules import LayerRules

SPEC = gpt(
    "gpt_neo",
    axes=(
        replace(LAYERS, fields=("num_layers",)),
        HIDDEN,
        replace(FFN, implied="4*hidden"),
        replace(HEADS, fields=("num_heads",)),
        HEAD_DIM,
        VOCAB,
        POSITIONS,
    ),
    outer=layer_tables(GPT_OUTER, GPT_POSITION_EMBEDDINGS),
    layer=layer_tables(
        attention("attn.attention", "out_proj"),
        linear("mlp.c_fc", "ffn", "hidden"),
        linear("mlp.c_proj", "hidden", "ffn"),
    ),
    attention_out="attn.attention.out_proj",
    mlp_out="mlp.c_proj",
    layer_lists=("attention_layers",),
    layer_rules=LayerRules(layer_patterns=(("attention_types", "attention_layers"),)),
)
