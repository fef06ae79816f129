"""OLMoE: experts in every layer; RMSNorm over all query and key heads, which are as wide as the hidden size."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_FFN,
    EXPERTS_MLP,
    GROUPED_ATTENTION,
    WIDE_HEAD_NORMS,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "olmoe",
    layer=layer_tables(GROUPED_ATTENTION, WIDE_HEAD_NORMS, EXPERTS_MLP),
    mlp_axes=(EXPERTS, EXPERTS_FFN),
    mlp_hook_points=EXPERT_HOOK_POINTS,
    equal=(("heads*head_dim", "hidden"),),
    least=(("experts", "num_experts_per_tok"),),
)
