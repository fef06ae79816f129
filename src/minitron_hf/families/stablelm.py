"""StableLM: Llama's layout with LayerNorm; the heads together are as wide as the hidden size."""

from .base import decoder

SPEC = decoder("stablelm", equal=(("heads*head_dim", "hidden"),))
