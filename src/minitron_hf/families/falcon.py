"""Falcon 7B: attention and MLP side by side after one LayerNorm, one key and value head for all queries.

Only that layout: the larger models group q, k and v by key head, and those with `multi_query=False` by head.
"""

from dataclasses import replace

from .base import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, ArchSpec, layer_tables, linear, norm

_ALIBI = "the attention biases of ALiBi follow from a head's index and the number of heads"

SPEC = ArchSpec(
    model_type="falcon",
    axes=(
        LAYERS,
        HIDDEN,
        replace(FFN, fields=("ffn_hidden_size",)),
        replace(HEADS, fields=("num_attention_heads", "num_kv_heads")),
        replace(HEAD_DIM, fields=()),
        VOCAB,
    ),
    layers_path="transformer.h",
    outer=layer_tables(
        {"transformer.word_embeddings.weight": "vocab hidden", "lm_head.weight": "vocab hidden"},
        norm("transformer.ln_f"),
    ),
    layer=layer_tables(
        linear("self_attention.query_key_value", "heads*head_dim+head_dim+head_dim", "hidden"),
        linear("self_attention.dense", "hidden", "heads*head_dim"),
        linear("mlp.dense_h_to_4h", "ffn", "hidden"),
        linear("mlp.dense_4h_to_h", "hidden", "ffn"),
        norm("input_layernorm"),
    ),
    taps={"ffn": "mlp.dense_4h_to_h", "heads": "self_attention.dense"},
    layer_norms=("input_layernorm",),
    final_norm="transformer.ln_f",
    equal=(("heads*head_dim", "hidden"),),
    refused_if=(("alibi", True, "heads", _ALIBI), ("alibi", True, "hidden", _ALIBI)),
)
