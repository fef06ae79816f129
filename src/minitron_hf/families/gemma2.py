"""Gemma 2: Gemma with a second pair of norms on what attention and MLP write, and sliding attention by layer."""

from .base import decoder
from .rules import CAPPED_LOGITS, StreamRules

SPEC = decoder(
    "gemma2",
    logits=CAPPED_LOGITS,
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    stream=StreamRules(
        scaled_embeddings=True, stream_writers=("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    ),
    # The config insists on hidden_size % num_attention_heads == 0, though head_dim is a field of its own.
    multiples=(("hidden", "heads"),),
    layer_lists=("layer_types",),
)
