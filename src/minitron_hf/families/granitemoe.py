"""Granite-MoE: Granite with experts instead of an MLP in every layer."""

from .base import (
    EXPERTS_FFN,
    GROUPED_ATTENTION,
    LOCAL_EXPERTS,
    decoder,
    layer_tables,
    stacked_experts,
)
from .rules import GRANITE_LOGITS

SPEC = decoder(
    "granitemoe",
    logits=GRANITE_LOGITS,
    layer=layer_tables(
        GROUPED_ATTENTION,
        stacked_experts("block_sparse_moe", "router"),
    ),
    mlp_axes=(LOCAL_EXPERTS, EXPERTS_FFN),
    mlp_hook_points={
        "experts": "block_sparse_moe.experts",
        "moe_ffn": "block_sparse_moe.experts",
    },
    least=(("experts", "num_experts_per_tok"),),
)
