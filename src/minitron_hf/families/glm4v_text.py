"""GLM-4.1V's language model: GLM-4-0414's layout, its heads as wide together as the residual stream."""

from .base import FUSED_GATED_MLP, GROUPED_ATTENTION, SQUARE, decoder, layer_tables

SPEC = decoder(
    "glm4v_text",
    layer=layer_tables(GROUPED_ATTENTION, FUSED_GATED_MLP),
    output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    equal=SQUARE,
)
