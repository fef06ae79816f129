"""Phi-3: q, k and v fused in one projection, gate and up in another."""

from .base import FUSED_GATED_MLP, decoder, layer_tables, linear

SPEC = decoder(
    "phi3",
    layer=layer_tables(
        linear("self_attn.qkv_proj", "heads*head_dim+kv*head_dim+kv*head_dim", "hidden"),
        linear("self_attn.o_proj", "hidden", "heads*head_dim"),
        FUSED_GATED_MLP,
    ),
)
