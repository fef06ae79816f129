"""Qwen 3.5, text only: gated attention in every fourth layer, the gated delta rule in the others."""

from .base import (
    DELTA_AXES,
    GATED_MLP,
    GATED_QUERIES,
    HEAD_DIM,
    HEAD_NORMS,
    HEADS,
    KV,
    NEEDS_FULL_ATTENTION,
    QWEN_DELTA,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "qwen3_5_text",
    layer=layer_tables(GATED_QUERIES, HEAD_NORMS, QWEN_DELTA, GATED_MLP),
    attention_axes=(HEADS, KV, HEAD_DIM, *DELTA_AXES),
    layer_lists=("layer_types",),
    needed_kinds=NEEDS_FULL_ATTENTION,
    norm_offset=1.0,
)
