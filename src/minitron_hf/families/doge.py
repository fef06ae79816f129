"""Doge: Llama's layout with a dynamic mask per key head, and weights on the residual stream; no experts."""

from .base import GATED_MLP, GROUPED_ATTENTION, HEAD_NORMS, decoder, layer_tables, linear

SPEC = decoder(
    "doge",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        HEAD_NORMS,
        linear("self_attn.dt_proj", "kv", "kv*head_dim"),
        {"self_attn.A": "kv", "input_residual": "hidden", "post_attention_residual": "hidden"},
    ),
    refused={"kv": "the mask of a key head is computed from the values of all key heads"},
    refused_if=(("is_moe", True, "*", "routing mixes the tokens of a batch"),),
)
