"""Laguna: a gate for every query head, or every dimension; experts and a shared one, or a plain MLP, by layer.

Only with equally many query heads in every layer.
"""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_DIM,
    HEAD_NORMS,
    HEADS,
    KV,
    MOE_FFN,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    SHARED_FFN,
    decoder,
    layer_tables,
)

GATED_HEADS = decoder(
    "laguna",
    layer=layer_tables(
        GROUPED_ATTENTION,
        {"self_attn.g_proj.weight": "heads hidden"},
        HEAD_NORMS,
        GATED_MLP,
        EXPERTS_MLP,
        SHARED_EXPERTS_MLP,
        ROUTER_BIAS,
    ),
    attention_axes=(
        replace(HEADS, fields=("num_attention_heads", "num_attention_heads_per_layer")),
        KV,
        HEAD_DIM,
    ),
    mlp_axes=(FFN, EXPERTS, MOE_FFN, SHARED_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types", "mlp_layer_types"),
    least=(("experts", "num_experts_per_tok"),),
)
ELEMENTS = replace(GATED_HEADS, layer={**GATED_HEADS.layer, "self_attn.g_proj.weight": "heads*head_dim hidden"})
SPEC = replace(GATED_HEADS, variants=(("gating", "per-element", ELEMENTS), ("gating", False, ELEMENTS)))
