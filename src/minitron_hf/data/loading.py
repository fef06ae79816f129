"""Files, saved datasets and Hub datasets."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, MinitronError
from ..files import local_path

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


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
    source: str, *, name: str | None = None, split: str = "train", revision: str | None = None
) -> Dataset | IterableDataset:
    """Load a dataset by path or Hub id with the `datasets` library.

    Args:
        source: a `.jsonl`, `.json`, `.parquet`, `.csv` or `.txt` file, a folder written by
            `Dataset.save_to_disk`, or a Hub dataset id.
        name: configuration name on the Hub (`"wikitext-2-raw-v1"`).
        split: split, slices allowed (`"train[:1%]"`).
        revision: Hub revision.

    Raises:
        DataError: if nothing can be loaded from `source`.
    """
    import datasets

    path = local_dataset(source)
    try:
        if path is not None and path.is_file():
            if path.suffix not in READERS:
                raise DataError(f"{source}: cannot read a '{path.suffix}' file. Expected one of {', '.join(READERS)}.")
            if path.suffix != ".parquet":
                _require_utf8(path)
            return datasets.load_dataset(READERS[path.suffix], data_files={"train": str(path)}, split=split)
        if path is not None and (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path or source), name, split=split, revision=revision)
    except StopIteration as error:  # what `datasets` makes of a file without rows
        raise DataError(f"The dataset {source} is empty. Expected at least one row.") from error
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, MinitronError):
            raise
        raise DataError(
            f"Cannot load the dataset {source!r} (split {split!r}): {error}. "
            f"Expected a local file ({', '.join(READERS)}), a saved dataset folder or a Hub dataset id."
        ) from error


def _require_utf8(path: Path) -> None:
    """Refuse a text file in another encoding; `datasets` would fail only when it comes to the row."""
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
