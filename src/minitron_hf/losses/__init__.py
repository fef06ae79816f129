"""Distillation losses: divergences between teacher and student, fused with both output heads over token chunks.

Belongs here: tensors in, per-token losses and gradients out. No trainer, no files.
May import: `errors`, `compat`.
"""
