"""State-space models, and hybrids of state space and attention."""

from __future__ import annotations

from .base import Pocket, grouped

#: Eight heads of seven channels in two groups. ssm_heads*ssm_dim=56. Rows of 19 tokens are more than two chunks.
SSM = {
    "mamba_n_heads": 8,
    "mamba_d_head": 7,
    "mamba_n_groups": 2,
    "mamba_d_state": 9,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
    "ssm_out": "mamba.out_proj",
    "ssm_norm": "mamba.norm",
    "ssm_heads": 8,
    "ssm_groups": 2,
}

POCKETS: dict[str, Pocket] = {
    "nemotron_h": grouped(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "full_attention"],
        attention_out="mixer.o_proj",
        mlp_out="mixer.down_proj",
        experts="mixer.experts",
        router="mixer.gate",
        router_bias="mixer.gate.e_score_correction_bias",
        shared_out="mixer.shared_experts.down_proj",
        ssm_out="mixer.out_proj",
        ssm_norm="mixer.norm",
        ssm_heads=8,
        ssm_groups=2,
        num_norms=1,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=14,
        moe_shared_expert_intermediate_size=22,
        mamba_num_heads=8,
        mamba_head_dim=7,
        n_groups=2,
        ssm_state_size=9,
        chunk_size=8,
    ),
    "falcon_h1": grouped(
        "falcon_h1",
        **SSM,
        mlp_out="feed_forward.down_proj",
        mamba_d_ssm=56,
        mamba_rms_norm=True,
        ssm_gate_first=False,
        key_multiplier=0.7,
        ssm_multipliers=[0.9, 1.1, 1.2, 0.8, 1.3],
        mlp_multipliers=[1.2, 0.8],
        tuple_layers=True,
    ),
}
