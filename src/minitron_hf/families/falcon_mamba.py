"""Falcon-Mamba: Mamba with norms, which have no weights, over dt, B and C."""

from .state_space import mamba

SPEC = mamba("falcon_mamba")
