"""Counts of parameters of several models, side by side; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Counts of parameters → their titles in tables.
TITLES = {
    "num_parameters": "parameters",
    "num_active_parameters": "active parameters",
    "num_language_model_parameters": "of the language model",
    "num_parameters_without_embeddings": "without embeddings",
}


def compared_counts(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Every count → the value of each model. Active parameters are left out where no model routes experts.

    Args:
        counts: name of a model → what `parameter_counts` gives, among other values.
    """
    compared = {key: {name: one[key] for name, one in counts.items()} for key in TITLES if _all_have(counts, key)}
    if compared.get("num_active_parameters") == compared["num_parameters"]:
        del compared["num_active_parameters"]
    return compared


def _all_have(counts: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    return all(key in one for one in counts.values())
