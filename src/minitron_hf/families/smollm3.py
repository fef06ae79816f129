"""SmolLM3: Llama's layout; position by rotation and full or sliding attention are a matter of the layer."""

from .base import decoder

SPEC = decoder("smollm3", layer_lists=("layer_types", "no_rope_layers"))
