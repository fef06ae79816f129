"""LFM2: attention in some layers, short convolutions in the others; neurons are fewer than the config says."""

from .base import (
    CONV_DIM,
    CONV_KERNEL,
    LFM_ATTENTION,
    LFM_FFN,
    LFM_LAYOUT,
    LFM_MLP,
    SHORT_CONVOLUTION,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "lfm2",
    layer=layer_tables(LFM_ATTENTION, SHORT_CONVOLUTION, LFM_MLP),
    attention_out="self_attn.out_proj",
    mlp_axes=(LFM_FFN, CONV_DIM, CONV_KERNEL),
    mlp_hook_points={"ffn": "feed_forward.w2", "conv_dim": "conv.out_proj"},
    **LFM_LAYOUT,
)
