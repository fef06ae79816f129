"""Youtu: latent attention and a gated MLP."""

from .base import GATED_MLP, LATENT_ATTENTION, LATENT_AXES, decoder, layer_tables

SPEC = decoder("youtu", layer=layer_tables(LATENT_ATTENTION, GATED_MLP), attention_axes=LATENT_AXES)
