"""State-space models, and hybrids of state space and attention."""

from __future__ import annotations

from .base import COUPLED, Pocket, grouped, kinds, stock_config

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

#: Nine heads of eight channels, together twice as wide as the residual stream.
SSM_COUPLED = {
    **SSM,
    "mamba_n_heads": 9,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 7,
    "ssm_heads": 9,
    "ssm_groups": 1,
    "ssm_coupled": True,
    "hidden_step": 4,
}


def recurrent(model_type: str, **changes) -> Pocket:
    """A family without attention; changes are fields of the pocket or of its config."""
    known = {name: changes.pop(name) for name in Pocket.__dataclass_fields__ if name in changes}
    config = stock_config(model_type, **COUPLED, hidden_size=36, num_hidden_layers=5, **changes)
    return Pocket(config, layers="backbone.layers", attention_out=None, kv=False, num_norms=1, **known)


#: Channels with states of their own.
CHANNELS = {
    "intermediate_size": 52,
    "state_size": 9,
    "conv_kernel": 4,
    "time_step_rank": 3,
    "mlp_out": "mixer.out_proj",
    "mlp_reader": "mixer.x_proj",
}

NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "full_attention"],
    "attention_out": "mixer.o_proj",
    "mlp_out": "mixer.down_proj",
    "experts": "mixer.experts",
    "router": "mixer.gate",
    "router_bias": "mixer.gate.e_score_correction_bias",
    "shared_out": "mixer.shared_experts.down_proj",
    "ssm_out": "mixer.out_proj",
    "ssm_norm": "mixer.norm",
    "ssm_heads": 8,
    "ssm_groups": 2,
    "num_norms": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 22,
    "mamba_num_heads": 8,
    "mamba_head_dim": 7,
    "n_groups": 2,
    "ssm_state_size": 9,
    "chunk_size": 8,
}

POCKETS: dict[str, Pocket] = {
    "nemotron_h": grouped("nemotron_h", **NEMOTRON_H),
    "nemotron_h-latent": grouped("nemotron_h", **NEMOTRON_H, moe_latent_size=20),
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
    "bamba": grouped(
        "bamba",
        **SSM_COUPLED,
        mlp_out="feed_forward.down_proj",
        attn_layer_indices=[2, 4],
        tuple_layers=True,
        published={"attn_layer_indices": [9, 18, 27]},
    ),
    "granitemoehybrid": grouped(
        "granitemoehybrid",
        **{**SSM_COUPLED, "intermediate_size": 14},
        mlp_out=None,
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.router",
        shared_out="shared_mlp.output_linear",
        num_local_experts=6,
        num_experts_per_tok=2,
        shared_intermediate_size=22,
        layer_types=kinds("llflf"),
        position_embedding_type="rope",
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        embedding_multiplier=1.3,
        logits_scaling=0.8,
        published={
            "layer_types": ["full_attention" if layer % 10 == 5 else "linear_attention" for layer in range(32)]
        },
    ),
    "jamba": grouped(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=0,
        num_experts=6,
        num_experts_per_tok=2,
        mamba_expand=2,
        mamba_d_state=9,
        mamba_d_conv=4,
        mamba_dt_rank=7,
        mlp_out="feed_forward.down_proj",
        experts="feed_forward.experts",
        experts_coupled=True,
        router="feed_forward.router",
        ssm_out="mamba.out_proj",
        ssm_reader="mamba.x_proj",
        ssm_coupled=True,
        depths={"layer block": {"num_hidden_layers": 3}, "single layers": {"layers_to_drop": [0, 1]}},
    ),
    "mamba2": recurrent(
        "mamba2",
        num_heads=18,
        head_dim=8,
        expand=4,
        n_groups=2,
        state_size=7,
        conv_kernel=3,
        chunk_size=8,
        mlp_out=None,
        ssm_out="mixer.out_proj",
        ssm_norm="mixer.norm",
        ssm_heads=18,
        ssm_groups=2,
        ssm_coupled=True,
        hidden_step=4,
    ),
    "mamba": recurrent("mamba", **CHANNELS),
    "falcon_mamba": recurrent("falcon_mamba", **CHANNELS),
}
