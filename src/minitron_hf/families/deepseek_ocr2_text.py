"""DeepSeek-OCR 2's language model: Llama's attention, and the experts of DeepSeek-V2 in a list of layers.

Its config derives the width of a head from the hidden size.
"""

from .base import (
    EXPERTS_MLP,
    GATED_MLP,
    GROUPED_ATTENTION,
    GROUPED_EXPERTS,
    SHARED_EXPERTS_MLP,
    SQUARE,
    decoder,
    layer_tables,
)

SPEC = decoder(
    "deepseek_ocr2_text",
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, EXPERTS_MLP, SHARED_EXPERTS_MLP),
    **{
        **GROUPED_EXPERTS,
        "equal": (*SQUARE, *GROUPED_EXPERTS["equal"]),
        "least": (("experts", "num_experts_per_tok"), ("experts", "num_experts_per_tok*n_group/topk_group")),
        "leading_layers": (),
    },
    layer_lists=("mlp_layer_types",),
)
