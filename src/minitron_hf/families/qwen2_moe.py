"""Qwen2-MoE: Qwen2's attention; experts beside a gated shared expert in some layers, a plain MLP in the others."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GATED_SHARED_EXPERT,
    GROUPED_ATTENTION,
    MOE_FFN,
    SHARED_FFN,
    decoder,
    layer_tables,
)
from .rules import LayerRules

SPEC = decoder(
    "qwen2_moe",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        EXPERTS_MLP,
        GATED_SHARED_EXPERT,
    ),
    mlp_axes=(FFN, EXPERTS, MOE_FFN, SHARED_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_expert.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types",),
    leading_layers=("max_window_layers",),
    layer_rules=LayerRules(sparse_layers=(("mlp_only_layers", "decoder_sparse_step"),)),
    least=(("experts", "num_experts_per_tok"),),
)
