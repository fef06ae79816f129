"""The language model of Qwen3-Omni's thinker: Qwen3-MoE's layout."""

from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS,
    EXPERTS_MLP,
    FFN,
    GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    MOE_FFN,
    decoder,
    layer_tables,
)
from .rules import LayerRules

SPEC = decoder(
    "qwen3_omni_moe_text",
    layer=layer_tables(GROUPED_ATTENTION, HEAD_NORMS, GATED_MLP, EXPERTS_MLP),
    mlp_axes=(FFN, EXPERTS, MOE_FFN),
    mlp_hook_points={"ffn": "mlp.down_proj", **EXPERT_HOOK_POINTS},
    layer_rules=LayerRules(sparse_layers=(("mlp_only_layers", "decoder_sparse_step"),)),
    least=(("experts", "num_experts_per_tok"),),
)
