"""ERNIE 4.5, MoE: experts, chosen with a bias on their scores, and shared ones in a range of layers; else an MLP."""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    MOE_FFN,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)
from .rules import LayerRules

SPEC = decoder(
    "ernie4_5_moe",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        EXPERTS_MLP,
        SHARED_EXPERTS_MLP,
        {"mlp.gate.moe_statics.e_score_correction_bias": "1 experts"},
    ),
    mlp_axes=(
        FFN,
        replace(EXPERTS, fields=("moe_num_experts",)),
        MOE_FFN,
        replace(SHARED_EXPERTS, fields=("moe_num_shared_experts",)),
        SHARED_EXPERTS_FFN,
    ),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    equal=(("shared_experts*moe_ffn", "shared_ffn"),),
    layer_rules=LayerRules(sparse_ranges=(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),)),
    least=(("experts", "moe_k"),),
)
