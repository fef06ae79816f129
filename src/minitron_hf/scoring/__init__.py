"""Importance scores: calibration data and a model → a score for every unit, channel and layer.

Belongs here: metrics and their registry, reductions, the passes that observe a model, scores of layers.
May import: `errors`, `files`, `data`, `models`, `hardware`, `compat`, `families`, `sizes`.
"""
