"""Looks at the first rows of a corpus. Of a dataset on the Hub, nothing else is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..data.images import holds_images, read_row
from ..data.loading import local_dataset
from ..errors import DataError
from ..models import first_line
from .corpus_sections import DatasetSection

#: Local files up to this size are read by a check; of larger ones, and of the Hub's, the first rows are.
SMALL = 256 * 2**20
#: Rows that are looked at.
FIRST_ROWS = 64


@dataclass(frozen=True)
class Beginning:
    """The beginning of a corpus.

    Attributes:
        rows: its first rows.
        num_rows: number of all its rows; None where it is not known.
    """

    rows: list[Any]
    num_rows: int | None


def is_remote(section: DatasetSection) -> bool:
    """Whether a corpus would have to be downloaded. With the Hub switched off, it is here or nowhere."""
    from huggingface_hub import constants

    return local_dataset(section.source) is None and not constants.is_offline_mode()


def beginning(section: DatasetSection, where: str, load: Callable[[], Any]) -> Beginning:
    """The first rows of a corpus and its length. A Hub dataset is streamed; its length is what its card says.

    Args:
        section: the corpus.
        where: where it stands in the recipe.
        load: loads it, where it is here.

    Raises:
        DataError: if it cannot be read.
    """
    if is_remote(section):
        return _beginning_on_hub(section, where)
    rows = load()
    if not isinstance(rows, Sized):
        return Beginning(list(islice(rows, FIRST_ROWS)), None)
    return Beginning(read_rows(rows, min(FIRST_ROWS, len(rows)), where), len(rows))


def read_rows(rows: Any, count: int, where: str) -> list[Any]:
    """The first rows of a corpus.

    Raises:
        DataError: naming the row whose image cannot be decoded.
    """
    if not holds_images(rows):
        return list(islice(rows, count))
    found: list[Any] = []
    try:
        for number in range(count):
            found.append(read_row(rows, number))
    except DataError as error:
        raise DataError(f"{where}: Row {len(found)} (counted from 0): {error}") from error
    return found


def _beginning_on_hub(section: DatasetSection, where: str) -> Beginning:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    whole = section.split.partition("[")[0]  # a stream has no slices
    try:
        stream = load_dataset(section.source, section.name, split=whole, revision=section.revision, streaming=True)
        rows = list(islice(stream, min(FIRST_ROWS, section.num_rows or FIRST_ROWS)))
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{where}: {section.source!r} is neither a file here nor a dataset that can be read from the "
            f"Hub: {first_line(error)} Check the path, or the name, split and revision."
        ) from error
    known = {name: info.num_examples for name, info in (stream.info.splits or {}).items()}
    return Beginning(rows, _length(section, known))


def _length(section: DatasetSection, known: dict[str, int]) -> int | None:
    """Rows of a corpus, from the lengths of the splits; None where they are not known."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(section.split).to_absolute(known)
    except (ValueError, AssertionError, KeyError):  # a split whose length is not known
        return section.num_rows
    length = sum(part.to - part.from_ for part in parts)
    return length if section.num_rows is None else min(length, section.num_rows)


def first_rows(section: DatasetSection, where: str, load: Callable[[], Any]) -> list[Any] | str:
    """The first rows of a corpus, or why they are not looked at.

    Args:
        section: the corpus.
        where: where it stands in the recipe.
        load: loads it, where it is a local one.
    """
    path = local_dataset(section.source)
    if path is not None and path.is_file() and path.stat().st_size > SMALL:
        return f"{section.source} is large, and is read when the run begins"
    try:
        return beginning(section, where, load).rows
    except DataError:
        if path is None and not is_remote(section):
            return f"{section.source} is not here, and the Hub is switched off (HF_HUB_OFFLINE)"
        raise
