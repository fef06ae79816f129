"""Distillation: `DistillationTrainer` and its config, teacher correction, precomputed teacher logits, capacity.

May import: everything above it, except `survey`.
"""
