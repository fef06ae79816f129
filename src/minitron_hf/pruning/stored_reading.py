"""Reads chosen rows and columns of tensors in safetensors files, in blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UnsupportedModelError

#: Bytes to read and write at a time; a row of a tensor is never split.
BLOCK_BYTES = 32 << 20
#: A gap between kept rows is read over rather than skipped up to this many bytes: a disk reads as many in the time
#: that it takes to find a place.
_GAP_BYTES = 128 << 10
#: Single values are read in one piece if they span no more than this many bytes.
_SPAN_BYTES = 1 << 20

#: Positions wanted in each dimension: int64 arrays.
Index = list[np.ndarray]


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a checkpoint lies: row-major from byte `offset` of the file `path`."""

    path: Path
    offset: int


def take_box(tensor: torch.Tensor, index: Index) -> torch.Tensor:
    """All combinations of positions."""
    for dim, positions in enumerate(index):
        tensor = take(tensor, dim, positions)
    return tensor


def take(tensor: torch.Tensor, dim: int, positions: np.ndarray) -> torch.Tensor:
    """`index_select`; NumPy's is five times as fast within rows."""
    if _is_run(positions):
        return tensor.narrow(dim, int(positions[0]) if len(positions) else 0, len(positions))
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    taken = np.take(tensor.view(bits).numpy(), positions, axis=dim, mode="clip")
    return torch.from_numpy(taken).view(tensor.dtype)


def _is_run(positions: np.ndarray) -> bool:
    """Whether positions follow each other without a gap."""
    return bool((np.diff(positions) == 1).all())


def read_box(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype, index: Index) -> torch.Tensor:
    """Rows from the file, then positions within them."""
    if not shape:
        return next(read_ranges(stored, dtype, [(0, 1)])).reshape(())
    rows, within = index[0], index[1:]
    if (np.diff(rows) <= 0).any():
        ascending, back = np.unique(rows, return_inverse=True)
        return take(read_box(stored, shape, dtype, [ascending, *within]), 0, back)
    width = math.prod(shape[1:])
    row_bytes = dtype.itemsize * width
    gaps = (np.diff(rows) - 1) * row_bytes > _GAP_BYTES
    pieces = np.diff((rows - rows[0]) // max(1, BLOCK_BYTES // row_bytes)) > 0
    runs = np.split(rows, np.flatnonzero(gaps | pieces) + 1)
    parts = read_ranges(stored, dtype, [(int(run[0]) * width, int(run[-1] - run[0] + 1) * width) for run in runs])
    boxes = (take_box(part.view(-1, *shape[1:]), [run - run[0], *within]) for run, part in zip(runs, parts))
    if len(runs) == 1:
        return next(boxes)
    made = torch.empty([len(positions) for positions in index], dtype=dtype)
    done = 0
    for box in boxes:
        made[done : done + len(box)] = box
        done += len(box)
    return made


def read_points(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype, index: Index) -> torch.Tensor:
    """Single values; in one piece where they lie near each other."""
    positions = np.ravel_multi_index(tuple(index), shape) if shape else np.zeros(1, dtype=np.int64)
    low, span = int(positions.min()), int(np.ptp(positions)) + 1
    if span * dtype.itemsize <= _SPAN_BYTES:
        [values] = read_ranges(stored, dtype, [(low, span)])
        return take(values, 0, positions - low)
    return torch.cat(list(read_ranges(stored, dtype, [(position, 1) for position in positions.tolist()])))


def read_ranges(stored: Stored, dtype: torch.dtype, ranges: list[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """Values of a stored tensor: for each pair, as many as the second says, from number the first on."""
    size = dtype.itemsize
    with stored.path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            # A disk answers many requests at once sooner than one after another.
            for start, count in ranges:
                where = stored.offset + start * size
                os.posix_fadvise(file.fileno(), where, count * size, os.POSIX_FADV_WILLNEED)
        for start, count in ranges:
            made = torch.empty(count, dtype=dtype)
            buffer = made.view(torch.uint8).numpy().data
            file.seek(stored.offset + start * size)
            while len(buffer):
                got = file.readinto(buffer)
                if not got:
                    raise UnsupportedModelError(f"{stored.path} has become shorter while it was read. Copy it again.")
                buffer = buffer[got:]
            yield made
