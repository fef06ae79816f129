"""Reads the corpora of a recipe: single ones, and blends of several, whose rows are drawn by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..compat import column_names
from ..data import load_text_dataset
from ..data.conversations import conversation_of, is_conversation
from ..data.formats import FORMATS, WITH_IMAGES, row_format
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
                "blend need one format: write all of them as texts, or all as conversations (messages); among rows "
                "with images, rows without need an empty list as `images`."
            )
        labelled = [set(one.first) & {*FORMATS["token ids"]} for one in (parts[0], part)]
        if part.format == "token ids" and labelled[0] != labelled[1]:
            raise DataError(
                f"{parts[0].where} has the columns {', '.join(sorted(labelled[0]))}, and {part.where} has "
                f"{', '.join(sorted(labelled[1]))}. Rows of token ids need the same columns in all corpora."
            )


def require_one_kind(parts: Sequence[Part]) -> None:
    """Refuse corpora of one format whose columns hold different kinds of values, as their first rows have them.

    Raises:
        DataError: naming the column, the two kinds and the two corpora.
    """
    joined: Any = None
    for part in parts:
        kinds = _first_kinds(part)
        joined = kinds if joined is None else _joined(joined, kinds, parts[0].where, part.where)


def _first_kinds(part: Part) -> Any:
    """The features of a part's first row, in the columns that a blend keeps; unknown ones are left out."""
    import pyarrow as pa
    from datasets import Features

    row = dict(part.first)
    if part.format.startswith("conversations") and not is_conversation(row.get("messages")):
        row["messages"] = conversation_of(row["conversations"])
    found: dict[str, Any] = {}
    for name in (name for name in FORMATS[part.format] if name in row):
        try:
            found |= Features.from_arrow_schema(pa.Table.from_pylist([{name: row[name]}]).schema)
        except (pa.ArrowException, ValueError, TypeError):
            continue  # values of several kinds in one row, which `datasets` may store as JSON
    return found


def _joined(one: Any, other: Any, here: str, there: str, column: str = "") -> Any:
    """The features that hold the values of both: columns and entries of either, null where a corpus has none.

    Raises:
        DataError: if a value has different kinds.
    """
    from datasets import LargeList, List, Value

    if one == other or _is_null(other):
        return one
    if _is_null(one):
        return other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        inner = {
            name: _joined(one[name], other[name], here, there, f"{column}.{name}" if column else name)
            for name in one.keys() & other.keys()
        }
        return {**one, **{name: inner.get(name, kind) for name, kind in other.items()}}
    if isinstance(one, List | LargeList) and isinstance(other, List | LargeList):
        return List(_joined(one.feature, other.feature, here, there, column))
    if isinstance(one, Value) and isinstance(other, Value):
        for kinds, widest in _WIDEST.items():
            if one.dtype.startswith(kinds) and other.dtype.startswith(kinds):
                return Value(widest)
    raise DataError(
        f"The column {column!r} holds {_kind_name(one)} in {here}, and {_kind_name(other)} in {there}. The corpora of "
        "a blend need the same kinds of values: write them alike."
    )


#: Beginnings of the names of kinds that stand for each other → the kind that holds all of them.
_WIDEST: Mapping[tuple[str, ...], str] = {
    ("string", "large_string"): "string",
    ("int", "uint", "bool"): "int64",
    ("float", "double", "half"): "float64",
}


def _is_null(kind: Any) -> bool:
    return getattr(kind, "dtype", None) == "null"


def _kind_name(kind: Any) -> str:
    """What a column holds, in words."""
    if isinstance(kind, Mapping):
        return f"entries ({', '.join(kind)})"
    if hasattr(kind, "feature"):
        return f"lists of {_kind_name(kind.feature)}"
    name = str(getattr(kind, "dtype", type(kind).__name__))
    return "text" if name in ("string", "large_string") else name


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
    require_one_kind(parts)
    aligned = [_aligned(data, part) for data, part in zip(datasets, parts, strict=True)]
    try:
        return interleave_datasets(
            _cast_to_one(aligned, parts),
            probabilities=list(probabilities),
            seed=seed,
            stopping_strategy=stopping_strategy,
        )
    except DataError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:  # the last one of Arrow
        raise DataError(
            f"{', '.join(part.where for part in parts)}: the columns of the corpora do not fit together: {error} "
            "Write them alike."
        ) from error


def _cast_to_one(datasets: Sequence[Any], parts: Sequence[Part]) -> list[Any]:
    """The corpora with the features that hold the values of all, where a stream knows its features."""
    from datasets import Features

    if any(one.features is None for one in datasets):
        return list(datasets)
    joined: Any = dict(datasets[0].features)
    for one, part in zip(datasets[1:], parts[1:], strict=True):
        joined = _joined(joined, dict(one.features), parts[0].where, part.where)
    wanted = [Features({name: joined[name] for name in one.features}) for one in datasets]
    return [one if one.features == kinds else one.cast(kinds) for one, kinds in zip(datasets, wanted, strict=True)]


def with_text_in(data: Any, field: str, wanted: str) -> Any:
    """A corpus whose text is in a column of another name.

    Args:
        data: rows of any format; those without texts stay as they are.
        field: column with the text.
        wanted: its new name.
    """
    columns = column_names(data)
    if field == wanted or field not in columns:
        return data
    return data.remove_columns([wanted] if wanted in columns else []).rename_column(field, wanted)


def _aligned(data: Any, part: Part) -> Any:
    """A corpus with the columns of its format alone, by their common names."""
    if part.format.startswith("texts"):
        data = with_text_in(data, part.text_field, "text")
    columns = column_names(data)
    if part.format.endswith(WITH_IMAGES) and "images" not in columns:
        data = data.map(_with_images, remove_columns=["image"])
    if part.format.startswith("conversations") and not is_conversation(part.first.get("messages")):
        removed = [name for name in ("messages", "conversations") if name in columns]
        data = data.map(_with_messages, remove_columns=removed)
    columns = column_names(data)
    return data.select_columns([name for name in FORMATS[part.format] if name in columns])


def _with_images(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"images": [] if row["image"] is None else [row["image"]]}


def _with_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": conversation_of(row["conversations"])}
