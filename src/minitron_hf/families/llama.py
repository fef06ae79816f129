"""Llama: separate projections, grouped queries, gated MLP, RMSNorm, optional biases."""

from .base import AS_MISTRAL, beside, decoder

# LlamaConfig insists on hidden_size % num_attention_heads == 0 even where head_dim is given.
SPEC = decoder(
    "llama",
    multiples=(("hidden", "heads"),),
    sisters=AS_MISTRAL,
    wrappers=(beside("llava", "model.vision_tower", "model.multi_modal_projector"),),
)
