"""VaultGemma: Gemma 2 without the norms of what attention and MLP write."""

from .base import decoder
from .rules import CAPPED_LOGITS, StreamRules

SPEC = decoder(
    "vaultgemma",
    logits=CAPPED_LOGITS,
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    norm_offset=1.0,
    stream=StreamRules(
        scaled_embeddings=True,
        stream_writers=("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight"),
    ),
    # The config insists on hidden_size % num_attention_heads == 0, though head_dim is a field of its own.
    multiples=(("hidden", "heads"),),
    layer_lists=("layer_types",),
)
