"""Phi-3 and Phi-4: q, k and v fused in one projection, gate and up in another."""

from dataclasses import replace

from .base import FUSED_GATED_MLP, SQUARE, decoder, layer_tables, linear

_FREE = decoder(
    "phi3",
    layer=layer_tables(
        linear("self_attn.qkv_proj", "heads*head_dim+kv*head_dim+kv*head_dim", "hidden"),
        linear("self_attn.o_proj", "hidden", "heads*head_dim"),
        FUSED_GATED_MLP,
    ),
)
# The stock config wants as many longrope factors as hidden_size / num_attention_heads gives, whatever head_dim says.
# So the two sizes are cut by the same ratio, and the factors stay.
SPEC = replace(_FREE, variants=(("rope_parameters.rope_type", "longrope", replace(_FREE, equal=SQUARE)),))
