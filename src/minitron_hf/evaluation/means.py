"""Means per token with standard errors over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_error(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Mean per token over documents of different lengths, and its standard error over documents.

    The mean is the ratio r = Σsᵢ/Σnᵢ of two sums over documents, so its standard error is the one of a ratio estimator
    (delta method): √(n/(n−1) · Σ(sᵢ − r·nᵢ)²) / Σnᵢ, with the tokens of one document as dependent as they are. It is
    the usual √(s²/n) when all documents have one length.

    Returns:
        (mean, standard error); the error of a single document is None.

    >>> mean_and_error([2.0, 6.0], [2, 2])
    (2.0, 1.0)
    """
    total = sum(counts)
    value = math.fsum(sums) / total
    if len(counts) < 2:
        return value, None
    squares = math.fsum((s - value * n) ** 2 for s, n in zip(sums, counts))
    return value, math.sqrt(squares * len(counts) / (len(counts) - 1)) / total


def with_error(value: float, stderr: float | None) -> str:
    """A value with its standard error; alone where there is none, as of a single row.

    >>> with_error(0.7312, 0.0123), with_error(0.7312, None), with_error(0.7312, math.nan)
    ('0.731 ± 0.012', '0.731', '0.731')
    """
    alone = stderr is None or math.isnan(stderr)
    return f"{value:.3f}" if alone else f"{value:.3f} ± {stderr:.3f}"
