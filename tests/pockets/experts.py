"""Mixtures of experts."""

from __future__ import annotations

from .base import EXPERTS, GROUPED_COUPLED, GROUPED_EXPERTS, SLIDING, YARN, Pocket, coupled, grouped, kinds

#: Experts in every layer, six of 52 neurons; two to a token.
LOCAL = {"mlp_out": None, "experts": "mlp.experts", "num_local_experts": 6, "num_experts_per_tok": 2}
GRANITE = {
    **LOCAL,
    "experts": "block_sparse_moe.experts",
    "router": "block_sparse_moe.router",
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
GRANITE_SHARED = {**GRANITE, "shared_out": "shared_mlp.output_linear", "shared_intermediate_size": 22}

POCKETS: dict[str, Pocket] = {
    "mixtral": grouped("mixtral", **LOCAL, sliding_window=6),
    "qwen2_moe": grouped(
        "qwen2_moe",
        **EXPERTS,
        experts="mlp.experts",
        shared_out="mlp.shared_expert.down_proj",
        shared_expert_intermediate_size=22,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **SLIDING,
    ),
    "glm4_moe": grouped("glm4_moe", **GROUPED_EXPERTS, use_qk_norm=True, num_mtp_layers=0),
    "qwen3_moe": grouped(
        "qwen3_moe",
        **EXPERTS,
        experts="mlp.experts",
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        use_sliding_window=True,
        sliding_window=6,
    ),
    "gpt_oss": grouped(
        "gpt_oss",
        **LOCAL,
        router="mlp.router",
        expert_inputs=0,
        swiglu_limit=0.7,
        layer_types=kinds("sfsfs"),
        sliding_window=6,
        rope_parameters=YARN,
    ),
    "olmoe": coupled(
        "olmoe",
        {**GROUPED_COUPLED, "num_experts": 7},
        **{**LOCAL, "num_local_experts": 7},
        kv=True,
        norm="rms",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        clip_qkv=0.8,
    ),
    "flex_olmo": grouped(
        "flex_olmo", **LOCAL, norm_topk_prob=True, head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
    "minimax_m2": grouped(
        "minimax_m2",
        **LOCAL,
        router_bias="mlp.e_score_correction_bias",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        rotary_dim=6,
    ),
    "phimoe": grouped("phimoe", **LOCAL, router="mlp.router", norm="layer", sliding_window=6, attention_bias=True),
    "granitemoe": grouped("granitemoe", **GRANITE),
    "granitemoeshared": grouped("granitemoeshared", **GRANITE_SHARED),
    "granitemoe_swa": grouped(
        "granitemoe_swa",
        **GRANITE_SHARED,
        layer_types=kinds("fsssf"),
        layer_rope_theta=[10000.0, 0, 500.0, 10000.0, 0],
        sliding_window=6,
    ),
}
