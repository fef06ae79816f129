"""BitNet: Llama's layout with a norm over all heads together, one over all neurons; full precision weights."""

from .base import GATED_MLP, GROUPED_ATTENTION, SQUARE, decoder, layer_tables, norm

SPEC = decoder(
    "bitnet",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        norm("self_attn.attn_sub_norm", width="heads*head_dim"),
        norm("mlp.ffn_sub_norm", width="ffn"),
    ),
    equal=SQUARE,
)
