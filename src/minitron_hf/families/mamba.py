"""Mamba: nothing but state-space layers, whose channels (`intermediate_size`) each have a state of their own."""

from .state_space import mamba

SPEC = mamba("mamba")
