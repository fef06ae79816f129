"""Files of a run: digests of inputs, and writes that are all or nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import MinitronError, MismatchError, OutputError

#: Distributions whose versions are recorded in every artefact.
RECORDED_DISTRIBUTIONS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that shape a result."""
    from ._version import __version__

    found = {"python": platform.python_version(), "minitron_hf": __version__}
    for name in RECORDED_DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def digest(*parts: Any) -> str:
    """SHA-256 of the parts, as `"sha256:<hex>"`.

    Args:
        *parts: `bytes` are hashed as they are, anything else as canonical JSON (sorted keys).

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return f"sha256:{sha.hexdigest()}"


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as `"sha256:<hex>"`."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return f"sha256:{sha.hexdigest()}"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object; NaN and infinities, which are not JSON but which Python writes, are null.

    Raises:
        OutputError: if the file is missing.
        MismatchError: if it is not a JSON object.
    """
    value = parse_json(path)
    if not isinstance(value, dict):
        raise MismatchError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def parse_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that may hold any value; otherwise as `read_json`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except FileNotFoundError as error:
        raise OutputError(f"{path} does not exist. Run the stage that writes it first.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MismatchError(f"{path} is not valid JSON ({error}). Delete it and run its stage again.") from error


def write_text(path: str | os.PathLike[str], text: str, *, private: bool = False) -> None:
    """Write a text file under a temporary name, then rename it, so that no reader ever sees half of it.

    Args:
        path: the file.
        text: its new content.
        private: let nobody but its owner read it.

    Raises:
        OutputError: if the folder cannot be written (permissions, full disk).
    """
    with replacing_file(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file (two-space indent, final newline) under a temporary name, then rename it.

    JSON has no NaN and no infinity: they become null.
    """
    write_text(path, json.dumps(json_values(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_values(value: Any) -> Any:
    """A value as `write_json` writes it: numbers that JSON does not have (NaN, infinities) are null."""
    if isinstance(value, Mapping):
        return {key: json_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    What a killed process left of the same write is removed first.

    Args:
        path: the file to replace.
        private: let nobody but its owner read it.
    """
    path = Path(path)
    with _written_beside(path) as temporary:
        # The kernel applies the umask; reading it would change it for all threads.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some writers make the file anew, for its owner alone
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it replaces `path`, on any error it is removed.

    A loader that looks at `path` sees the old folder, no folder, or the whole new one, never a part. What a killed
    process left of the same write is removed first.
    """
    path = Path(path)
    with _written_beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        share_files(temporary)
        remove(path, missing_ok=True)
        os.replace(temporary, path)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk: a power cut could leave an empty file."""
    if os.name == "nt":  # which does so for files that are open for writing alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot, such as those of networks for folders
            raise
    finally:
        os.close(descriptor)


def share_files(folder: str | os.PathLike[str]) -> None:
    """Let those read the files of a folder that may read any new file in it.

    safetensors makes its files for their owner alone, and a server may run as another user.
    """
    folder = Path(folder)
    probe = folder / f".{secrets.token_hex(8)}{PARTIAL}"
    probe.touch()  # the kernel applies the umask; reading it would change it for all threads
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        if path.is_file() and not path.is_symlink():
            os.chmod(path, mode)


@contextlib.contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """Yield an unused name beside `path`. Nothing of that name is left; storage errors say what to do."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, path.name)
        temporary = _temporary_beside(path)
        yield temporary
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise OutputError(f"Cannot write {path}: {error}. Free space or choose another folder.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            if not temporary.is_dir():
                temporary.unlink(missing_ok=True)
            _WRITING.discard(temporary.name)


#: Ending of the names of working files; only a killed process leaves them behind.
PARTIAL = ".partial"
_UNFINISHED = re.compile(rf"\..+\.([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}")
#: The file that a run holds while it works in a folder (`locks`).
LOCK_NAME = ".minitron_hf.lock"
#: Those that this process is writing.
_WRITING: set[str] = set()


def _temporary_beside(path: Path) -> Path:
    """A name that says which process is writing what: `.<name>.<host>-<process>-<random>.partial`."""
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    _WRITING.add(temporary.name)
    return temporary


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_working_file(path: Path) -> bool:
    """Whether this package makes a file of that name while it works, and removes it afterwards."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, ".lock"))


def remove_abandoned(folder: str | os.PathLike[str], name: str | None = None, *, alone: bool = False) -> None:
    """Remove unfinished files that killed processes left behind.

    Args:
        folder: where.
        name: of the file or folder that was being written; None: of all, in `folder` and below.
        alone: no other machine writes there, except in folders that another run has locked; otherwise only files of
            ended processes of this machine are removed.
    """
    pattern = f"**/.*{PARTIAL}" if name is None else f".{glob.escape(name)}.*{PARTIAL}"
    for path in sorted(Path(folder).glob(pattern)):
        inner = path.parents[: len(path.parents) - len(Path(folder).parents) - 1]
        if _is_abandoned(path, alone=alone and not any((one / LOCK_NAME).exists() for one in inner)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path, *, alone: bool) -> bool:
    """Whether the process that was writing has ended; `alone` says so of those of other machines."""
    name = _UNFINISHED.fullmatch(path.name)
    if name is None:  # a user's file
        return False
    host, process = name.groups()
    if host != _host() or os.name == "nt":
        return alone
    if int(process) == os.getpid():  # of another process that had the same number, as in containers
        return path.name not in _WRITING
    return not is_running(int(process))


def is_running(process: int) -> bool:
    """Whether there is a process of that number on this machine; not for Windows, where asking ends it."""
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def remove(path: str | os.PathLike[str], *, missing_ok: bool = False) -> None:
    """Remove a file, or a folder: under another name first, so that nobody ever sees a part of it.

    Raises:
        FileNotFoundError: if there is none, unless `missing_ok`.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        aside = _temporary_beside(path)
        os.replace(path, aside)
        shutil.rmtree(aside)
        _WRITING.discard(aside.name)
    else:
        path.unlink(missing_ok=missing_ok)


def move_into(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Move a saved model's files into a folder, `config.json` last: without it no loader takes it for a model."""
    source, target = Path(source), Path(target)
    (target / "config.json").unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir() and (target / path.name).is_dir():
            remove(target / path.name)  # a folder takes the place of an empty one only
        os.replace(path, target / path.name)
    source.rmdir()


def is_storage_error(error: BaseException) -> bool:
    """Whether an error means that a file could not be read or written.

    The writers of safetensors and of PyTorch report a full disk as errors of their own. Errors of this package say
    already what they mean, also those that are `OSError`s.
    """
    if isinstance(error, MinitronError):
        return False
    signs = ("I/O error", "os error", "No space left", "failed writing", "unexpected pos")
    # Libraries raise an OSError without a number for files whose content they cannot use.
    has_number = isinstance(error, OSError) and error.errno is not None
    return has_number or any(sign in str(error) for sign in signs)


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` if needed and prove that a file can be written there, before any long computation.

    Raises:
        OutputError: if it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary_beside(folder / "probe")
        probe.write_bytes(b"probe")  # an empty file has room on a full disk
        probe.unlink()
        _WRITING.discard(probe.name)
    except OSError as error:
        raise OutputError(
            f"The output folder {folder} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error
    return folder


def require_creatable(folder: str | os.PathLike[str]) -> Path:
    """Prove that `folder` can be written, or made, and leave nothing behind.

    Raises:
        OutputError: if it cannot.
    """
    folder = Path(folder)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise OutputError(f"The output folder {folder} cannot be written: {above} is a file. Choose another folder.")
    require_writable(above)
    return folder


def refuse_own_folder(output_dir: str | os.PathLike[str], **models: Any) -> None:
    """Refuse an output folder that holds one of the models: role → a model, a path or Hub id, or None.

    Raises:
        OutputError: naming the role.
    """
    for role, model in models.items():
        config = getattr(model, "config", None)
        name = model if config is None else config.name_or_path
        if name and Path(name).is_dir() and Path(name).resolve() == Path(output_dir).resolve():
            raise OutputError(
                f"The output folder {output_dir} is the {role}'s own, whose files would be overwritten. "
                "Choose another folder."
            )


def require_empty(folder: str | os.PathLike[str]) -> Path:
    """Prove that `folder` can be written and holds nothing yet.

    Raises:
        OutputError: if it cannot, or does.
    """
    folder = Path(folder)
    existed = folder.is_dir()
    if existed and any(not is_working_file(path) for path in folder.iterdir()):
        raise OutputError(f"The output folder {folder} already holds files. Choose another one, or empty it.")
    require_writable(folder)
    if not existed:
        folder.rmdir()
    return folder


def require_free(folder: str | os.PathLike[str], *, overwrite: bool, **models: str | os.PathLike[str]) -> None:
    """Prove that `folder` can be written: it holds nothing yet, or may be replaced and holds no model that is read.

    Args:
        folder: where to write.
        overwrite: replace what it holds.
        **models: role → path or Hub id of what is read.

    Raises:
        OutputError: if it cannot be written, holds files, or one of the models lies in it.
    """
    if not overwrite:
        require_empty(folder)
        return
    for role, model in models.items():
        if Path(model).is_dir() and Path(folder).resolve() in Path(model).resolve().parents:
            raise OutputError(
                f"The output folder {folder} holds the {role}'s, {model}, which would be removed with all its other "
                "content. Choose another folder."
            )
