"""Solar Open: in every layer experts chosen within groups, beside shared ones."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_MLP,
    GROUPED_ATTENTION,
    GROUPED_EXPERTS,
    MOE_FFN,
    ROUTED_EXPERTS,
    ROUTER_BIAS,
    ROUTER_GROUPS,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "solar_open",
    layer=layer_tables(GROUPED_ATTENTION, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    **{
        **GROUPED_EXPERTS,
        "mlp_axes": (ROUTED_EXPERTS, ROUTER_GROUPS, MOE_FFN, SHARED_EXPERTS, SHARED_EXPERTS_FFN),
        "mlp_hook_points": {"shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
        "leading_layers": (),
    },
)
