"""Gemma 3, text only: Gemma 2 with RMSNorm on every query and key head."""

from .base import GATED_MLP, GROUPED_ATTENTION, HEAD_NORMS, decoder, layer_tables
from .rules import CAPPED_LOGITS, StreamRules

SPEC = decoder(
    "gemma3_text",
    logits=CAPPED_LOGITS,
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, HEAD_NORMS),
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
