"""Decoders whose layers of attention stand among layers of linear attention or convolution."""

from __future__ import annotations

from .base import EXPERTS, Pocket, grouped, kinds

#: The gated delta rule: two keys of 7 dimensions for four values of 8. A layer of each kind is always left.
DELTA = {
    "layer_types": kinds("fllfl"),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 9,
}
#: The same in Qwen, beside attention that rotates six of ten dimensions.
QWEN = {**DELTA, "norm": "rms1p", "partial_rotary_factor": 0.6}
LFM = {
    "mlp_out": "feed_forward.w2",
    "conv_out": "conv.out_proj",
    "conv_L_cache": 4,
    "tie_word_embeddings": True,
}
SHARED = {"shared_expert_intermediate_size": 22, "shared_out": "mlp.shared_expert.down_proj"}

POCKETS: dict[str, Pocket] = {
    "minimax": grouped(
        "minimax",
        attention_out=None,
        mlp_out=None,
        kv=False,
        experts="mlp.experts",
        layer_types=kinds("lfllf"),
        num_local_experts=6,
        num_experts_per_tok=2,
        block_size=8,
        linear_attn_alpha_factor=0.7,
        full_attn_beta_factor=1.3,
        mlp_alpha_factor=0.9,
    ),
    # Dense layers are 52 wide, experts 14, and so is the shared one.
    "llama4_text": grouped(
        "llama4_text",
        intermediate_size=14,
        intermediate_size_mlp=52,
        num_local_experts=6,
        num_experts_per_tok=2,
        moe_layers=[1, 3, 4],
        no_rope_layers=[1, 0, 1, 0, 1],
        attention_chunk_size=6,
        floor_scale=4,
        attn_scale=0.5,
        attention_bias=True,
        mlp_out="feed_forward.down_proj",
        experts="feed_forward.experts",
        expert_inputs=0,
        router="feed_forward.router",
        shared_out="feed_forward.shared_expert.down_proj",
        shared_coupled=True,
    ),
    "qwen3_next": grouped(
        "qwen3_next",
        **QWEN,
        **EXPERTS,
        **SHARED,
        experts="mlp.experts",
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        attention_bias=True,
    ),
    "qwen3_5_text": grouped("qwen3_5_text", **QWEN),
    "qwen3_5_moe_text": grouped("qwen3_5_moe_text", **QWEN, **EXPERTS, **SHARED, mlp_out=None, experts="mlp.experts"),
    "olmo_hybrid": grouped(
        "olmo_hybrid", **DELTA, attention_bias=True, head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
    # 78 is rounded to 52 neurons: two thirds, and the next multiple of four.
    "lfm2": grouped(
        "lfm2",
        **{**LFM, "intermediate_size": 78},
        attention_out="self_attn.out_proj",
        layer_types=kinds("fccfc"),
        block_multiple_of=4,
        block_ffn_dim_multiplier=0.99,
    ),
    "lfm2_moe": grouped(
        "lfm2_moe",
        **LFM,
        **EXPERTS,
        attention_out="self_attn.out_proj",
        layer_types=kinds("fccfc"),
        num_dense_layers=2,
        experts="feed_forward.experts",
        router="feed_forward.gate",
        router_bias="feed_forward.expert_bias",
        routed_scaling_factor=1.7,
        published={"layer_types": kinds("ccfcccfcccfcccfcccfcccfcccfcccfc")},
    ),
    "lfm3": grouped(
        "lfm3",
        **LFM,
        layer_types=kinds("sccfs"),
        sliding_window=6,
        num_norms=4,
        output_norms=("post_operator_norm", "post_ffn_norm"),
        attention_bias=True,
        conv_bias=True,
    ),
}
