"""dots.llm1: Qwen3's attention; leading MLPs, then experts chosen within groups and shared ones."""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    GROUPED_ATTENTION,
    GROUPED_EXPERTS,
    HEAD_NORMS,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "dots1",
    layer=layer_tables(GROUPED_ATTENTION, HEAD_NORMS, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    layer_lists=("layer_types",),
    **{**GROUPED_EXPERTS, "leading_layers": ("first_k_dense_replace", "max_window_layers")},
)
