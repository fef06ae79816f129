"""Files, saved datasets and Hub datasets."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MinitronError
from ..files import digest
from ..names import local_path
from .images import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


#: What `datasets` says of files without rows, where it does not raise StopIteration (of streams).
_EMPTY = ("at least one example when writing data", "corresponds to no data")
#: How local files of texts end → the reader of `datasets`.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def local_dataset(source: str) -> Path | None:
    """The file or folder of a dataset; None for a Hub id.

    Raises:
        DataError: if the name is a path, or ends like a file, and nothing is there.
    """
    if not str(source).strip():
        raise DataError("The dataset has no name. Expected a local file, a saved dataset folder or a Hub dataset id.")
    path = local_path(source, what="dataset", error=DataError)
    if path is None and Path(source).suffix in READERS:  # a Hub id does not end like this
        raise DataError(f"The file {source} does not exist. Check the path.")
    return path


def load_text_dataset(
    source: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load a dataset by path or Hub id with the `datasets` library.

    Args:
        source: a `.jsonl`, `.json`, `.parquet`, `.csv` or `.txt` file, a folder written by
            `Dataset.save_to_disk`, or a Hub dataset id. Texts in the columns `images` and `image` are names of image
            files, relative to the file that holds them.
        name: configuration name on the Hub (`"wikitext-2-raw-v1"`).
        split: split, slices allowed (`"train[:1%]"`).
        revision: Hub revision.
        streaming: read rows while they are used (an `IterableDataset`), instead of all of them now. A stream has no
            slices of a split.

    Raises:
        DataError: if nothing can be loaded from `source`.
    """
    import datasets

    path = local_dataset(source)
    if path is not None and path.is_dir():
        _refuse_folder_of_model(path)
    try:
        if path is not None and path.is_file():
            if path.suffix not in READERS:
                raise DataError(f"{source}: cannot read a '{path.suffix}' file. Expected one of {', '.join(READERS)}.")
            if path.suffix != ".parquet":
                _require_utf8(path)
            how = {"data_files": {"train": str(path)}, "split": split, "streaming": streaming}
            return _with_images_beside(datasets.load_dataset(READERS[path.suffix], **how), path.parent)
        if path is not None and (path / "state.json").is_file():
            saved = _part(datasets.load_from_disk(str(path)), split, source)
            return saved.to_iterable_dataset() if streaming else saved
        return datasets.load_dataset(
            source if path is None else str(path.resolve()),  # it is named after the folder, and "." is no name
            name,
            split=split,
            revision=revision,
            streaming=streaming,
            cache_dir=None if path is None else _cache_of_folder(path),
        )
    except (StopIteration, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, MinitronError):
            raise
        if path is not None and path.is_file() and READERS.get(path.suffix) == "json":
            _require_json(path)
        if isinstance(error, StopIteration) or any(sign in str(error.__cause__ or error) for sign in _EMPTY):
            raise DataError(f"The dataset {source} is empty. Expected at least one row.") from error
        reason = _short_reason(error.__cause__ or error)  # of a broken file, the line is in the cause alone
        at = "" if revision is None else f", revision {revision!r}"
        raise DataError(
            f"Cannot load the dataset {source!r} (split {split!r}{at}): {reason}. "
            f"Expected a local file ({', '.join(READERS)}), a saved dataset folder or a Hub dataset id."
        ) from error


def _part(saved: Dataset, split: str, source: str) -> Dataset:
    """The rows of a saved dataset that a split names: all of them, or slices.

    Raises:
        DataError: if the dataset was not saved under this name; without a name it is `"train"`.
    """
    import datasets

    names = dict.fromkeys({"train", str(saved.split or "train")}, len(saved))
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(names)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"The folder {source} holds one dataset without splits, and split={split!r} names none of its rows: "
            f"{error}. Use 'train', or a part of it, such as 'train[:90%]'."
        ) from error
    rows = [saved.select(range(part.from_ or 0, len(saved) if part.to is None else part.to)) for part in parts]
    return saved if split in names else datasets.concatenate_datasets(rows)


def _with_images_beside(data: Dataset | IterableDataset, folder: Path) -> Dataset | IterableDataset:
    """A dataset whose columns of names of image files hold the images."""
    from datasets import Image, List, Value

    for column in COLUMNS:
        kind = (data.features or {}).get(column)
        kind, is_list = (kind.feature, True) if isinstance(kind, List) else (kind, False)
        if isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
            names = {"column": column, "folder": str(folder), "is_list": is_list}
            data = data.map(_located, fn_kwargs=names, features=data.features)
            data = data.cast_column(column, List(Image()) if is_list else Image())
    return data


def _located(row: dict[str, Any], column: str, folder: str, is_list: bool) -> dict[str, Any]:
    """The names of a row's images, as paths from here; addresses and full paths stay. No list is an empty one."""
    value = [] if row[column] is None and is_list else row[column]

    def path(name: str | None) -> str | None:
        return name if name is None or "://" in name else str(Path(folder) / name)

    return {column: [path(one) for one in value] if isinstance(value, list) else path(value)}


def _refuse_folder_of_model(folder: Path) -> None:
    """Refuse the folder of a model or a run, whose JSON files `datasets` would read as rows.

    Raises:
        DataError: naming what it is.
    """
    names = {path.name for path in folder.iterdir()}
    if "config.json" in names and any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        what = "a run" if "stages" in names else "a model"
        raise DataError(
            f"{folder} is the folder of {what}, not of a dataset. Expected a local file ({', '.join(READERS)}), a "
            "saved dataset folder or a Hub dataset id."
        )


def _short_reason(error: BaseException) -> str:
    """The first line of an error; Arrow prints whole schemas."""
    if "couldn't cast" in str(error).lower():
        return "its files or rows do not have the same columns"
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
    return line if len(line) <= 300 else f"{line[:300]}…"


def _cache_of_folder(folder: Path) -> str | None:
    """Where `datasets` keeps its copy of a local folder; None: where it keeps all others.

    For a folder whose README.md has `configs`, the cache of `datasets` 5.2 knows neither its path nor its files. It
    would return the rows of any other folder of that name, and old rows after a change.
    """
    import datasets

    try:
        has_configs = "\nconfigs:" in (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not has_configs:
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    known = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{digest(known).removeprefix('sha256:')[:16]}")


def _require_json(path: Path) -> None:
    """Refuse a file that is neither one JSON document nor lines of JSON objects; `datasets` does not name the line.

    Raises:
        DataError: naming the file, the first broken line and what is wrong with it.
    """
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
            return
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else one document after another: lines
                raise _broken_line(path, error.lineno, error.msg) from error
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                raise _broken_line(path, number, f"column {error.colno}: {error.msg}", line) from error
            if not isinstance(value, dict):
                raise _broken_line(path, number, f"a {type(value).__name__} instead of an object", line)


def _broken_line(path: Path, number: int, reason: str, line: str = "") -> DataError:
    shown = f": {line.strip()[:60]!r}" if line else ""
    return DataError(
        f"{path}, line {number}, is not valid JSON ({reason}){shown}. Expected one object per line, such as "
        '{"text": "…"}. Correct the line, or remove it.'
    )


def _require_utf8(path: Path) -> None:
    """Refuse a text file in another encoding, which `datasets` notices only at the row."""
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
                lines += block.count(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        lines += error.object[: error.start].count(b"\n")
        raise DataError(f"{path} is not UTF-8 text: line {lines} ({error.reason}). Save it as UTF-8.") from error
