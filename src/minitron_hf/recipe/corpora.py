"""Reads the corpora of a recipe: single ones, and blends of several, whose rows are drawn by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..compat import column_names
from ..data import load_text_dataset
from ..data.conversations import conversation_of, is_conversation
from ..data.formats import FORMATS, TEMPLATE_COLUMNS, row_format
from ..errors import DataError, did_you_mean
from .corpus_sections import DatasetSection

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class Part:
    """One corpus of a blend.

    Attributes:
        where: where it stands in the recipe, for messages.
        first: its first row.
        text_field: column that holds a text.
    """

    where: str
    first: Mapping[str, Any]
    text_field: str

    @property
    def format(self) -> str:
        """Which of `FORMATS` it has.

        Raises:
            DataError: if it has none of them.
        """
        try:
            return row_format(self.first, self.text_field)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error


def require_one_format(parts: Sequence[Part]) -> None:
    """Refuse corpora that cannot stand in one dataset.

    Raises:
        DataError: naming two that differ.
    """
    for part in parts[1:]:
        if part.format != parts[0].format:
            raise DataError(
                f"{parts[0].where} holds {parts[0].format}, and {part.where} holds {part.format}. The corpora of a "
                "blend need one format: write all of them as texts, or all as conversations (messages)."
            )
        labelled = [set(one.first) & {*FORMATS["token ids"]} for one in (parts[0], part)]
        if part.format == "token ids" and labelled[0] != labelled[1]:
            raise DataError(
                f"{parts[0].where} has the columns {', '.join(sorted(labelled[0]))}, and {part.where} has "
                f"{', '.join(sorted(labelled[1]))}. Rows of token ids need the same columns in all corpora."
            )


def load_corpus(section: DatasetSection, where: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Load one corpus.

    Args:
        section: which.
        where: where it stands in the recipe, for messages.
        streaming: read rows while they are used.

    Raises:
        DataError: if it cannot be read, or has no column of those that are understood.
    """
    data = load_text_dataset(
        section.source, name=section.name, split=section.split, revision=section.revision, streaming=streaming
    )
    columns = column_names(data)
    if not {section.text_field, "input_ids", "messages", "conversations", "prompt"} & set(columns):
        raise DataError(
            f"{where}: {section.source} has the columns {', '.join(columns)}, and no {section.text_field!r}."
            f"{did_you_mean(section.text_field, columns)} Name the text column with text_field."
        )
    if section.num_rows is None:
        return data
    return data.take(section.num_rows) if streaming else data.select(range(min(section.num_rows, len(data))))


def blend(
    datasets: Sequence[Dataset | IterableDataset],
    parts: Sequence[Part],
    probabilities: Sequence[float],
    *,
    seed: int,
    stopping_strategy: str,
) -> Dataset | IterableDataset:
    """Draw rows of several corpora at random, in the same order in every call.

    Args:
        datasets: the corpora; all of them streams, or none.
        parts: what is known of each; texts get into a column `text`, ShareGPT's conversations into `messages`.
        probabilities: of each, that the next row is drawn from it.
        seed: seed of the draws.
        stopping_strategy: see `datasets.interleave_datasets`.

    Raises:
        DataError: if their rows cannot stand in one dataset.
    """
    from datasets import interleave_datasets

    require_one_format(parts)
    aligned = [_aligned(data, part) for data, part in zip(datasets, parts, strict=True)]
    kinds = aligned[0].features
    try:
        if kinds is not None:  # texts of a Parquet file may be `large_string`
            aligned = [one if one.features in (kinds, None) else one.cast(_kinds(one, kinds)) for one in aligned]
        return interleave_datasets(
            aligned,
            probabilities=list(probabilities),
            seed=seed,
            stopping_strategy=stopping_strategy,
        )
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{', '.join(part.where for part in parts)}: the columns of the corpora do not fit together: {error} "
            "Write them alike."
        ) from error


def _kinds(data: Any, kinds: Any) -> Any:
    """The features of a dataset, with those of another where both have a column."""
    from datasets import Features

    return Features({name: kinds.get(name, own) for name, own in data.features.items()})


def _aligned(data: Any, part: Part) -> Any:
    """A corpus with the columns of its format alone, by their common names."""
    if part.format == "texts":
        data = data.select_columns([part.text_field])
        return data if part.text_field == "text" else data.rename_column(part.text_field, "text")
    columns = column_names(data)
    if part.format == "conversations" and not is_conversation(part.first.get("messages")):
        removed = [name for name in ("messages", "conversations") if name in columns]
        return data.map(_with_messages, remove_columns=removed).select_columns(
            ["messages", *(name for name in TEMPLATE_COLUMNS if name in columns)]
        )
    return data.select_columns([name for name in FORMATS[part.format] if name in columns])


def _with_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": conversation_of(row["conversations"])}
