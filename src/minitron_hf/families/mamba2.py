"""Mamba-2: nothing but state-space layers, together `expand` times as wide as the residual stream."""

from dataclasses import replace

from .base import HIDDEN, LAYERS, VOCAB, layer_tables, norm
from .spec import ArchSpec
from .state_space import (
    RECURRENT_OUTER,
    SSM_DIM_FOLLOWS,
    SSM_EXPAND,
    SSM_GROUPS,
    SSM_WIDTH,
    ssm_axes,
    ssm_hook_points,
    state_space,
)

SPEC = ArchSpec(
    model_type="mamba2",
    axes=(
        LAYERS,
        HIDDEN,
        replace(SSM_EXPAND, fields=("expand",)),
        *ssm_axes("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
        VOCAB,
    ),
    layers_path="backbone.layers",
    outer=RECURRENT_OUTER,
    layer=layer_tables(norm("norm"), state_space("mixer")),
    hook_points=ssm_hook_points("mixer"),
    layer_norms=("norm",),
    final_norm="backbone.norm_f",
    groups=SSM_GROUPS,
    gated_norms={"mixer.norm": "ssm_groups"},
    equal=SSM_WIDTH,
    refused=SSM_DIM_FOLLOWS,
)
