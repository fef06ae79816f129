"""Kolibri 1: EXAONE 4's attention, norms around attention and MLP; experts and a shared one in every layer."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    LOCAL_EXPERTS,
    MOE_FFN,
    ROUTER_BIAS,
    SHARED_EXPERTS_MLP,
    SHARED_FFN,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "kolibri1",
    layer=layer_tables(GROUPED_ATTENTION, HEAD_NORMS, EXPERTS_MLP, SHARED_EXPERTS_MLP, ROUTER_BIAS),
    output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    mlp_axes=(LOCAL_EXPERTS, MOE_FFN, SHARED_FFN),
    mlp_hook_points={"shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types",),
    least=(("experts", "num_experts_per_tok"),),
)
