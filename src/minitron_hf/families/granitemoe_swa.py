"""Granite-MoE with sliding windows: a sink for every query head; window and rotary base (or none) by layer."""

from dataclasses import replace

from .base import (
    EXPERTS_FFN,
    GROUPED_ATTENTION,
    LOCAL_EXPERTS,
    SHARED_FFN,
    decoder,
    layer_tables,
    linear,
    stacked_experts,
)
from .rules import GRANITE_LOGITS

SPEC = decoder(
    "granitemoe_swa",
    logits=GRANITE_LOGITS,
    layer=layer_tables(
        GROUPED_ATTENTION,
        stacked_experts("block_sparse_moe", "router"),
        {"self_attn.sinks": "heads"},
        linear("shared_mlp.input_linear", "shared_ffn+shared_ffn", "hidden"),
        linear("shared_mlp.output_linear", "hidden", "shared_ffn"),
    ),
    mlp_axes=(LOCAL_EXPERTS, EXPERTS_FFN, replace(SHARED_FFN, fields=("shared_intermediate_size",))),
    mlp_hook_points={
        "experts": "block_sparse_moe.experts",
        "moe_ffn": "block_sparse_moe.experts",
        "shared_ffn": "shared_mlp.output_linear",
    },
    layer_lists=("layer_types", "layer_rope_theta"),
    least=(("experts", "num_experts_per_tok"),),
)
