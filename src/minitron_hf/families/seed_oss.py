"""Seed-OSS: Llama's layout with biases on q, k and v, and others by flag."""

from .base import decoder

SPEC = decoder("seed_oss")
