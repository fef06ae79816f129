"""Qwen3: Llama's layout with RMSNorm on every query and key head, and full or sliding attention by layer."""

from .base import GATED_MLP, GROUPED_ATTENTION, layer_tables, norm, pre_norm_decoder

SPEC = pre_norm_decoder(
    "qwen3",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, norm("self_attn.q_norm", "self_attn.k_norm", width="head_dim")),
    layer_lists=("layer_types",),
    leading_layers=("max_window_layers",),
)
