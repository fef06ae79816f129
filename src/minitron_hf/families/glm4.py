"""GLM-4-0414: GLM with a second pair of norms on what attention and MLP write."""

from .base import FUSED_GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables

SPEC = decoder(
    "glm4",
    layer=layer_tables(GROUPED_ATTENTION, FUSED_GATED_MLP),
    output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
)
