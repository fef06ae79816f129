"""Cohere (Command R): attention and MLP side by side after one LayerNorm without bias; optional norms per head."""

from .base import GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables
from .rules import COHERE_LOGITS

SPEC = decoder(
    "cohere",
    logits=COHERE_LOGITS,
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        {"self_attn.q_norm.weight": "heads head_dim", "self_attn.k_norm.weight": "kv head_dim"},
    ),
    norms=("input_layernorm",),
)
