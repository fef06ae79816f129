"""Gemma's later relatives: layers of several kinds, with embeddings of their own."""

from __future__ import annotations

from .base import Pocket, grouped, kinds

GEMMA4 = {
    "scaled_embeddings": True,
    "layer_types": kinds("sfsff"),
    "sliding_window": 6,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 7,
    "vocab_size_per_layer_input": 101,
}
EXPERTS = {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 14}

POCKETS: dict[str, Pocket] = {
    "gemma3n_text": grouped(
        "gemma3n_text",
        num_norms=7,
        output_norms=(
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "post_laurel_norm",
            "post_per_layer_input_norm",
            "router_norm",
        ),
        layer_types=kinds("sfsff"),
        sliding_window=6,
        hidden_size_per_layer_input=7,
        vocab_size_per_layer_input=89,
        laurel_rank=11,
        num_kv_shared_layers=0,
        attention_bias=True,
    ),
    "gemma4_unified_text": grouped(
        "gemma4_unified_text",
        num_norms=4,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        final_logit_softcapping=3.0,
        **{name: value for name, value in GEMMA4.items() if "per_layer" not in name},
    ),
    "gemma4_text": grouped(
        "gemma4_text",
        num_norms=5,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm"),
        final_logit_softcapping=3.0,
        **GEMMA4,
    ),
    "gemma4_text-experts": grouped(
        "gemma4_text",
        num_norms=9,
        output_norms=(
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "post_per_layer_input_norm",
        ),
        experts="experts",
        router="router.proj",
        enable_moe_block=True,
        attention_k_eq_v=True,
        **EXPERTS,
        **GEMMA4,
    ),
}
