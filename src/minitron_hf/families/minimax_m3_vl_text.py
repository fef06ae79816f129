"""MiniMax-M3's language model: heads with norms; in some layers groups see blocks that an indexer head chooses."""

from dataclasses import replace

from .axes import Axis
from .base import (
    EXPERT_HOOK_POINTS,
    EXPERTS_MLP,
    FFN,
    FUSED_GATED_MLP,
    GROUPED_ATTENTION,
    HEAD_DIM,
    HEAD_NORMS,
    HEADS,
    KV,
    MOE_FFN,
    ROUTER_BIAS,
    SHARED_FFN,
    decoder,
    layer_tables,
    linear,
    norm,
)

SPEC = decoder(
    "minimax_m3_vl_text",
    layer=layer_tables(
        GROUPED_ATTENTION,
        HEAD_NORMS,
        linear("self_attn.indexer.q_proj", "kv*index_dim", "hidden"),
        linear("self_attn.indexer.k_proj", "index_dim", "hidden"),
        norm("self_attn.indexer.q_norm", "self_attn.indexer.k_norm", width="index_dim"),
        FUSED_GATED_MLP,
        EXPERTS_MLP,
        linear("mlp.shared_experts.gate_up_proj", "shared_ffn+shared_ffn", "hidden"),
        linear("mlp.shared_experts.down_proj", "hidden", "shared_ffn"),
        ROUTER_BIAS,
    ),
    attention_axes=(
        HEADS,
        replace(KV, fields=("num_key_value_heads", "index_n_heads")),  # the indexer has one head for every group
        HEAD_DIM,
        Axis("index_dim", ("index_head_dim",), prunable=False),
    ),
    mlp_axes=(
        replace(FFN, fields=("dense_intermediate_size",)),
        Axis("experts", ("num_local_experts",), per_layer=True),
        replace(MOE_FFN, fields=("intermediate_size",)),
        replace(SHARED_FFN, fields=("shared_intermediate_size",)),
    ),
    mlp_hook_points={"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_HOOK_POINTS},
    norm_offset=1.0,
    layer_lists=("layer_types", "mlp_layer_types"),
    least=(("experts", "num_experts_per_tok"),),
)
