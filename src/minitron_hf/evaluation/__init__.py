"""Evaluation: quality on text, benchmark tasks, speed, memory and sample continuations of models side by side.

Belongs here: anything that measures finished models. The `evaluate` metrics are in `metrics/`.
May import: `errors`, `files`, `data`, `models`, `hardware`, `compat`, `families`.
"""
