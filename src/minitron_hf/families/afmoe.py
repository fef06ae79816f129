"""AFMoE (Trinity): gated heads, norms around attention and MLP; leading MLPs, then experts and shared ones."""

from dataclasses import replace

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    MOE_FFN,
    SHARED_EXPERTS,
    SHARED_EXPERTS_FFN,
    SHARED_EXPERTS_MLP,
    decoder,
    layer_tables,
    linear,
    stacked_experts,
)
from .rules import StreamRules

PLAIN = decoder(
    "afmoe",
    layer=layer_tables(
        GROUPED_ATTENTION,
        linear("self_attn.gate_proj", "heads*head_dim", "hidden"),
        HEAD_NORMS,
        GATED_MLP,
        stacked_experts(router="router.gate"),
        {"mlp.expert_bias": "experts"},
        SHARED_EXPERTS_MLP,
    ),
    norms=("input_layernorm", "pre_mlp_layernorm"),
    output_norms=("post_attention_layernorm", "post_mlp_layernorm"),
    mlp_axes=(
        FFN,
        EXPERTS,
        MOE_FFN,
        replace(SHARED_EXPERTS, fields=("num_shared_experts",)),
        SHARED_EXPERTS_FFN,
    ),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    equal=(("shared_experts*moe_ffn", "shared_ffn"),),
    layer_lists=("layer_types",),
    leading_layers=("num_dense_layers",),
    least=(("experts", "num_experts_per_tok"),),
)
SPEC = replace(
    PLAIN,
    variants=(
        (
            "mup_enabled",
            True,
            replace(
                PLAIN,
                stream=StreamRules(
                    scaled_embeddings=True,
                    stream_writers=("post_attention_layernorm.weight", "post_mlp_layernorm.weight"),
                ),
            ),
        ),
    ),
)
