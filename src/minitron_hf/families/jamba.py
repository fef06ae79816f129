"""Jamba: attention in one layer of a period, a state space as in Mamba in the others; experts in every second layer.

Every channel of a state space is a head of its own. Experts are as wide as the MLPs of the other layers.
"""

from .axes import Axis
from .base import EMBEDDINGS, EXPERTS, FFN, GROUPED_ATTENTION, decoder, layer_tables, linear, norm
from .rules import LayerRules
from .state_space import SSM_EXPAND, channel_state_space

SPEC = decoder(
    "jamba",
    layer=layer_tables(
        GROUPED_ATTENTION,
        channel_state_space("mamba", "ssm_heads"),
        norm("mamba.dt_layernorm", width="dt_rank"),
        norm("mamba.b_layernorm", "mamba.c_layernorm", width="ssm_state"),
        linear("feed_forward.gate_proj", "ffn", "hidden"),
        linear("feed_forward.up_proj", "ffn", "hidden"),
        linear("feed_forward.down_proj", "hidden", "ffn"),
        {
            "feed_forward.experts.gate_up_proj": "experts moe_ffn+moe_ffn hidden",
            "feed_forward.experts.down_proj": "experts hidden moe_ffn",
            "feed_forward.router.weight": "experts hidden",
        },
    ),
    mlp_axes=(
        FFN,
        EXPERTS,
        Axis("moe_ffn", implied="ffn", per_layer=True, within="experts"),
        SSM_EXPAND,
        Axis("ssm_heads", implied="ssm_expand*hidden", per_layer=True),
        Axis("ssm_state", ("mamba_d_state",), prunable=False),
        Axis("ssm_kernel", ("mamba_d_conv",), prunable=False),
        Axis("dt_rank", ("mamba_dt_rank",), prunable=False),
    ),
    mlp_hook_points={
        "ffn": "feed_forward.down_proj",
        "experts": "feed_forward.experts",
        "moe_ffn": "feed_forward.experts",
        "ssm_heads": "mamba.out_proj",
    },
    readers=(("ssm_heads", "mamba.x_proj"),),
    norms=("input_layernorm", "pre_ff_layernorm"),
    outer=layer_tables(EMBEDDINGS, norm("model.final_layernorm")),
    final_norm="model.final_layernorm",
    equal=(("moe_ffn", "ffn"), ("ssm_heads", "ssm_expand*hidden")),
    needed_kinds=(("layers_block_type", ("attention",)),),
    layer_rules=LayerRules(
        derived_kinds=(
            ("layers_block_type", "attn_layer_period and attn_layer_offset"),
            ("layers_num_experts", "expert_layer_period and expert_layer_offset"),
        )
    ),
    # A single expert would be an MLP.
    least=(("experts", "num_experts_per_tok"), ("experts", "2")),
)
