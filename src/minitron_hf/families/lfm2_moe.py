"""LFM2 with experts in all layers but the first ones."""

from .base import (
    CONV_DIM,
    CONV_KERNEL,
    EXPERTS,
    FFN,
    LFM_ATTENTION,
    LFM_LAYOUT,
    LFM_MLP,
    MOE_FFN,
    SHORT_CONVOLUTION,
    decoder,
    layer_tables,
    linear,
)

SPEC = decoder(
    "lfm2_moe",
    layer=layer_tables(
        LFM_ATTENTION,
        SHORT_CONVOLUTION,
        LFM_MLP,
        {
            "feed_forward.experts.gate_up_proj": "experts moe_ffn+moe_ffn hidden",
            "feed_forward.experts.down_proj": "experts hidden moe_ffn",
            "feed_forward.expert_bias": "experts",
        },
        linear("feed_forward.gate", "experts", "hidden"),
    ),
    attention_out="self_attn.out_proj",
    mlp_axes=(FFN, CONV_DIM, CONV_KERNEL, EXPERTS, MOE_FFN),
    mlp_hook_points={
        "ffn": "feed_forward.w2",
        "conv_dim": "conv.out_proj",
        "experts": "feed_forward.experts",
        "moe_ffn": "feed_forward.experts",
    },
    leading_layers=("num_dense_layers",),
    least=(("experts", "num_experts_per_tok"),),
    **LFM_LAYOUT,
)
