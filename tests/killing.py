"""Runs that are killed on purpose: before a file operation, in the middle of a write, or by a signal at some time.

Every run is a process that is forked from a warm one (`multiprocessing`'s fork server): a kill costs no import.
File operations below the watched folder are counted by an audit hook; writers outside Python (PyTorch, safetensors)
are counted by a wrapper.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Fields that say when or how fast something was done, in any published JSON file: the only ones that may differ
#: between a run that was interrupted and one that was not.
TIME_FIELDS = (
    "seconds",
    "train_runtime",
    "eval_runtime",
    "*_per_second",
    "*_seconds",
)
#: Files of a run folder that are no part of its result: records of stages, how training stood, and what draws
#: or lists measured times.
NOT_RESULTS = (
    "stages/",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "checkpoint.json",
    "search.png",
    "costs.json",
)

WARM = [
    "torch",
    "trl",
    "peft",
    "matplotlib.pyplot",
    "minitron_hf.cli.app",
    "minitron_hf.recipe.runner",
    "minitron_hf.recipe.training",
    "minitron_hf.distillation.trainer",
    "minitron_hf.distillation.correction",
    "minitron_hf.distillation.cache_writer",
    "minitron_hf.search.architectures",
    "minitron_hf.evaluation.evaluate",
    "minitron_hf.publishing.card",
]


@dataclass(frozen=True)
class Kill:
    """How a process dies.

    Attributes:
        at: before which file operation, counted from 0; None: none.
        torn: write half a file there first, where it is about to be written.
        after: seconds after which the signal comes; None: at the operation.
        signal: which one.
    """

    at: int | None = None
    torn: bool = False
    after: float | None = None
    signal: int = signal.SIGKILL


def run(action: Callable[..., None], arguments: Any, watched: Path, log: Path, kill: Kill | None = None) -> int:
    """Run an action in a process of its own, and return its exit code: −9 where it was killed.

    Args:
        action: a function of a module.
        arguments: what it is called with.
        watched: below which file operations count; they are listed in `log`, one a line.
        log: also receives what the process says, as `.txt`.
        kill: how it dies; None: not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    process = context.Process(target=_child, args=(action, arguments, str(watched), str(log), kill or Kill()))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code


def operations(log: Path) -> list[tuple[str, str]]:
    """The file operations of a run: what, and where."""
    return [tuple(line.split("\t")) for line in log.read_text().splitlines()]  # type: ignore[misc]


def _child(action: Callable[..., None], arguments: Any, watched: str, log: str, kill: Kill) -> None:
    gc.freeze()  # what the warm process has loaded stays: collecting it takes longer than all the rest
    said = os.open(f"{log}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _arm(watched, log, kill)
    try:
        action(arguments)
    except KeyboardInterrupt:
        os._exit(130)
    except SystemExit as error:
        os._exit(int(error.code or 0))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _arm(watched: str, log: str, kill: Kill) -> None:
    """Count file operations, and die at the one that was chosen."""
    listed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0
    inside = threading.local()

    def point(what: str, path: Any) -> None:
        nonlocal count
        if getattr(inside, "busy", False) or not isinstance(path, str | os.PathLike):
            return
        name = os.path.abspath(os.fspath(path))
        if not name.startswith(watched):
            return
        inside.busy = True
        os.write(listed, f"{what}\t{os.path.relpath(name, watched)}\n".encode())
        if count == kill.at:
            if kill.torn and what == "write":
                with open(name, "wb") as file:
                    file.write(b'{"half')
            os.kill(os.getpid(), kill.signal)
        count += 1
        inside.busy = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
            flags = args[2] if isinstance(args[2], int) else 0
            if writes or flags & (os.O_WRONLY | os.O_RDWR):
                point("write", args[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"):
            point(event.removeprefix("os."), args[0])

    _count_writers(point)
    sys.addaudithook(hook)
    if kill.after is not None:
        threading.Thread(target=_die_later, args=(kill,), daemon=True).start()


def _die_later(kill: Kill) -> None:
    assert kill.after is not None
    time.sleep(kill.after)
    os.kill(os.getpid(), kill.signal)


def _count_writers(point: Callable[[str, Any], None]) -> None:
    import safetensors.numpy
    import safetensors.torch
    import torch

    def counted(module: Any, name: str, position: int) -> None:
        write = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            point("write", args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f")))
            return write(*args, **kwargs)

        setattr(module, name, wrapper)

    counted(torch, "save", 1)
    counted(safetensors.torch, "serialize_file", 1)
    counted(safetensors.numpy, "serialize_file", 1)


# ---- Results ----


def results(folder: Path) -> dict[str, Any]:
    """Every file of a folder that is a result: its bytes, or the values of a JSON file without those of time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.startswith(NOT_RESULTS[0]) or path.name in NOT_RESULTS:
            continue
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text(encoding="utf-8")))
        else:
            found[name] = path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    """JSON values without `TIME_FIELDS`."""
    if isinstance(value, list):
        return [without_times(part) for part in value]
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if not _is_time(key)}
    return value


def _is_time(key: str) -> bool:
    ends = [field.removeprefix("*") for field in TIME_FIELDS if field.startswith("*")]
    return key in TIME_FIELDS or key.endswith(tuple(ends))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of files that only one of two folders has, or that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def restore(snapshot: Path, folder: Path) -> None:
    """Bring a folder back to a snapshot of it, which may be absent."""
    shutil.rmtree(folder, ignore_errors=True)
    if snapshot.exists():
        shutil.copytree(snapshot, folder, symlinks=True)


def kills(done: list[tuple[str, str]], indices: Iterable[int]) -> list[Kill]:
    """A kill before each of these operations; every third in the middle of the next write instead."""
    found: dict[Kill, None] = {}
    for number, index in enumerate(indices):
        write = next((i for i in range(index, len(done)) if done[i][0] == "write"), None)
        torn = number % 3 == 2 and write is not None
        found[Kill(write, torn=True) if torn else Kill(index)] = None
    return list(found)


def spread(indices: Iterable[int], count: int) -> list[int]:
    """At most `count` of the indices, spread evenly."""
    given = list(indices)
    return sorted({given[i * len(given) // count] for i in range(count)}) if len(given) > count else given
