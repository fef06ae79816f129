"""Locks a folder for one run at a time. The operating system releases the lock when the processes end."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from .errors import OutputError
from .files import LOCK_NAME as LOCK_NAME
from .files import is_running, remove_abandoned

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
T = TypeVar("T")

#: Environment variable that tells processes started by this one which folders it holds for them.
_HELD_FOR_CHILDREN = "MINITRON_HF_LOCKED"
#: Folder → descriptor of its lock file, of this process.
_held: dict[Path, int] = {}


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for one run, and remove unfinished files that killed runs left in it.

    A folder within one that is held already, by this process or by the one that started it, is held with it. Of
    several processes of one launcher, the first one locks for all.

    Raises:
        OutputError: if another run holds the folder.
    """
    folder = Path(folder).resolve()
    if not is_main_process() or _is_held(folder):
        yield
        return
    is_new = not folder.exists()
    descriptor = _acquire(folder)
    if descriptor is None:
        yield
        return
    _held[folder] = descriptor
    before = os.environ.get(_HELD_FOR_CHILDREN)
    os.environ[_HELD_FOR_CHILDREN] = os.pathsep.join([*([before] if before else []), str(folder)])
    try:
        remove_abandoned(folder, alone=launched_processes() == 1)
        yield
    finally:
        del _held[folder]
        if before is None:
            del os.environ[_HELD_FOR_CHILDREN]
        else:
            os.environ[_HELD_FOR_CHILDREN] = before
        (folder / LOCK_NAME).unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it holds something by now, or is gone
                folder.rmdir()


def is_main_process() -> bool:
    """Whether this is the process that prints and writes files."""
    return (os.environ.get("RANK") or "0") == "0"


def launched_processes() -> int:
    """Number of processes that a launcher says it has started; 1 where it says nothing."""
    return int(os.environ.get("WORLD_SIZE", "").strip() or 1)


def with_locked_folder(argument: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: lock the folder that an argument names while the function runs; None locks nothing."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def held(*args: P.args, **kwargs: P.kwargs) -> T:
            folder = signature.bind(*args, **kwargs).arguments.get(argument)
            with contextlib.nullcontext() if folder is None else locked_folder(folder):
                return function(*args, **kwargs)

        return held

    return decorate


def held_descriptors() -> tuple[int, ...]:
    """The locks of this process. A child process that inherits them keeps the folders locked until it has ended."""
    return tuple(_held.values())


def _is_held(folder: Path) -> bool:
    of_parent = os.environ.get(_HELD_FOR_CHILDREN, "")
    held = {*_held, *(Path(path) for path in of_parent.split(os.pathsep) if path)}
    return not held.isdisjoint((folder, *folder.parents))


def _acquire(folder: Path) -> int | None:
    """The descriptor of the locked file; None where the system has no such locks."""
    if fcntl is None:
        return None
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = _owner(descriptor)
                os.close(descriptor)
                raise OutputError(
                    f"{folder} is in use by {owner}. Wait until it ends, stop it, or choose another output folder."
                ) from error
            except OSError:  # a file system without locks
                os.close(descriptor)
                return None
            if _is_same(descriptor, path):
                break
            os.close(descriptor)  # removed by the one that held it before
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor
    except OSError as error:
        raise OutputError(f"The output folder {folder} cannot be written: {error.strerror or error}.") from error


def _owner(descriptor: int) -> str:
    """Who holds a lock. Processes that inherited it may have outlived the one that wrote its number."""
    text = os.read(descriptor, 200).decode(errors="replace").strip()
    found = re.fullmatch(r"process (\d+) on (.+)", text)
    if found is not None and found[2] == socket.gethostname() and not is_running(int(found[1])):
        return f"processes that {text} started before it ended"
    return text or "another process"


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
