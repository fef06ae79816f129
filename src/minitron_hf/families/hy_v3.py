"""Hunyuan 3: Qwen3's attention; experts, chosen with a bias on their scores, and shared ones, or an MLP, by layer."""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    MOE_FFN,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "hy_v3",
    layer=layer_tables(
        GROUPED_ATTENTION,
        HEAD_NORMS,
        GATED_MLP,
        EXPERTS_MLP,
        SHARED_EXPERTS_MLP,
        {"mlp.e_score_correction_bias": "experts"},
    ),
    mlp_axes=(
        FFN,
        EXPERTS,
        MOE_FFN,
        replace(SHARED_EXPERTS, fields=("num_shared_experts",)),
        SHARED_EXPERTS_FFN,
    ),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    equal=(("shared_experts*moe_ffn", "shared_ffn"),),
    layer_lists=("mlp_layer_types",),
    least=(("experts", "num_experts_per_tok"),),
)
