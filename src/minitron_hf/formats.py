"""Formats of the files that a run leaves: one number per kind of file, migrations of older ones, refusals by name."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .errors import MismatchError, OutputError
from .files import parse_json, versions, write_json

#: Files of a plan.
PLAN_NAME, INDICES_NAME = "pruning_plan.json", "pruning_plan.safetensors"
#: File of a quantised copy that says what it was made from.
QUANTIZATION_NAME = "quantization.json"
#: Newest format number of each artefact, by file name. Raise it when an older reader would misunderstand the file, and
#: add a migration.
FORMATS: Mapping[str, int] = {
    "scores.safetensors": 1,
    "search.json": 1,
    "pruner_config.json": 1,
    PLAN_NAME: 2,
    "teacher_correction.json": 1,
    "data-*.arrow": 3,
    "teacher_cache.json": 3,
    "generation.json": 1,
    "checkpoint.json": 1,
    "distillation.json": 1,
    "evaluation.json": 1,
    "samples.json": 1,
    "costs.json": 1,
    "benchmarks.json": 1,
    "benchmarks/*.json": 1,
    "teacher.json": 1,
    "hub.json": 1,
    QUANTIZATION_NAME: 1,
    "stages/*.json": 1,
}

#: Format of files with nothing that older readers would misunderstand, where it is not the newest.
PLAIN_FORMATS: Mapping[str, int] = {PLAN_NAME: 1, "data-*.arrow": 2, "teacher_cache.json": 2}

#: What writes each kind of file again, for messages.
WRITERS: Mapping[str, str] = {
    "scores.safetensors": "`minitron-hf score`",
    "search.json": "`minitron-hf search`",
    "pruner_config.json": "`minitron-hf plan`",
    "pruning_plan.json": "`minitron-hf plan`",
    "teacher_correction.json": "the stage `correct` of `minitron-hf run`",
    "data-*.arrow": "`minitron-hf cache`, into an empty folder",
    "teacher_cache.json": "`minitron-hf cache`, into an empty folder",
    "generation.json": "`minitron-hf generate`, into an empty folder",
    "checkpoint.json": "`minitron-hf distill`, into an empty folder",
    "distillation.json": "`minitron-hf distill`, into an empty folder",
    "evaluation.json": "`minitron-hf evaluate`",
    "samples.json": "the stage `evaluate` of `minitron-hf run`",
    "costs.json": "`minitron-hf run`, after this file is deleted",
    "benchmarks.json": "`minitron-hf evaluate`",
    "benchmarks/*.json": "`minitron-hf evaluate`, after this file is deleted",
    "teacher.json": "`minitron-hf card`, after this file is deleted",
    "hub.json": "`minitron-hf publish`, after this file is deleted",
    QUANTIZATION_NAME: "`minitron-hf quantize`, into an empty folder",
    "stages/*.json": "`minitron-hf run --redo`",
}


def _name_models_of_benchmarks(content: dict[str, Any]) -> dict[str, Any]:
    """Format 0 is `{model: {task: …}}`, or `{task: …}` for the student alone."""
    student_alone = any("value" in measured for metrics in content.values() for measured in metrics.values())
    return {"models": {"student": content} if student_alone else content}


def _add_num_draws(settings: dict[str, Any]) -> dict[str, Any]:
    """Format 1 of a teacher cache held the most likely tokens only."""
    return {**settings, "num_draws": None}


#: (file name, older format) → function that turns its content into the next format. A file without a number has
#: format 0; the files that are not listed here have carried a number from the beginning.
MIGRATIONS: Mapping[tuple[str, int], Callable[[Any], dict[str, Any]]] = {
    ("pruner_config.json", 0): dict,
    ("data-*.arrow", 0): dict,
    (PLAN_NAME, 1): dict,
    ("data-*.arrow", 1): _add_num_draws,
    ("data-*.arrow", 2): dict,
    ("teacher_cache.json", 1): lambda content: {**content, "settings": _add_num_draws(content.get("settings"))},
    ("teacher_cache.json", 2): dict,
    ("samples.json", 0): lambda content: {"samples": content},
    ("benchmarks.json", 0): _name_models_of_benchmarks,
    ("teacher.json", 0): dict,
    ("hub.json", 0): dict,
    ("stages/*.json", 0): dict,
}


def migrate(content: Any, path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Turn the content of an artefact into the format that this version writes.

    Args:
        content: what the file, or its header, holds.
        path: where it was read.
        kind: its name in `FORMATS`; None: the file's own name.

    Raises:
        MismatchError: if the format is newer, or older than every migration; names the file and what to do.
    """
    kind = kind or Path(path).name
    found = content.get("format", 0) if isinstance(content, dict) else 0
    number = 0 if isinstance(found, dict) else found  # benchmarks of format 0 may have a task called "format"
    while number != FORMATS[kind]:
        if not isinstance(number, int) or (kind, number) not in MIGRATIONS:
            raise MismatchError(_format_refusal(path, kind, number))
        try:
            content, number = MIGRATIONS[kind, number](content), number + 1
        except (TypeError, ValueError, AttributeError) as error:
            raise MismatchError(
                f"{path} does not hold what {kind} held in format {number} ({error}). Write it again with "
                f"{WRITERS[kind]}."
            ) from error
    return {**content, "format": number}


