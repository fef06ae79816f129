"""StarCoder2: grouped attention, plain MLP, LayerNorm, biases everywhere."""

from .base import GROUPED_ATTENTION, decoder, layer_tables, linear

SPEC = decoder(
    "starcoder2",
    layer=layer_tables(GROUPED_ATTENTION, linear("mlp.c_fc", "ffn", "hidden"), linear("mlp.c_proj", "hidden", "ffn")),
    mlp_out="mlp.c_proj",
)
