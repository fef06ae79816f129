"""Measures what a stage takes, and keeps it beside the estimate in `costs.json`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats import read_artefact, write_artefact

if TYPE_CHECKING:
    from .estimates import Estimate

#: Estimate and measurement of every stage, in the run folder.
COSTS_NAME = "costs.json"
#: Resets and tells the peak memory of a process on Linux.
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Usage:
    """What a stage took.

    Attributes:
        seconds: time; of a stage that was resumed that of all parts (`earlier_seconds`).
        peak_memory_bytes: peak memory of this process: on an accelerator what PyTorch allocated, else resident memory,
            libraries included. None where the system does not tell it.
        bytes_written: bytes of the files in the run folder that are newer than the start of the stage.
    """

    seconds: float | None = None
    peak_memory_bytes: int | None = None
    bytes_written: int | None = None


@contextlib.contextmanager
def measured_usage(folder: Path) -> Iterator[Usage]:
    """Measure the body; the result is complete when it has ended.

    Args:
        folder: run folder.
    """
    usage, began, start = Usage(), time.time(), time.monotonic()
    resettable = _reset_peak()
    yield usage
    usage.seconds = round(time.monotonic() - start, 2)
    usage.peak_memory_bytes = _peak() if resettable else None
    files = (path.stat() for path in folder.rglob("*") if path.is_file())
    usage.bytes_written = sum(file.st_size for file in files if file.st_mtime >= began - 0.01)


def earlier_seconds(record: Path, known: float | None, checkpoints: Iterable[Path]) -> float:
    """Seconds of the parts of a stage that were interrupted, up to the last checkpoint of each.

    Args:
        record: file of the stage's record, which was written when the last of them began.
        known: seconds of the parts before it.
        checkpoints: what they left.
    """
    began = record.stat().st_mtime
    files = (file for path in checkpoints for file in (path, *path.rglob("*")) if file.is_file())
    return (known or 0.0) + max([0.0, *(file.stat().st_mtime - began for file in files)])


def _reset_peak() -> bool:
    """Whether the peak memory could be set to what is used now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def write_estimate(folder: Path, estimate: Estimate) -> None:
    """Keep an estimate in the run folder, beside what the stages took that are done already."""
    write_artefact(folder / COSTS_NAME, {"estimate": estimate.to_dict(), "stages": read_costs(folder)["stages"]})


def read_costs(folder: Path) -> dict[str, Any]:
    """The content of `costs.json`; without an estimate where there is none."""
    path = folder / COSTS_NAME
    return read_artefact(path) if path.is_file() else {"estimate": None, "stages": []}


def write_costs(folder: Path, records: list[dict[str, Any]]) -> None:
    """Add what the stages took.

    Args:
        folder: run folder.
        records: records of the stages, in their order.
    """
    names = ("stage", "seconds", "peak_memory_bytes", "bytes_written")
    stages = [{name: record.get(name) for name in names} for record in records]
    write_artefact(folder / COSTS_NAME, {"estimate": read_costs(folder)["estimate"], "stages": stages})
