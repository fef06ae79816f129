"""Mixtures of experts."""

from __future__ import annotations

from .base import EXPERTS, GROUPED_EXPERTS, SLIDING, Pocket, grouped

POCKETS: dict[str, Pocket] = {
    "mixtral": grouped(
        "mixtral", mlp_out=None, experts="mlp.experts", num_local_experts=6, num_experts_per_tok=2, sliding_window=6
    ),
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
}
