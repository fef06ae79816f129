"""DiffLlama: Llama's layout whose attention is the difference of two; how much of one depends on the layer's index."""

from .base import GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables

HALVES = "attention subtracts each head of the second half from a head of the first half, and the halves share values"

SPEC = decoder(
    "diffllama",
    layer=layer_tables(
        GROUPED_ATTENTION,
        GATED_MLP,
        {
            "self_attn.lambda_q1": "head_dim",
            "self_attn.lambda_k1": "head_dim",
            "self_attn.lambda_q2": "head_dim",
            "self_attn.lambda_k2": "head_dim",
        },
    ),
    bare_norms=True,
    refused={
        "layers": "the subtracted attention is scaled by the layer's index, which changes when layers are dropped",
        "heads": HALVES,
        "kv": HALVES,
    },
)
