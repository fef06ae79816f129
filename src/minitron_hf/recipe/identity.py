"""Identities of teachers and datasets, by which a stage knows that its inputs are the same."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import (
    digest,
    file_digest,
)
from ..models import load_config
from .schema import DatasetSection, TeacherSection


def model_identity(section: TeacherSection) -> Any:
    """What tells one teacher from another without reading all of it: the Hub commit, or local configs and sizes."""
    folder = Path(section.model).expanduser()
    if not folder.is_dir():
        config = load_config(section.model, revision=section.revision)
        return {"model": section.model, "revision": getattr(config, "_commit_hash", None) or section.revision}
    weights = sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    return {
        "config": file_digest(folder / "config.json"),
        "weights": {path.name: _edge_digest(path) for path in weights},
    }


def _edge_digest(path: Path, edge: int = 1 << 20) -> str:
    """Digest of a large file's length, beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(edge)
        file.seek(max(size - edge, 0))
        return digest(size, head, file.read(edge))


@functools.cache
def _file_digest_of(path: Path, size: int, modified: int) -> str:
    """`file_digest`, once as long as the file does not change: every stage asks, and a corpus may be large."""
    return file_digest(path)


def dataset_identity(section: DatasetSection) -> Any:
    path = Path(section.source).expanduser()
    values = asdict(section)
    if path.is_file():
        stat = path.stat()
        return {**values, "source": _file_digest_of(path, stat.st_size, stat.st_mtime_ns)}
    looks_local = section.source.startswith((".", os.sep, "~")) or Path(section.source).suffix in (".jsonl", ".txt")
    if looks_local and not path.exists():
        raise DataError(f"The dataset {section.source} does not exist. Expected a file, a saved dataset or a Hub id.")
    return values
