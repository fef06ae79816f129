"""Measurements on real teachers: a table of arms, resumable runs, one JSON per arm, one table and one figure.

Run its modules from the repository root: `python -m benchmarks.real.teacher`, `.corpora`, `.run`, `.report`.
"""
