"""Qwen3-Next: gated attention in every fourth layer, the gated delta rule in the others; experts as in Qwen2-MoE."""

from .base import (
    DELTA_AXES,
    DELTA_RULE,
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GATED_QUERIES,
    GATED_SHARED_EXPERT,
    HEAD_DIM,
    HEAD_NORMS,
    HEADS,
    KV,
    MOE_FFN,
    NEEDS_FULL_ATTENTION,
    SHARED_FFN,
    decoder,
    layer_tables,
    linear,
    norm,
)
from .rules import LayerRules

SPEC = decoder(
    "qwen3_next",
    layer=layer_tables(
        GATED_QUERIES,
        HEAD_NORMS,
        DELTA_RULE,
        # Key head by key head: its query, its key, then the values and gates of the value heads that share it.
        linear("linear_attn.in_proj_qkvz", "2*linear_keys*linear_key_dim+2*linear_values*linear_value_dim", "hidden"),
        linear("linear_attn.in_proj_ba", "2*linear_values", "hidden"),
        linear("linear_attn.out_proj", "hidden", "linear_values*linear_value_dim"),
        norm("linear_attn.norm", width="linear_value_dim"),
        GATED_MLP,
        EXPERTS_MLP,
        GATED_SHARED_EXPERT,
    ),
    attention_axes=(HEADS, KV, HEAD_DIM, *DELTA_AXES),
    mlp_axes=(FFN, EXPERTS, MOE_FFN, SHARED_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_expert.down_proj", **EXPERT_HOOK_POINTS},
    layer_lists=("layer_types",),
    needed_kinds=NEEDS_FULL_ATTENTION,
    layer_rules=LayerRules(sparse_layers=(("mlp_only_layers", "decoder_sparse_step"),)),
    norm_offset=1.0,
    least=(("experts", "num_experts_per_tok"),),
)
