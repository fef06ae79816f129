"""MPT: q, k and v fused, ALiBi, four neurons to a channel, no biases."""

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
    "mpt",
    axes=(
        replace(LAYERS, fields=("n_layers",)),
        replace(HIDDEN, fields=("d_model",)),
        FOURFOLD_FFN,
        replace(HEADS, fields=("n_heads",)),
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    layers_path="transformer.blocks",
    outer=layer_tables(
        {"transformer.wte.weight": "vocab hidden", "lm_head.weight": "vocab hidden"}, norm("transformer.norm_f")
    ),
    layer=layer_tables(
        linear("attn.Wqkv", "heads*head_dim+heads*head_dim+heads*head_dim", "hidden"),
        linear("attn.out_proj", "hidden", "heads*head_dim"),
        linear("ffn.up_proj", "ffn", "hidden"),
        linear("ffn.down_proj", "hidden", "ffn"),
    ),
    norms=("norm_1", "norm_2"),
    final_norm="transformer.norm_f",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="attn.out_proj",
    mlp_out="ffn.down_proj",
    refused={**ALIBI, **FOURFOLD},
)
