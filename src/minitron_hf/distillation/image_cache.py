"""Teacher caches of rows with images. A cache stores the tokens of its rows and digests of what they were made from.

The images stay in the corpus. Whoever trains passes the corpus again, and every row is compared with its digest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from ..compat import trains_on_images
from ..data.images import COLUMNS, require_image_model, require_image_processor
from ..data.tokens import text_tokenizer
from ..errors import DataError, MismatchError
from ..files import digest
from .batches import SOURCE
from .rows import PlacedRows, some_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Number of a row in the corpus.
NUMBER = "number"
#: Columns that TRL's collator of images and text reads beside the images.
TEXT_COLUMNS = ("messages", "prompt", "completion")
#: Rows of the corpus that are read at a time.
READ_ROWS = 64


def require_cacheable_images(dataset: Any, processing_class: Any, config: PretrainedConfig) -> None:
    """Refuse rows with images that cannot be cached, before anything is written.

    Raises:
        DataError: naming what to change.
    """
    _require_dataset(dataset)
    require_image_model(config, "The teacher")
    require_image_processor(processing_class)


def _require_dataset(rows: Any) -> None:
    if not isinstance(rows, Dataset):
        raise DataError(
            f"Rows with images that are cached must be a datasets.Dataset, got a {type(rows).__name__}: training "
            "reads their images again. Load the dataset without streaming, or make one with Dataset.from_list."
        )


def image_settings(trainer: Any) -> dict[str, Any]:
    """What decides the contents of a cache of rows with images, beside the settings of all caches; of others, none."""
    if not trains_on_images(trainer):
        return {}
    processor = trainer.processing_class
    return {"dataset_text_field": trainer.args.dataset_text_field, "processor": processor_digest(processor)}


def processor_digest(processor: Any) -> str:
    """Digest of the settings of a processor and of its chat template, but not of the names of its classes."""
    template = getattr(processor, "chat_template", None) or text_tokenizer(processor).chat_template
    return digest(_settings_of(processor.to_dict()), template)


def _settings_of(value: Any) -> Any:
    """Settings without names: the same processor may be loaded as another class, or from another folder."""
    if not isinstance(value, Mapping):
        return value
    names = ("_class", "_type", "_path", "auto_map")
    return {key: _settings_of(part) for key, part in value.items() if not str(key).endswith(names)}


# ---- Digests ----


def source_digests(rows: Dataset, text_field: str) -> Iterator[NDArray[np.int32]]:
    """Digest of the text and the image files of every row, as 8 numbers of 32 bits. No image is decoded.

    Args:
        rows: with a column of images.
        text_field: column that holds a text.

    Raises:
        DataError: naming a row whose image file cannot be read.
    """
    names = [name for name in dict.fromkeys((*TEXT_COLUMNS, text_field, *COLUMNS)) if name in rows.column_names]
    stored = rows.select_columns(names).with_format("arrow")
    for first in range(0, len(rows), READ_ROWS):
        for number, row in enumerate(stored[first : first + READ_ROWS].to_pylist(), first):
            try:
                content = {name: (_images if name in COLUMNS else _text)(value) for name, value in row.items()}
            except OSError as error:
                raise DataError(f"Row {number} (counted from 0): An image cannot be read: {error}.") from error
            yield np.frombuffer(bytes.fromhex(digest(content).removeprefix("sha256:")), dtype="<i4")


def _text(value: Any) -> Any:
    """A value without empty fields, which `datasets` adds where other rows have them."""
    if isinstance(value, Mapping):
        return {name: _text(part) for name, part in value.items() if part is not None}
    return [_text(part) for part in value] if isinstance(value, list) else value


def _images(value: Any) -> Any:
    """Digests of image files; an address stands for itself."""
    if isinstance(value, list):
        return [_images(one) for one in value]
    stored, path = (value["bytes"], value["path"]) if isinstance(value, Mapping) else (None, value)
    if stored is not None:
        return f"sha256:{digest(stored)}"
    return path if path is None or "://" in path else digest(Path(path).read_bytes())


# ---- Writing ----


class ImageSources:
    """The rows of a corpus by number and digest; their images are read when the teacher reads them.

    Args:
        rows: the corpus.
        text_field: column that holds a text.
    """

    def __init__(self, rows: Dataset, text_field: str) -> None:
        self.rows, self.text_field = rows, text_field

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, found in enumerate(source_digests(self.rows, self.text_field)):
            yield {NUMBER: number, SOURCE: found}

    def collator(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Any:
        """A collator that takes rows of this object instead of those of the corpus."""
        placed = PlacedRows(self.rows, "given")
        return lambda rows: collator([placed[row[NUMBER]] for row in rows])


# ---- Reading ----


def with_images(cached: Dataset, corpus: Any, settings: Mapping[str, Any]) -> Dataset:
    """Cached rows beside the rows of the corpus, whose images are read when a batch is made.

    Args:
        cached: rows of the cache.
        corpus: that it was written from.
        settings: of the cache.

    Raises:
        DataError: if the corpus is no dataset, or an image file cannot be read.
        MismatchError: naming a row that is another one than when the cache was written.
    """
    _require_dataset(corpus)
    if len(corpus) < len(cached):
        raise MismatchError(
            f"The teacher cache holds {len(cached)} rows, and the corpus has {len(corpus)}. Pass the corpus that the "
            "cache was written from."
        )
    corpus = some_rows(corpus, len(cached))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine reads all of it
        _require_same_rows(cached, source_digests(corpus, settings["dataset_text_field"]))
    own = [name for name in corpus.column_names if name not in cached.column_names]
    joined = concatenate_datasets([corpus.select_columns(own).with_format(None), cached.with_format(None)], axis=1)
    return joined.with_format("numpy", columns=cached.column_names, output_all_columns=True)


def _require_same_rows(cached: Dataset, found: Iterable[NDArray[np.int32]]) -> None:
    expected = cached.select_columns([SOURCE]).with_format("numpy")
    for number, (row, now) in enumerate(zip(expected, found, strict=True)):
        if not np.array_equal(row[SOURCE], now):
            raise MismatchError(
                f"Row {number} (counted from 0) of the corpus is not the one that the teacher cache holds: its text "
                "or an image was changed, or rows were added. Pass the corpus that the cache was written from, or "
                "write the cache again."
            )
