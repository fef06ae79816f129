"""Paired comparison of models on the same documents.

Legend: n documents, a_i and b_i the values of two models on document i, d_i = a_i − b_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .means import mean_and_error


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Mean difference to a reference, document by document, with the standard error of paired differences.

    value = Σ d_i / n, stderr = √(Σ (d_i − value)² / (n (n − 1))). For right and wrong answers this is the error of
    McNemar's test: with `gained` documents that only the model has right and `lost` that only the reference has,
    value = (gained − lost) / n and stderr² = (gained + lost − (gained − lost)² / n) / (n (n − 1)).

    Args:
        values: the model's value on every document.
        reference: the reference's, in the same order.

    Returns:
        `value` and `stderr` (None for a single document); for values of 0 and 1 also `gained` and `lost`.

    >>> paired_difference([1, 1, 0, 0], [1, 0, 1, 1])["value"], paired_difference([1, 1], [1, 0])["gained"]
    (-0.25, 1)
    """
    differences = [float(one) - float(other) for one, other in zip(values, reference, strict=True)]
    value, stderr = mean_and_error(differences, [1] * len(differences))
    found: dict[str, Any] = {"value": value, "stderr": stderr}
    if {*values, *reference} <= {0, 1}:
        found["gained"] = sum(one > 0 for one in differences)
        found["lost"] = sum(one < 0 for one in differences)
    return found


def combined(parts: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """Weighted mean of independent parts; its standard error is √(Σ w_i² stderr_i²).

    Args:
        parts: each with `value` and `stderr`, and perhaps `gained` and `lost`.
        weights: of the parts; they are divided by their sum.

    >>> combined([{"value": 1.0, "stderr": 3.0}, {"value": 3.0, "stderr": 4.0}], [1, 1])
    {'value': 2.0, 'stderr': 2.5}
    """
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    errors = [part["stderr"] for part in parts]
    found: dict[str, Any] = {
        "value": math.fsum(share * part["value"] for share, part in zip(shares, parts, strict=True)),
        "stderr": None
        if None in errors
        else math.sqrt(math.fsum((share * error) ** 2 for share, error in zip(shares, errors))),
    }
    if all("gained" in part for part in parts):
        found |= {key: sum(part[key] for part in parts) for key in ("gained", "lost")}
    return found


def mean_of_means(values: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the mean over documents."""
    return math.fsum(math.fsum(task) / len(task) for task in values) / len(values)


def share_of(
    values: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
) -> dict[str, float | None] | None:
    """Average of a model over tasks as a share of the reference's average, with its standard error.

    The share is r = Σ_t ā_t / Σ_t b̄_t over tasks t. Its error is that of a ratio of paired means (delta method): the
    error of Σ_t mean(a_i − r·b_i), divided by Σ_t b̄_t. Documents are the only source of variation; the tasks are
    fixed.

    Args:
        values: the model's values on the documents of every task.
        reference: the reference's, in the same order.

    Returns:
        `value` and `stderr`; None where the reference's average is 0.

    >>> share_of([[1, 0, 1, 0]], [[1, 1, 1, 1]])["value"]
    0.5
    """
    count = len(reference)
    base = count * mean_of_means(reference)
    if base == 0:
        return None
    share = count * mean_of_means(values) / base
    errors = []
    for task, other in zip(values, reference, strict=True):
        rest = [a - share * b for a, b in zip(task, other, strict=True)]
        errors.append(mean_and_error(rest, [1] * len(rest))[1])
    known = [error for error in errors if error is not None]
    error = math.sqrt(math.fsum(one**2 for one in known)) / base if len(known) == len(errors) else None
    return {"value": share, "stderr": error}
