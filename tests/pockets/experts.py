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

#: What the load is balanced by, and the shared experts: four, as wide as those that are routed to, or one.
SIGMOID = {
    "experts": "mlp.experts",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "shared_out": "mlp.shared_experts.down_proj",
}
SHARED = {
    "experts": "mlp.experts",
    "moe_intermediate_size": 14,
    "shared_out": "mlp.shared_experts.down_proj",
    "shared_coupled": True,
}
NAMED = {"num_experts": 6, "num_experts_per_tok": 2, "num_shared_experts": 4}
AFMOE = {
    **SHARED,
    **NAMED,
    "router": "mlp.router.gate",
    "router_bias": "mlp.expert_bias",
    "num_norms": 4,
    "output_norms": ("post_attention_layernorm", "post_mlp_layernorm"),
    "num_dense_layers": 2,
    "layer_types": kinds("sfsfs"),
    "sliding_window": 6,
    "route_scale": 1.7,
}


def sparse(letters: str) -> list[str]:
    """`mlp_layer_types` from initials: `d`ense or `s`parse."""
    return [{"d": "dense", "s": "sparse"}[letter] for letter in letters]


LAGUNA = {
    **EXPERTS,
    **SIGMOID,
    "shared_expert_intermediate_size": 22,
    "layer_types": kinds("fsfsf"),
    "mlp_layer_types": sparse("dsdss"),
    "sliding_window": 6,
    "moe_routed_scaling_factor": 1.7,
    "moe_router_logit_softcapping": 0.5,
}
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
    "dots1": grouped(
        "dots1",
        **GROUPED_EXPERTS,
        sliding_window=6,
        max_window_layers=3,
        published={"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    ),
    "exaone_moe": grouped(
        "exaone_moe",
        **{**GROUPED_EXPERTS, **NAMED},
        layer_types=kinds("sfsfs"),
        mlp_layer_types=sparse("dsdss"),
        sliding_window=6,
    ),
    "solar_open": grouped("solar_open", **{**GROUPED_EXPERTS, "mlp_out": None}, attention_bias=True),
    "cohere2_moe": grouped(
        "cohere2_moe",
        **{**SHARED, **NAMED, "intermediate_size": 14},
        prefix_dense_intermediate_size=52,
        norm="layer",
        num_norms=1,
        layer_types=kinds("fsfsf"),
        mlp_layer_types=sparse("dssds"),
        sliding_window=6,
        logit_scale=0.7,
        expert_selection_fn="sigmoid",
    ),
    "afmoe": grouped("afmoe", **AFMOE, scaled_embeddings=True, mup_enabled=True),
    "afmoe-plain": grouped("afmoe", **AFMOE),
    "laguna": grouped("laguna", **LAGUNA),
    "laguna-elements": grouped("laguna", **LAGUNA, gating="per-element"),
    "hy_v3": grouped(
        "hy_v3",
        **{**SHARED, **NAMED, "router_bias": "mlp.e_score_correction_bias"},
        mlp_layer_types=sparse("dsdss"),
        attention_bias=True,
        mlp_bias=True,
    ),
    "mellum": grouped(
        "mellum",
        **EXPERTS,
        experts="mlp.experts",
        layer_types=kinds("fsfsf"),
        mlp_layer_types=sparse("dsdss"),
        sliding_window=6,
    ),
    "kolibri1": grouped(
        "kolibri1",
        **{**EXPERTS, **SIGMOID, "mlp_out": None},
        num_norms=4,
        output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        shared_expert_intermediate_size=22,
        layer_types=kinds("sfsfs"),
        sliding_window=6,
    ),
    "flint": grouped(
        "flint",
        **EXPERTS,
        experts="mlp.experts",
        shared_out="mlp.shared_expert.down_proj",
        shared_expert_intermediate_size=22,
        layer_types=kinds("fsfsf"),
        mlp_only_layers=[0, 3],
        sliding_window=6,
    ),
    "ernie4_5_moe": grouped(
        "ernie4_5_moe",
        **{**SHARED, "router_bias": "mlp.gate.moe_statics.e_score_correction_bias"},
        moe_num_experts=6,
        moe_k=2,
        moe_num_shared_experts=4,
        moe_layer_start_index=1,
        moe_layer_end_index=3,
        use_bias=True,
    ),
    "hunyuan_v1_moe": grouped(
        "hunyuan_v1_moe",
        num_experts=6,
        moe_topk=[2, 1, 2, 2, 1],
        intermediate_size=14,
        mlp_out=None,
        experts="mlp.experts",
        router="mlp.gate.wg",
        shared_out="mlp.shared_mlp.down_proj",
        shared_coupled=True,
        published={"head_dim": 128},
    ),
    "aria_text": grouped(
        "aria_text",
        **{**SHARED, "mlp_out": None, "router": "mlp.router", "expert_inputs": 0},
        moe_num_experts=6,
        moe_topk=2,
        moe_num_shared_experts=4,
        intermediate_size=14,
    ),
}
