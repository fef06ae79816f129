"""StableLM: Llama's layout with LayerNorm; the heads together are as wide as the hidden size."""

from .base import SQUARE, decoder

SPEC = decoder("stablelm", equal=SQUARE)
