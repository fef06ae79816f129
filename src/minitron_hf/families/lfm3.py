"""LFM3: LFM2 with full or sliding attention, a gate for every head, and norms after its sublayers too."""

from .base import (
    CONV_DIM,
    CONV_KERNEL,
    FFN,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    LFM_LAYOUT,
    LFM_MLP,
    SHORT_CONVOLUTION,
    decoder,
    layer_tables,
    linear,
)

SPEC = decoder(
    "lfm3",
    layer=layer_tables(
        GROUPED_ATTENTION, HEAD_NORMS, linear("self_attn.g_proj", "heads", "hidden"), SHORT_CONVOLUTION, LFM_MLP
    ),
    output_norms=("post_operator_norm", "post_ffn_norm"),
    mlp_axes=(FFN, CONV_DIM, CONV_KERNEL),
    mlp_hook_points={"ffn": "feed_forward.w2", "conv_dim": "conv.out_proj"},
    **LFM_LAYOUT,
)
