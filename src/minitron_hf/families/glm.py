"""GLM: grouped attention with biases on q, k and v; gate and up fused in one projection."""

from .base import FUSED_GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables

SPEC = decoder("glm", layer=layer_tables(GROUPED_ATTENTION, FUSED_GATED_MLP))
