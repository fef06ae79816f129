"""Paired differences of two arms with 95 % intervals, and the verdict on a claim.

Legend of the formulas: R rows, S seeds, d_rs the difference of two arms' sums over row r with seed s, n_r its tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minitron_hf.evaluation.means import mean_and_error

#: A difference within this fraction of the reference counts as none.
EQUIVALENCE = 0.02
CONFIDENCE = 0.95

Verdict = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True)
class Difference:
    """Mean of `other - reference` per token, and its interval.

    Attributes:
        value: the mean difference.
        low: lower end of the 95 % interval.
        high: upper end.
        reference: mean of the reference.
        num_seeds: number of seeds that both arms have; with one, the interval includes the variation over rows only.
        error: standard error of the value, from the same parts as the interval.
    """

    value: float
    low: float
    high: float
    reference: float
    num_seeds: int
    error: float

    @property
    def relative(self) -> tuple[float, float, float]:
        """Value, lower and upper end as parts of the reference."""
        scale = abs(self.reference)
        return self.value / scale, self.low / scale, self.high / scale


def paired_difference(
    other: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], counts: Sequence[int]
) -> Difference:
    """The difference of two arms that were measured on the same rows with the same seeds.

    The error has two parts: that of the rows, from differences averaged over the seeds (ratio estimator, see
    `mean_and_error`), and that of the seeds, from differences averaged over the rows, √(Var_s / S). Their variances
    are added. This counts variation shared by rows and seeds twice, so the interval is rather too wide. The interval
    is Student's t with the degrees of freedom of Welch and Satterthwaite.

    Args:
        other: sums over each row, [S][R].
        reference: likewise, of the arm that it is compared with.
        counts: tokens of each row, [R].
    """
    num_seeds, num_rows, total = len(other), len(counts), sum(counts)
    differences = [[a - b for a, b in zip(one, two, strict=True)] for one, two in zip(other, reference, strict=True)]
    by_row = [statistics.fmean(column) for column in zip(*differences)]
    value, row_error = mean_and_error(by_row, counts)
    parts = [((row_error or 0.0) ** 2, num_rows - 1)]
    if num_seeds > 1:
        by_seed = [math.fsum(row) / total for row in differences]
        parts.append((statistics.variance(by_seed) / num_seeds, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    if variance > 0:
        freedom = variance**2 / sum(part**2 / freedom for part, freedom in parts)
        half = t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    else:
        half = 0.0
    mean = statistics.fmean(math.fsum(row) / total for row in reference)
    return Difference(value, value - half, value + half, mean, num_seeds, math.sqrt(variance))


def verdict(difference: Difference, expect: str) -> Verdict:
    """The verdict on a claim, from the difference `better - than`.

    `"lower"`: confirmed where the whole interval is below 0; refuted where it is above 0 or within ±2 % of the
    reference around it. `"same"`: confirmed where it lies within ±2 %; refuted where it excludes 0 and does not.
    """
    _, low, high = difference.relative
    is_small = low >= -EQUIVALENCE and high <= EQUIVALENCE
    excludes_zero = low > 0 or high < 0
    if expect == "same":
        return "confirmed" if is_small else "refuted" if excludes_zero else "undecided"
    if high < 0:
        return "confirmed"
    return "refuted" if low > 0 or is_small else "undecided"


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t above the median, by bisection; 8 digits.

    >>> [round(t_quantile(0.975, freedom), 3) for freedom in (1, 2, 30, 1e6)]
    [12.706, 4.303, 2.042, 1.96]
    """
    low, high = 0.0, 1.0
    while _t_mass(high, freedom) < probability - 0.5:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_mass(middle, freedom) < probability - 0.5 else (low, middle)
    return (low + high) / 2


def _t_mass(end: float, freedom: float, steps: int = 400) -> float:
    """Probability between 0 and `end`: with t = √ν·tan(u) the density is smooth, cos(u)^(ν-1); Simpson's rule."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    width = math.atan(end / math.sqrt(freedom)) / steps
    heights = [math.cos(index * width) ** (freedom - 1) for index in range(steps + 1)]
    return scale * width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