def _format_refusal(path: str | os.PathLike[str], kind: str, number: Any) -> str:
    readable = sorted({FORMATS[kind], *(older for name, older in MIGRATIONS if name == kind)})
    is_newer = isinstance(number, int) and number > FORMATS[kind]
    return (
        f"{path} has {f'format {number!r}' if number != 0 else 'no format number'}, and minitron-hf "
        f"{versions()['minitron_hf']} reads format {' and '.join(map(str, readable))} of {kind}. "
        f"{'Install a newer minitron-hf' if is_newer else 'Take the file as minitron-hf wrote it'}, or write it again "
        f"with {WRITERS[kind]}."
    )


def read_artefact(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Read a JSON artefact in the format that this version writes (see `migrate`).

    Raises:
        OutputError: if the file is missing.
        MismatchError: if it is not valid JSON, or its format cannot be read.
    """
    if not Path(path).is_file():
        raise OutputError(f"{path} does not exist. Write it with {WRITERS[kind or Path(path).name]}.")
    return migrate(parse_json(path), path, kind)


def write_artefact(
    path: str | os.PathLike[str], content: Mapping[str, Any], kind: str | None = None, *, is_plain: bool = False
) -> None:
    """Write a JSON artefact with its format number (see `number_of`)."""
    write_json(path, {"format": number_of(kind or Path(path).name, is_plain=is_plain), **content})


def number_of(kind: str, *, is_plain: bool) -> int:
    """The format number that a file gets: the newest, or that of files which older readers understand.

    Args:
        kind: its name in `FORMATS`.
        is_plain: whether it has nothing that the newest format brought.
    """
    return PLAIN_FORMATS.get(kind, FORMATS[kind]) if is_plain else FORMATS[kind]


def require_readable(path: str | os.PathLike[str]) -> None:
    """Refuse an artefact, or a folder that holds one, in a format that this version cannot read.

    Files that are not listed in `FORMATS` are passed over.

    Raises:
        MismatchError: naming the first such file.
    """
    path = Path(path)
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            if not inner.is_dir():
                require_readable(inner)
        return
    kind = next((kind for kind in FORMATS if fnmatch.fnmatchcase(path.name, kind)), None)
    if kind is not None:
        migrate(_read_header(path, kind), path, kind)


def require_whole_weights(path: str | os.PathLike[str]) -> None:
    """Refuse a safetensors file, or a folder that holds one, that is empty or cut. Only headers are read.

    Other files are passed over.

    Raises:
        MismatchError: naming the first such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    for one in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        if one.suffix != ".safetensors":
            continue
        try:
            with safe_open(one, "np"):  # compares the header with the length of the file
                pass
        except (SafetensorError, OSError) as error:
            raise MismatchError(f"{one} is damaged ({error}). Its stage has to be done again.") from error


def _read_header(path: Path, kind: str) -> Any:
    """The part of an artefact that holds its format number."""
    if path.suffix == ".json":
        return parse_json(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "np") as stored:
                return json.loads(stored.metadata()["minitron_hf"])
        import pyarrow as pa

        with pa.memory_map(os.fspath(path)) as source:
            return json.loads(pa.ipc.open_stream(source).schema.metadata[b"minitron_hf"])
    except Exception as error:
        raise MismatchError(f"{path} cannot be read ({error!r}). Write it again with {WRITERS[kind]}.") from error


def without_new_defaults(settings: Any, recorded: Any, classes: Mapping[str, type], entry: str | None = None) -> Any:
    """Settings without the fields that a record lacks, where they have their defaults.

    The record is of a version that did not have these fields yet, and did what their defaults do. So the digest of
    these settings is the one that it made. Budgets that it held as floats (`1e6`) are floats, too.

    Args:
        settings: as they are now.
        recorded: those in the record.
        classes: entry of the settings → the dataclass whose fields stand there.
        entry: name of the entry that holds the settings; None of all of them.

    >>> without_new_defaults({"tokens": 1000000, "size": 1}, {"tokens": 1e6, "size": 1.0}, {})  # 1.0 is a fraction
    {'tokens': 1000000.0, 'size': 1}
    """
    if isinstance(settings, Mapping) and isinstance(recorded, Mapping):
        section = None if entry is None else classes.get(entry)
        defaults = {} if section is None else _defaults(section)
        return {
            name: without_new_defaults(value, recorded.get(name), classes, name)
            for name, value in settings.items()
            if name in recorded or name not in defaults or value != defaults[name]
        }
    if isinstance(settings, list) and isinstance(recorded, list) and len(settings) == len(recorded):
        return [without_new_defaults(*both, classes, entry) for both in zip(settings, recorded, strict=True)]
    return recorded if isinstance(recorded, float) and recorded > 1 and settings == recorded else settings


def _defaults(section: Any) -> dict[str, Any]:
    """The defaults of a dataclass, by field."""
    made = {one.name: one.default_factory() for one in fields(section) if one.default_factory is not MISSING}
    return made | {one.name: one.default for one in fields(section) if one.default is not MISSING}
