"""OLMo 2: norms on what attention and MLP write instead of what they read, and RMSNorm over all query and key heads.

Where heads go, the norms over all of them are taken over those that stay.
"""

from .base import GATED_MLP, GROUPED_ATTENTION, WIDE_HEAD_NORMS, decoder, layer_tables

SPEC = decoder(
    "olmo2",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, WIDE_HEAD_NORMS),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
