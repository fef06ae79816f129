"""GLM-OCR's language model: GLM-4-0414's layout."""

from .base import FUSED_GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables

SPEC = decoder(
    "glm_ocr_text",
    layer=layer_tables(GROUPED_ATTENTION, FUSED_GATED_MLP),
    output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
)
