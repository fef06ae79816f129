"""Bamba: attention in listed layers, a state space in the others, and a gated MLP in all of them."""

from .base import EMBEDDINGS, FFN, GROUPED_ATTENTION, decoder, layer_tables, linear, norm
from .rules import LayerRules
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
    "bamba",
    layer=layer_tables(
        GROUPED_ATTENTION,
        state_space("mamba"),
        linear("feed_forward.gate_proj", "ffn", "hidden"),
        linear("feed_forward.up_proj", "ffn", "hidden"),
        linear("feed_forward.down_proj", "hidden", "ffn"),
    ),
    mlp_axes=(FFN, SSM_EXPAND, *SSM_AXES),
    mlp_hook_points={"ffn": "feed_forward.down_proj", **ssm_hook_points("mamba")},
    norms=("input_layernorm", "pre_ff_layernorm"),
    outer=layer_tables(EMBEDDINGS, norm("model.final_layernorm")),
    final_norm="model.final_layernorm",
    groups=(("heads", "kv"), *SSM_GROUPS),
    gated_norms={"mamba.norm": "ssm_groups"},
    equal=SSM_WIDTH,
    refused=SSM_DIM_FOLLOWS,
    layer_rules=LayerRules(layer_indices=("attn_layer_indices",)),
    needed_kinds=(("layers_block_type", ("full_attention",)),),
)
