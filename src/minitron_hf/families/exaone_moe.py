"""EXAONE-MoE: EXAONE 4's attention; experts chosen within groups beside shared ones, or a plain MLP, by layer."""

from dataclasses import replace

from .base import (
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    GROUPED_EXPERTS,
    HEAD_NORMS,
    MOE_FFN,
    ROUTER_BIAS,
    ROUTER_GROUPS,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "exaone_moe",
    layer=layer_tables(GROUPED_ATTENTION, HEAD_NORMS, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    layer_lists=("layer_types", "mlp_layer_types"),
    **{
        **GROUPED_EXPERTS,
        "mlp_axes": (
            FFN,
            EXPERTS,
            ROUTER_GROUPS,
            MOE_FFN,
            replace(SHARED_EXPERTS, fields=("num_shared_experts",)),
            SHARED_EXPERTS_FFN,
        ),
    },
)
