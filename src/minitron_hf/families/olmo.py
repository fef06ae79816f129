"""OLMo: Llama's layout with LayerNorm that has no parameters."""

from .base import EMBEDDINGS, PRE_NORMS, decoder

SPEC = decoder("olmo", norms=(), layer_norms=PRE_NORMS, outer=EMBEDDINGS)
