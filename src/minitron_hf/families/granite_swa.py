"""Granite with sliding windows: a sink for every query head; window and rotary base (or none) by layer."""

from .base import GATED_MLP, GROUPED_ATTENTION, decoder, layer_tables
from .rules import GRANITE_LOGITS

SPEC = decoder(
    "granite_swa",
    logits=GRANITE_LOGITS,
    layer=layer_tables(GROUPED_ATTENTION, GATED_MLP, {"self_attn.sinks": "heads"}),
    layer_lists=("layer_types", "layer_rope_theta"),
)
