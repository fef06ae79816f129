"""GPT-NeoX Japanese: GPT-NeoX one after another, without biases but one in the last layer's attention."""

from dataclasses import replace

from .axes import Axis
from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, decoder, layer_tables, linear, norm
from .rules import LayerRules

MULTIPLE = "the stock config counts neurons as a multiple of hidden_size, so neither can be cut without the other"

SPEC = decoder(
    "gpt_neox_japanese",
    axes=(
        LAYERS,
        HIDDEN,
        Axis("multiple", ("intermediate_multiple_size",), prunable=False),
        replace(FFN, fields=(), implied="multiple*hidden"),
        HEADS,
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    layers_path="gpt_neox_japanese.layers",
    outer=layer_tables(
        {"gpt_neox_japanese.embed_in.weight": "vocab hidden", "embed_out.weight": "vocab hidden"},
        norm("gpt_neox_japanese.final_layer_norm"),
    ),
    layer=layer_tables(
        linear("attention.query_key_value", "heads*3*head_dim", "hidden"),
        linear("attention.dense", "hidden", "heads*head_dim"),
        {"attention.dense_bias": "hidden"},
        linear("mlp.dense_h_to_4h", "ffn", "hidden"),
        linear("mlp.dense_4h_to_h", "hidden", "ffn"),
    ),
    final_norm="gpt_neox_japanese.final_layer_norm",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    layer_rules=LayerRules(fixed_ends=(-1,)),
    refused={
        "ffn": MULTIPLE,
        "hidden": MULTIPLE,
        "heads": "all heads together are as wide as the residual stream, which cannot be cut",
    },
)
