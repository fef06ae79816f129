"""Gemma: Llama's layout, norm weights stored minus one, embeddings multiplied by √hidden_size."""

from .base import decoder
from .rules import StreamRules

SPEC = decoder(
    "gemma",
    norm_offset=1.0,
    stream=StreamRules(
        scaled_embeddings=True,
        stream_writers=("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight"),
    ),
)
