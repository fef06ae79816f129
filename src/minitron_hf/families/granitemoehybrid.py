"""Granite 4: attention or a state space, then experts beside a shared one, which is alone in the dense models."""

from .axes import Axis
from .base import GROUPED_ATTENTION, NEEDS_FULL_ATTENTION, decoder, layer_tables
from .rules import GRANITE_LOGITS
from .state_space import (
    SSM_AXES,
    SSM_DIM_FOLLOWS,
    SSM_EXPAND,
    SSM_GROUPS,
    SSM_WIDTH,
    ssm_hook_points,
    state_space,
)

SPEC = decoder(
    "granitemoehybrid",
    logits=GRANITE_LOGITS,
    layer=layer_tables(
        GROUPED_ATTENTION,
        state_space("mamba"),
        {
            "block_sparse_moe.experts.gate_up_proj": "experts moe_ffn+moe_ffn hidden",
            "block_sparse_moe.experts.down_proj": "experts hidden moe_ffn",
            "block_sparse_moe.router.weight": "experts hidden",
            "shared_mlp.input_linear.weight": "shared_ffn+shared_ffn hidden",
            "shared_mlp.output_linear.weight": "hidden shared_ffn",
        },
    ),
    mlp_axes=(
        Axis("experts", ("num_local_experts",), per_layer=True),
        Axis("moe_ffn", ("intermediate_size",), per_layer=True, within="experts"),
        Axis("shared_ffn", ("shared_intermediate_size",), per_layer=True),
        SSM_EXPAND,
        *SSM_AXES,
    ),
    mlp_hook_points={
        "experts": "block_sparse_moe.experts",
        "moe_ffn": "block_sparse_moe.experts",
        "shared_ffn": "shared_mlp.output_linear",
        **ssm_hook_points("mamba"),
    },
    groups=(("heads", "kv"), *SSM_GROUPS),
    gated_norms={"mamba.norm": "ssm_groups"},
    equal=SSM_WIDTH,
    refused=SSM_DIM_FOLLOWS,
    layer_lists=("layer_types",),
    needed_kinds=NEEDS_FULL_ATTENTION,
    least=(("experts", "num_experts_per_tok"),),
)
