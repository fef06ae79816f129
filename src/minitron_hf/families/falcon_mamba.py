"""Falcon-Mamba: Mamba with norms, which have no weights, over dt, B and C."""

from .base import mamba

SPEC = mamba("falcon_mamba")
