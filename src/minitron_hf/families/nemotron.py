"""Nemotron (Minitron): grouped attention, plain MLP with squared ReLU, LayerNorm weights stored minus one."""

from .base import GROUPED_ATTENTION, PLAIN_MLP, decoder, layer_tables

SPEC = decoder("nemotron", layer=layer_tables(GROUPED_ATTENTION, PLAIN_MLP), norm_offset=1.0)
