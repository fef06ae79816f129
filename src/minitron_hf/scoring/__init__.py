"""Importance scores: calibration data and a model → a score for every unit, channel and layer.

Belongs here: metrics and their reductions, the observers that collect activations, depth rankings.
May import: `errors`, `files`, `data`, `models`, `hardware`, `compat`, `families`, `sizes`.
"""
