"""Apertus: RMSNorm on every query and key head; plain MLP whose activation (xIELU) has parameters of its own."""

from .base import GROUPED_ATTENTION, HEAD_NORMS, PLAIN_MLP, decoder, layer_tables

SPEC = decoder(
    "apertus",
    layer=layer_tables(
        GROUPED_ATTENTION,
        PLAIN_MLP,
        HEAD_NORMS,
        {"mlp.act_fn.alpha_p": "1", "mlp.act_fn.alpha_n": "1", "mlp.act_fn.beta": "", "mlp.act_fn.eps": ""},
    ),
    norms=("attention_layernorm", "feedforward_layernorm"),
)
