"""Helpers of all benchmarks: the command of a run, the spread over seeds, and the memory of a process."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from pathlib import Path


def command(arguments: argparse.Namespace, *, together: tuple[str, ...] = ()) -> str:
    """The command line of this run, with the folder of test data as a variable.

    Args:
        arguments: the parsed arguments.
        together: options whose values follow one flag; other options repeat the flag for every value.
    """
    words = [f"python benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(arguments).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if name != "output":
            flag = f"--{name.replace('_', '-')}"
            given = ["" if each is True else shlex.quote(str(each)) for each in values if each]
            if name in together and given:
                words += [flag, *given]
            else:
                words += [word for each in given for word in (flag, each)]
    folder = os.environ.get("MINITRON_TEST_DATA")
    words = [word for word in words if word]
    return " ".join(words) if not folder else " ".join(words).replace(folder.rstrip("/"), "$MINITRON_TEST_DATA")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def peak_memory() -> int:
    """Peak memory of this process in bytes. `ru_maxrss` would include the parent's peak."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024
