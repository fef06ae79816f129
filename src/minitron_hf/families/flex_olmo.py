"""FlexOlmo: OLMo 2 with experts instead of an MLP in every layer."""

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
    "flex_olmo",
    layer=layer_tables(GROUPED_ATTENTION, WIDE_HEAD_NORMS, EXPERTS_MLP),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    mlp_axes=(EXPERTS, EXPERTS_FFN),
    mlp_hook_points=EXPERT_HOOK_POINTS,
    least=(("experts", "num_experts_per_tok"),),
)
