"""Mamba: nothing but state-space layers, whose channels (`intermediate_size`) each have a state of their own."""

from .base import mamba

SPEC = mamba("mamba")
