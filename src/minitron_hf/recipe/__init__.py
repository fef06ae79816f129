"""Recipes: a YAML file → a run folder. The stages, the runner that skips and resumes them, several processes.

Only this room knows YAML. May import: everything above it.
"""
