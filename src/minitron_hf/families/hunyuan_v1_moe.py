"""Hunyuan, MoE: the dense one's attention; in every layer experts, and a shared one of the same width."""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_FFN,
    GROUPED_ATTENTION,
    SHARED_FFN,
    decoder,
    layer_tables,
    linear,
    norm,
    stacked_experts,
)

SPEC = decoder(
    "hunyuan_v1_moe",
    layer=layer_tables(
        GROUPED_ATTENTION,
        norm("self_attn.query_layernorm", "self_attn.key_layernorm", width="head_dim"),
        stacked_experts(router="gate.wg"),
        linear("mlp.shared_mlp.gate_proj", "shared_ffn", "hidden"),
        linear("mlp.shared_mlp.up_proj", "shared_ffn", "hidden"),
        linear("mlp.shared_mlp.down_proj", "hidden", "shared_ffn"),
    ),
    mlp_axes=(EXPERTS, EXPERTS_FFN, replace(SHARED_FFN, fields=(), implied="moe_ffn")),
    mlp_hook_points={"shared_ffn": "mlp.shared_mlp.down_proj", **EXPERT_HOOK_POINTS},
    equal=(("moe_ffn", "shared_ffn"),),
    layer_lists=("moe_topk",),
    least=(("experts", "moe_topk"),),
)
