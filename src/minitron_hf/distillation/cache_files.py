"""Files of a teacher cache: Arrow files that `datasets` reads, and the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo, Features

from ..compat import commit_hash, dataset_state
from ..errors import MismatchError
from ..file_digests import cached_file_digest
from ..files import digest, replacing_file, versions, write_json
from ..formats import migrate, number_of, write_artefact
from .batches import LABELS, SOURCE, STATES
from .cache_coding import DTYPES, Coding
from .record import describe_data
from .teacher_cache import MANIFEST_NAME, METADATA_KEY, ROWS_KIND

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Digest of token rows; of rows with images, of what they are made from."""
    columns = (SOURCE,) if SOURCE in rows[0] else ("input_ids", LABELS, "seq_lengths")
    return digest(*(np.asarray(row.get(name, ()), dtype="<i4").tobytes() for row in rows for name in columns))


def _schema(names: Iterable[str], settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> pa.Schema:
    coding = Coding.of(settings)
    types = {**coding.types, **{f"{STATES}{i}": DTYPES[coding.floats] for i in settings["states"]}}
    fields = [pa.field(name, pa.list_(types.get(name, pa.int32()))) for name in (*names, *types)]
    numbered = {"format": number_of(ROWS_KIND, is_plain=_is_plain(settings)), **metadata}
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(numbered, sort_keys=True)})


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether the rows have no images, which an older version would leave out."""
    return "processor" not in settings


def write_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    batches: Iterable[Iterable[Mapping[str, Any]]],
    described: Mapping[str, Any],
) -> None:
    """Write a file of rows with the teacher's columns, under a temporary name first.

    Args:
        path: of the file.
        rows: token rows, or rows with images (`image_cache.ImageSources`).
        batches: of the teacher's columns of every row; of rows with images, their tokens too.
        described: settings of the cache and digest of the rows, which the file holds, too.
    """
    names = [name for name in ("input_ids", LABELS, "seq_lengths", SOURCE) if name in rows[0]]
    rendered = ["input_ids", LABELS] if SOURCE in names else []
    schema = _schema([*rendered, *names], described, described)
    remaining = iter(rows)
    with replacing_file(path) as temporary, pa.ipc.new_stream(os.fspath(temporary), schema) as writer:
        for batch in batches:
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            for computed in batch:
                row = next(remaining)
                for name in names:
                    columns[name].append(np.asarray(row[name], dtype=np.int32))
                for name, values in computed.items():
                    columns[name].append(values)
            writer.write_batch(pa.record_batch([_list_array(columns[f.name], f.type) for f in schema], schema=schema))


def _list_array(values: Sequence[Any], of: pa.ListType) -> pa.Array:
    offsets = np.cumsum([0, *map(len, values)])
    flat = pa.array(np.concatenate(values).astype(of.value_type.to_pandas_dtype()), type=of.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), flat)


#: Settings that are digests → what it means that another one is stored.
_OTHER: Mapping[str, str] = {
    "teacher": "another teacher, or other weights of this one",
    "tokenizer": "another tokenizer",
    "processor": "other settings of the processor, or another chat template",
    "rows": "other rows of the corpus (a chat template that prints the date renders others on another day)",
}


def require_same(path: Path, described: Mapping[str, Any]) -> None:
    """Refuse to resume with a file of other rows or settings."""
    try:
        with pa.memory_map(os.fspath(path)) as source:
            found = json.loads(pa.ipc.open_stream(source).schema.metadata[METADATA_KEY])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise MismatchError(
            f"{path} is not a file of a teacher cache ({error}). Choose another folder, or empty this one."
        ) from error
    found = migrate(found, path, ROWS_KIND)
    for name, value in described.items():
        if found.get(name) != value:
            what = _OTHER.get(name, f"{name}={found.get(name)!r}, this run has {value!r}")
            raise MismatchError(f"{path} was written with {what}. Choose another folder, or delete this one.")


def write_manifest(
    folder: Path,
    files: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
    config: PretrainedConfig,
    dataset: Any,
) -> None:
    """Write the files that `datasets` needs, and then the manifest."""
    if left := sorted({path.name for path in folder.glob("data-*.arrow")} - {file["file"] for file in files}):
        raise MismatchError(
            f"{folder} holds {', '.join(left)}, which belong to no row of the dataset: the cache was "
            "begun with a longer dataset. Choose another folder, or delete this one."
        )
    num_tokens = 0
    for file in files:
        path = folder / file["file"]
        file["num_bytes"] = path.stat().st_size
        file["sha256"] = cached_file_digest(path)
        with pa.memory_map(os.fspath(path)) as source:
            reader = pa.ipc.open_stream(source)
            schema = reader.schema
            num_tokens += sum(len(batch.column(Coding.of(settings).positions).flatten()) for batch in reader)
    rows = digest(*(file["digest"] for file in files))
    write_json(folder / "dataset_info.json", asdict(DatasetInfo(features=Features.from_arrow_schema(schema))))
    fingerprint = digest(settings, rows).removeprefix("sha256:")[:16]
    write_json(folder / "state.json", dataset_state([file["file"] for file in files], fingerprint))
    manifest = {
        "versions": versions(),
        "settings": settings,
        "teacher": {
            "name_or_path": config.name_or_path or None,
            "revision": commit_hash(config),
            "config": json.loads(config.to_json_string(use_diff=False)),
        },
        "data": {"given": describe_data(dataset), "digest": rows},
        "num_rows": sum(file["num_rows"] for file in files),
        "num_tokens": num_tokens,
        "num_bytes": sum(file["num_bytes"] for file in files),
        "files": files,
    }
    write_artefact(folder / MANIFEST_NAME, manifest, is_plain=_is_plain(settings))
