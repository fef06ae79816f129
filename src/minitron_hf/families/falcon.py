"""Falcon: one model type, four layouts; in all of them the heads are as wide together as the residual stream.

7B: attention and MLP side by side after one LayerNorm, one key and value head for all queries. 40B and 180B: a
LayerNorm for each, q, k and v ordered by key head; 11B: the same with one LayerNorm. RW: q, k and v ordered by head,
the MLP after attention, ALiBi.
"""

from dataclasses import replace

from .base import ALIBI, FFN, HEAD_DIM, HEADS, HIDDEN, KV, LAYERS, SQUARE, VOCAB, decoder, layer_tables, linear, norm

AXES = (LAYERS, HIDDEN, replace(FFN, fields=("ffn_hidden_size",)), VOCAB)
PROJECTIONS = layer_tables(
    linear("self_attention.dense", "hidden", "heads*head_dim"),
    linear("mlp.dense_h_to_4h", "ffn", "hidden"),
    linear("mlp.dense_4h_to_h", "hidden", "ffn"),
)
BY_GROUP = layer_tables(linear("self_attention.query_key_value", "kv*(heads/kv+1+1)*head_dim", "hidden"), PROJECTIONS)
MULTI_QUERY = decoder(
    "falcon",
    axes=(
        *AXES,
        replace(HEADS, fields=("num_attention_heads", "num_kv_heads")),
        replace(HEAD_DIM, fields=()),
    ),
    layers_path="transformer.h",
    outer=layer_tables(
        {"transformer.word_embeddings.weight": "vocab hidden", "lm_head.weight": "vocab hidden"},
        norm("transformer.ln_f"),
    ),
    layer=layer_tables(
        linear("self_attention.query_key_value", "heads*head_dim+head_dim+head_dim", "hidden"), PROJECTIONS
    ),
    norms=("input_layernorm",),
    final_norm="transformer.ln_f",
    attention_axes=(HEADS, HEAD_DIM),
    attention_out="self_attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    equal=SQUARE,
    refused_if=(("alibi", True, "heads", ALIBI["heads"]), ("alibi", True, "hidden", ALIBI["hidden"])),
)
GROUPED = replace(
    MULTI_QUERY,
    axes=(*AXES, HEADS, replace(KV, fields=("num_kv_heads",)), replace(HEAD_DIM, fields=())),
    layer=layer_tables(BY_GROUP, norm("ln_attn", "ln_mlp")),
    hook_points={**MULTI_QUERY.hook_points, "kv": "self_attention.dense"},
    layer_norms=("ln_attn", "ln_mlp"),
    groups=(("heads", "kv"),),
    refused_if=(*MULTI_QUERY.refused_if, ("alibi", True, "kv", ALIBI["heads"])),
)
GROUPED_ONE_NORM = replace(
    GROUPED, layer=layer_tables(BY_GROUP, norm("input_layernorm")), layer_norms=("input_layernorm",)
)
SEQUENTIAL = replace(
    MULTI_QUERY,
    layer=layer_tables(
        linear("self_attention.query_key_value", "heads*3*head_dim", "hidden"),
        PROJECTIONS,
        norm("input_layernorm", "post_attention_layernorm"),
    ),
    layer_norms=("input_layernorm", "post_attention_layernorm"),
)
SPEC = replace(
    MULTI_QUERY,
    variants=(
        (
            "new_decoder_architecture",
            True,
            replace(GROUPED, variants=(("num_ln_in_parallel_attn", 1, GROUPED_ONE_NORM),)),
        ),
        ("multi_query", False, SEQUENTIAL),
    ),
)
