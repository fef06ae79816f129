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
SHARED = {"shared_expert_intermediate_size": 22, "shared_out": "mlp.shared_expert.down_proj"}

POCKETS: dict[str, Pocket] = {
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
}
