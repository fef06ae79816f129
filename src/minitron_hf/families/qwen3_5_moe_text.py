"""Qwen 3.5 with experts, text only: its attention, and experts beside a gated shared expert in every layer."""

from .base import (
    DELTA_AXES,
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    GATED_QUERIES,
    GATED_SHARED_EXPERT,
    HEAD_DIM,
    HEAD_NORMS,
    HEADS,
    KV,
    MOE_FFN,
    NEEDS_FULL_ATTENTION,
    QWEN_DELTA,
    SHARED_FFN,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "qwen3_5_moe_text",
    layer=layer_tables(GATED_QUERIES, HEAD_NORMS, QWEN_DELTA, EXPERTS_MLP, GATED_SHARED_EXPERT),
    attention_axes=(HEADS, KV, HEAD_DIM, *DELTA_AXES),
    mlp_axes=(EXPERTS, MOE_FFN, SHARED_FFN),
    mlp_hook_points={"shared_ffn": "mlp.shared_expert.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types",),
    needed_kinds=NEEDS_FULL_ATTENTION,
    norm_offset=1.0,
    least=(("experts", "num_experts_per_tok"),),
)
