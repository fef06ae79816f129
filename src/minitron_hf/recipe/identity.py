"""Identities of teachers and datasets, by content instead of name: a stage with equal inputs is not repeated."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyarrow import parquet

from ..compat import commit_hash
from ..data.images import COLUMNS
from ..data.loading import local_dataset
from ..errors import DataError
from ..file_digests import cached_file_digest, cached_files_digest
from ..files import digest
from ..models import load_config
from ..names import local_folder, local_path
from ..sizes.request import PrunerConfig
from .schema import (
    CacheSection,
    ChatSection,
    CorrectionSection,
    DataSection,
    DatasetSection,
    EvaluateSection,
    GenerateSection,
    TeacherSection,
    TrainingSection,
)

#: Files of a local teacher that decide what it computes and which tokens it sees.
MODEL_FILES = (
    "*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "*.model", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "chat_template*", "*.py",
    "*processor_config.json",
)  # fmt: skip


#: Entry of a stage's settings → the class whose fields stand there (`formats.without_new_defaults`).
FIELDS_OF: Mapping[str, type] = {
    "prune": PrunerConfig,
    "evaluate": EvaluateSection,
    "chat": ChatSection,
    "teacher_cache": CacheSection,
    "teacher_correction": CorrectionSection,
    "generate": GenerateSection,
    **dict.fromkeys(("train", "eval", "data", "parts", "prompts"), DatasetSection),
}


def model_identity(section: TeacherSection) -> Any:
    """The identity of a teacher: its Hub commit, or the digests of its local files."""
    folder = local_folder(section.model)
    if folder is None:
        config = load_config(section.model, revision=section.revision)
        return {"model": section.model, "revision": commit_hash(config) or section.revision}
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return {"files": {path.name: cached_file_digest(path) for path in sorted(files)}}


def template_identity(source: str | None) -> dict[str, Any]:
    """The identity of the chat template that a recipe names: the digest of a file, else the name; empty without one.

    Raises:
        DataError: if it is a path, and nothing is there.
    """
    if source is None:
        return {}
    path = local_path(source, what="distill.chat_template_path", error=DataError)
    return {"chat_template": cached_file_digest(path) if path is not None and path.is_file() else source}


def dataset_identity(section: DatasetSection) -> dict[str, Any]:
    """The identity of a corpus: its Hub commit, or the digest of its files.

    Raises:
        DataError: if a local one does not exist.
    """
    path = local_dataset(section.source)
    values = asdict(section)
    if path is None:
        return {**values, "commit": hub_commit(section.source, section.revision)}
    if not path.is_file():
        return {**values, "source": _folder_digest(path)}
    found = cached_file_digest(path)
    images = [image for image in _named_images(path, found) if image.is_file()]
    return {**values, "source": digest([found, cached_files_digest(images)]) if images else found}


def folder_identity(name: str | None) -> str | None:
    """The identity of a folder that a recipe names: the digest of its files; the name where there is none."""
    return name if name is None or not Path(name).is_dir() else _folder_digest(Path(name))


def _folder_digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    return digest([(file.relative_to(folder).as_posix(), cached_file_digest(file)) for file in files])


@functools.cache
def _named_images(path: Path, content: str) -> tuple[Path, ...]:
    """The image files that the rows of a file name.

    Args:
        path: the file.
        content: its digest, so that a changed file is read again.
    """
    found = []
    with contextlib.suppress(ValueError, csv.Error):  # loading it names a broken line
        for value in _image_values(path):
            names = value if isinstance(value, list) else [value]
            found += [path.parent / name for name in names if isinstance(name, str) and "://" not in name]
    return tuple(found)


def _image_values(path: Path) -> Iterator[Any]:
    """What the rows of a JSON, CSV or Parquet file hold in the columns of images."""
    if path.suffix in (".json", ".jsonl"):
        with path.open("rb") as file:
            mentioned = (line for line in file if any(f'"{column}"'.encode() in line for column in COLUMNS))
            is_list = file.read(1) == b"["
            file.seek(0)
            for row in json.load(file) if is_list else map(json.loads, mentioned):
                yield from (row.get(column) for column in COLUMNS) if isinstance(row, dict) else ()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            columns = [name for name in COLUMNS if name in (rows.fieldnames or ())]
            for row in rows if columns else ():  # its texts may be long
                yield from (row[column] for column in columns)
    elif path.suffix == ".parquet":
        stored = parquet.ParquetFile(path)
        kinds = {one.name: str(one.type) for one in stored.schema_arrow if one.name in COLUMNS}
        named = [name for name, kind in kinds.items() if "string" in kind and "struct" not in kind]
        for batch in stored.iter_batches(columns=named) if named else ():  # others hold the images themselves
            for column in batch.columns:
                yield from column.to_pylist()


def training_identity(data: DataSection) -> Any:
    """The identity of the training corpus. The stage `generate` tells the identity of generated text.

    Raises:
        DataError: if a local corpus does not exist.
    """
    found = _part_identity(data.parts[0])
    if data.is_blend:
        parts = [
            {**_part_identity(part), "probability": probability}
            for part, probability in zip(data.parts, data.probabilities, strict=True)
        ]
        found = {"parts": parts, "stopping_strategy": data.stopping_strategy, "seed": data.seed}
    return {**found, "streaming": True} if data.streaming else found


def _part_identity(part: TrainingSection) -> dict[str, Any]:
    if part.generated:
        return {"generated": True, "num_rows": part.num_rows}
    return dataset_identity(part.dataset(""))


def _is_hidden(path: Path) -> bool:
    """Whether a file is of `datasets`, Python or an editor: cached results, downloads, remains."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts) or path.name.startswith(
        ("cache-", "tmp")
    )


@functools.cache
def hub_commit(repo_id: str, revision: str | None) -> str | None:
    """Commit of a Hub dataset. Without access to the Hub, the commit of the local copy; None if there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return HfApi().dataset_info(repo_id, revision=revision, timeout=10).sha
    except Exception:  # no network, no such dataset: loading it says so, by name
        stored = Path(HF_HUB_CACHE) / f"datasets--{repo_id.replace('/', '--')}" / "refs" / (revision or "main")
        return stored.read_text(encoding="utf-8").strip() if stored.is_file() else revision
