"""Aria, the language model: Llama's attention; in every layer experts, their weights transposed, and shared ones."""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_FFN,
    GROUPED_ATTENTION,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
    linear,
)

SPEC = decoder(
    "aria_text",
    layer=layer_tables(
        GROUPED_ATTENTION,
        {
            "mlp.experts.gate_up_proj": "experts hidden moe_ffn+moe_ffn",
            "mlp.experts.down_proj": "experts moe_ffn hidden",
        },
        linear("mlp.router", "experts", "hidden"),
        SHARED_EXPERTS_MLP,
    ),
    mlp_axes=(
        replace(EXPERTS, fields=("moe_num_experts",)),
        EXPERTS_FFN,
        replace(SHARED_EXPERTS, fields=("moe_num_shared_experts",)),
        SHARED_EXPERTS_FFN,
    ),
    mlp_hook_points={"shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    equal=(("shared_experts*moe_ffn", "shared_ffn"),),
    multiples=(("hidden", "heads"),),
    least=(("experts", "moe_topk"),),
)
