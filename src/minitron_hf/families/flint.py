"""Flint: Qwen3's attention with a sink for every query head; experts and a shared one, or a plain MLP, by layer."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    MOE_FFN,
    SHARED_EXPERT_MLP,
    SHARED_FFN,
    decoder,
    layer_tables,
)
from .rules import LayerRules

SPEC = decoder(
    "flint",
    layer=layer_tables(
        GROUPED_ATTENTION,
        {"self_attn.sinks": "heads"},
        HEAD_NORMS,
        GATED_MLP,
        EXPERTS_MLP,
        SHARED_EXPERT_MLP,
    ),
    mlp_axes=(FFN, EXPERTS, MOE_FFN, SHARED_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_expert.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types",),
    layer_rules=LayerRules(sparse_layers=(("mlp_only_layers", "decoder_sparse_step"),)),
    least=(("experts", "num_experts_per_tok"),),
)
