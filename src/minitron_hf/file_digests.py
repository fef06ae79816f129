"""Digests of the contents of files, computed once while these do not change."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import MinitronError
from .files import digest, file_digest, read_json, write_json

#: Digests of files from this size on are remembered on disk; smaller ones take no time.
CACHED_DIGEST_BYTES = 64 << 20


def cached_file_digest(path: str | os.PathLike[str]) -> str:
    """`file_digest`, computed once per unchanged file; for large files, once per machine.

    A file counts as unchanged while its size, inode and times are the same; the time of the last change of the inode
    cannot be set back by copying tools.
    """
    path = Path(path).resolve()
    return _digest_in_state(path, _state_of(path))


def weights_digest(folder: str | os.PathLike[str]) -> str | None:
    """Digest of the safetensors files of a model in a folder; None if there are none."""
    paths = sorted(Path(folder).glob("model*.safetensors"))
    return digest({path.name: cached_file_digest(path) for path in paths}) if paths else None


def cached_files_digest(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Digest of the contents of files in their order, without their names; remembered as `cached_file_digest`."""
    files = tuple(Path(path).resolve() for path in paths)
    return _files_digest_in_state(files, tuple(map(_state_of, files)))


@functools.cache
def _files_digest_in_state(paths: tuple[Path, ...], states: tuple[tuple[int, ...], ...]) -> str:
    def compute() -> str:
        return digest([file_digest(path) for path in paths])

    if sum(state[2] for state in states) < CACHED_DIGEST_BYTES:
        return compute()
    return _remembered(digest([str(path) for path in paths]), [digest(states)], compute)


@functools.cache
def _digest_in_state(path: Path, state: tuple[int, ...]) -> str:
    if state[2] < CACHED_DIGEST_BYTES:
        return file_digest(path)
    return _remembered(str(path), list(state), lambda: file_digest(path))


def _state_of(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _remembered(path: str, state: list[Any], compute: Callable[[], str]) -> str:
    """The digest that is remembered on this machine for a state of a path; otherwise computed, and remembered."""
    from huggingface_hub.constants import HF_HOME

    memory = Path(HF_HOME) / "minitron_hf" / "digests" / f"{digest(path).removeprefix('sha256:')}.json"
    with contextlib.suppress(MinitronError):
        remembered = read_json(memory)
        if remembered.get("state") == state:
            return str(remembered["digest"])
    value = compute()
    with contextlib.suppress(MinitronError):  # a cache that cannot be written is none
        write_json(memory, {"path": path, "state": state, "digest": value})
    return value
