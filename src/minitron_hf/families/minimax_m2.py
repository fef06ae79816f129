"""MiniMax-M2: RMSNorm over all query and key heads; experts in every layer, chosen with a bias on their scores."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_FFN,
    EXPERTS_MLP,
    GROUPED_ATTENTION,
    LOCAL_EXPERTS,
    WIDE_HEAD_NORMS,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "minimax_m2",
    layer=layer_tables(GROUPED_ATTENTION, WIDE_HEAD_NORMS, EXPERTS_MLP, {"mlp.e_score_correction_bias": "experts"}),
    mlp_axes=(LOCAL_EXPERTS, EXPERTS_FFN),
    mlp_hook_points=EXPERT_HOOK_POINTS,
    least=(("experts", "num_experts_per_tok"),),
)
