"""The language model of Qwen2.5-Omni's thinker: Qwen2's layout, its heads as wide together as the residual stream."""

from .base import SQUARE, decoder

SPEC = decoder("qwen2_5_omni_text", equal=SQUARE, layer_lists=("layer_types",), leading_layers=("max_window_layers",))
