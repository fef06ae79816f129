"""Beam: gated heads with norms; leading MLPs, then experts in groups; what layers read and write is normalised."""

from .base import (
    EXPERT_HOOK_POINTS,
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
    decoder,
    layer_tables,
    linear,
)
from .rules import CAPPED_LOGITS

SPEC = decoder(
    "beam",
    logits=CAPPED_LOGITS,
    layer=layer_tables(
        GROUPED_ATTENTION,
        HEAD_NORMS,
        linear("self_attn.gate_proj", "heads*head_dim", "hidden"),
        {"self_attn.gate_bias": "heads"},
        GATED_MLP,
        EXPERTS_MLP,
        ROUTER_BIAS,
    ),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    mlp_axes=(FFN, EXPERTS, ROUTER_GROUPS, MOE_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", **EXPERT_HOOK_POINTS},
    groups=GROUPED_EXPERTS["groups"],
    least=GROUPED_EXPERTS["least"],
    refused={"layers": "a layer scales its output and the residual stream by factors that depend on its index"},
)
