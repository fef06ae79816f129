"""Phi-3: q, k and v fused in one projection, gate and up in another."""

from .base import layer_tables, linear, pre_norm_decoder

SPEC = pre_norm_decoder(
    "phi3",
    layer=layer_tables(
        linear("self_attn.qkv_proj", "heads*head_dim+kv*head_dim+kv*head_dim", "hidden"),
        linear("self_attn.o_proj", "hidden", "heads*head_dim"),
        linear("mlp.gate_up_proj", "ffn+ffn", "hidden"),
        linear("mlp.down_proj", "hidden", "ffn"),
    ),
)
