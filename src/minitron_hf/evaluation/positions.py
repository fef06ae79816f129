"""Quality by position in the row: shows whether a model uses a long context as well as its reference does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .means import mean_and_error

#: Positions of the first bucket; each further bucket is as long as all before it.
FIRST_BUCKET = 128


def bucket_of(position: int) -> int:
    """Number of the bucket that a position of a row lies in: 0–127, 128–255, 256–511, 512–1,023, …

    >>> [bucket_of(position) for position in (0, 127, 128, 255, 256, 1023, 1024)]
    [0, 0, 1, 1, 2, 3, 4]
    """
    return (position // FIRST_BUCKET).bit_length()


def bucket_range(bucket: int) -> tuple[int, int]:
    """First position of a bucket, and the position behind its last.

    >>> bucket_range(0), bucket_range(1), bucket_range(3)
    ((0, 128), (128, 256), (512, 1024))
    """
    return (FIRST_BUCKET << (bucket - 1) if bucket else 0, FIRST_BUCKET << bucket)


class PositionSums:
    """Sums of a quantity over the predictions of each row and bucket."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}
        self._counts: dict[int, list[int]] = {}

    def add(self, positions: Sequence[int], values: torch.Tensor) -> None:
        """Add a row.

        Args:
            positions: positions of the predicted tokens in the row.
            values: the quantity of each, float64 [T].
        """
        buckets = torch.tensor([bucket_of(position) for position in positions])
        for bucket in buckets.unique().tolist():
            chosen = buckets == bucket
            self._sums.setdefault(bucket, []).append(values[chosen].sum().item())
            self._counts.setdefault(bucket, []).append(int(chosen.sum()))

    def means(self) -> dict[int, dict[str, Any]]:
        """Bucket → mean per token, its standard error over rows, and the number of tokens."""
        found = {}
        for bucket, sums in sorted(self._sums.items()):
            value, stderr = mean_and_error(sums, self._counts[bucket])
            found[bucket] = {"value": value, "stderr": stderr, "num_tokens": sum(self._counts[bucket])}
        return found


def by_position(**quantities: PositionSums) -> list[dict[str, Any]]:
    """The buckets with the mean of every quantity; empty if all rows end in the first bucket.

    Args:
        **quantities: name → sums; those without rows are left out.
    """
    means = {name: sums.means() for name, sums in quantities.items()}
    buckets = sorted(set().union(*means.values()))
    if buckets[-1:] in ([], [0]):
        return []
    table = []
    for bucket in buckets:
        begin, end = bucket_range(bucket)
        found = {name: dict(one[bucket]) for name, one in means.items() if bucket in one}
        counts = [one.pop("num_tokens") for one in found.values()]
        table.append({"begin": begin, "end": end, "num_tokens": counts[0], **found})
    return table
