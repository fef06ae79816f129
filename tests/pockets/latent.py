"""Decoders with latent attention, or with the routers and indexers of their kin."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, Mistral4Config, Mistral4ForCausalLM

from .base import GROUPED, GROUPED_EXPERTS, YARN, Pocket, grouped, kinds, stock_config

# Transformers lists it among the models of images and text.
AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)

#: heads*head_dim=120, heads*qk_dim=288, heads*kv_dim=312, kv_rank+rope_dim=30.
LATENT = {
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "v_head_dim": 10,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 15,
    "kv_lora_rank": 22,
}


def latent(model_type: str, **changes) -> Pocket:
    """A family with latent attention; changes are fields of the pocket or of its config."""
    return grouped(model_type, **{"kv": False, "variants": ({"q_lora_rank": None},), **LATENT, **changes})


#: Which layers have experts, where the config lists them.
LISTED = {
    **GROUPED_EXPERTS,
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"],
}
#: Without queries of full rank.
COMPRESSED = {"variants": ()}
#: Three indexer heads of eleven dimensions choose six tokens for all others.
INDEXED = {
    **LISTED,
    **COMPRESSED,
    "index_n_heads": 3,
    "index_head_dim": 11,
    "index_topk": 6,
    "layer_types": ["indexed_attention"] * 5,
}
POCKETS: dict[str, Pocket] = {
    "youtu": latent("youtu", pad_token_id=None),  # the stock class zeroes its embedding, though loaded
    "minicpm3": latent("minicpm3", hidden_step=4, dim_model_base=9, attention_bias=True, mlp_bias=True),
    "deepseek_v2": latent(
        "deepseek_v2",
        **{**GROUPED_EXPERTS, "router_bias": None, "topk_method": "group_limited_greedy"},
        attention_bias=True,
        mlp_bias=True,
    ),
    "deepseek_v3": latent("deepseek_v3", **GROUPED_EXPERTS, attention_bias=True, num_mtp_layers=0),
    "mistral4": latent(
        "mistral4", **{**GROUPED_EXPERTS, "router_bias": None}, head_dim=24, rope_parameters=dict(YARN)
    ),
    "glm4_moe_lite": latent("glm4_moe_lite", **LISTED, num_mtp_layers=0),
    "axk1": latent("axk1", **LISTED, **COMPRESSED, extra_norms=3, output_norms=("mlp.post_mlp_layernorm",)),
    "deepseek_v32": latent("deepseek_v32", **INDEXED),
    "glm_moe_dsa": latent("glm_moe_dsa", **INDEXED, indexer_types=["full"] * 4 + ["shared"], tuple_layers=True),
    "beam": grouped(
        "beam",
        **{name: value for name, value in LISTED.items() if "shared" not in name and name != "n_routed_experts"},
        num_experts=6,
        layer_types=kinds("sfssf"),
        sliding_window=6,
        num_norms=4,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "hy_v4": latent(
        "hy_v4",
        **INDEXED,
        indexer_types=["full"] * 4 + ["shared"],
        tuple_layers=True,
        hc_mult=7,
        output_norms=("input_norm",),
        swiglu_limit=0.5,
    ),
    "minimax_m3_vl_text": grouped(
        "minimax_m3_vl_text",
        intermediate_size=14,
        dense_intermediate_size=52,
        shared_intermediate_size=22,
        num_local_experts=6,
        num_experts_per_tok=2,
        mlp_layer_types=LISTED["mlp_layer_types"],
        layer_types=[
            "full_attention",
            "minimax_m3_sparse",
            "minimax_m3_sparse",
            "full_attention",
            "minimax_m3_sparse",
        ],
        index_n_heads=3,
        index_head_dim=11,
        index_block_size=4,
        index_topk_blocks=2,
        swiglu_limit=0.5,
        norm="rms1p",
        mlp_out="mlp.down_proj",
        experts="mlp.experts",
        router_bias="mlp.gate.e_score_correction_bias",
        shared_out="mlp.shared_experts.down_proj",
    ),
    "longcat_flash": Pocket(
        stock_config(
            "longcat_flash",
            **{name: value for name, value in {**GROUPED, **LATENT}.items() if name != "num_hidden_layers"},
            num_layers=5,
            n_routed_experts=6,
            zero_expert_num=4,
            moe_topk=3,
            expert_ffn_hidden_size=14,
        ),
        attention_out="self_attn.0.o_proj",
        mlp_out="mlps.0.down_proj",
        router="mlp.router",
        experts="mlp.experts",
        kv=False,
        num_norms=4,
    ),
    "axk2": latent("axk2", **{**INDEXED, "n_group": None, "topk_group": None}, gated_norm_rank=17),
}
