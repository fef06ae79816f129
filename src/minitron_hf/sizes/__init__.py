"""Sizes: a request (`PrunerConfig`) → legal sizes, the student's config, shapes within a budget.

Belongs here: everything that needs configs only. No weights, no data.
May import: `errors`, `files`, `models`, `families`.
"""
