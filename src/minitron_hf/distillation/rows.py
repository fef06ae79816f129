"""Training rows: TRL's, with the start tokens that the teacher expects, within the context of both models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from trl import is_conversational, is_conversational_from_value

from ..compat import collates_images, column_names, trains_on_images
from ..data import TokenRows
from ..data.context import row_limit
from ..data.conversations import conversation_of, is_conversation
from ..data.images import (
    PLACE,
    ImageCollator,
    has_images,
    read_row,
    refuse_image_parts,
)
from ..data.tokens import missing_start, separator_tokens, start_tokens, text_tokenizer
from ..errors import DataError
from ..losses.heads import base_model_of
from ..scoring.row_starts import NUM_ROWS, NUM_TOKENS, warn_of_broken_starts
from .batches import WithCachedImages, WithCachedTeacher, WithKnownTokens, WithRowLengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

#: Rows whose lengths are looked at.
SAMPLED_ROWS = 1024


def limit_to_context(args: Any, **configs: PretrainedConfig) -> None:
    """Lower `max_length` to the shortest context of the models, with a message.

    Args:
        args: of the trainer; changed.
        **configs: role → config of the model.
    """
    if note := lower_to_context(args, **configs):
        logger.warning(note)


def lower_to_context(args: Any, **configs: PretrainedConfig) -> str | None:
    """As `limit_to_context`, but returns the message.

    Args:
        args: of the trainer; changed.
        **configs: role → config of the model.
    """
    if args.max_length is None and args.padding_free and not args.packing:
        return None  # TRL requires this; the collator checks each row
    args.max_length, note = row_limit(args.max_length, **configs)
    return note


@dataclass
class WithinContext:
    """A collator that refuses rows longer than the models' context, such as uncut rows that came tokenised."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    context: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        lengths = [
            max(example["seq_lengths"], default=0) if "seq_lengths" in example else len(example.get("input_ids", ()))
            for example in examples
        ]
        longest = max(lengths) or batch["input_ids"].shape[1]
        if self.context is not None and longest > self.context:
            raise DataError(
                f"A row has {longest} tokens, and the context of the models is {self.context}. Cut the rows, or set "
                f"max_length={self.context}."
            )
        return batch


class PlacedRows(Sequence[Any]):
    """Rows with images that say in a column of their own which ones they are: training reads them shuffled.

    Args:
        rows: a dataset.
        name: what messages call it.
        numbers: which of its rows; None: all.
    """

    def __init__(self, rows: Any, name: str, numbers: Sequence[int] | None = None) -> None:
        self.rows, self.name = rows, name
        self.numbers = range(len(rows)) if numbers is None else numbers

    @classmethod
    def of(cls, data: Any, name: str) -> Any:
        """The rows of a dataset with images, or of several by name; streams and other data as they are."""
        if isinstance(data, Mapping):
            return {part: cls.of(rows, part) for part, rows in data.items()}
        return cls(data, name) if isinstance(data, Dataset) else data

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        place = f"Row {self.numbers[index]} (counted from 0) of the {self.name} dataset"
        try:
            return {**read_row(self.rows, self.numbers[index]), PLACE: place}
        except DataError as error:
            raise DataError(f"{place}: {error}") from error

    def select(self, indices: Sequence[int]) -> PlacedRows:
        """Some of the rows, with the numbers that they have among all."""
        return PlacedRows(self.rows, self.name, [self.numbers[index] for index in indices])


def choose_rows(trainer: Any) -> None:
    """Let rows with images say which ones they are, and evaluate on at most `max_eval_rows` rows."""
    if trains_on_images(trainer):
        trainer.train_dataset = PlacedRows.of(trainer.train_dataset, "train")
        trainer.eval_dataset = PlacedRows.of(trainer.eval_dataset, "eval")
    trainer.eval_dataset = some_rows(trainer.eval_dataset, trainer.args.max_eval_rows)


def training_collator(trainer: Any, context: int | None, vocab_size: int) -> Any:
    """The trainer's collator, which also adds row lengths and cached teacher logits and checks lengths and tokens."""
    collator = WithRowLengths(trainer.data_collator) if trainer.padding_free else trainer.data_collator
    if trains_on_images(trainer):  # some models have the embeddings of image tokens elsewhere
        if collates_images(collator):
            collator = ImageCollator.around(collator, trainer.processing_class, base_model_of(trainer.model).config)
        return WithinContext(WithCachedImages(collator), context)
    return WithKnownTokens(WithinContext(WithCachedTeacher(collator), context), vocab_size)


def try_first_images(trainer: Any) -> None:
    """Make a batch of the first row of every dataset with images, before training begins.

    Raises:
        DataError: if a row cannot be read.
    """
    if not trains_on_images(trainer):
        return
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {"eval": trainer.eval_dataset}
    for name, dataset in {"train": trainer.train_dataset, **evaluated}.items():
        if dataset is not None:
            first = next(iter(dataset))
            trainer.data_collator([{PLACE: f"The first row of the {name} dataset", **first}])


def holds_conversation(row: Mapping[str, Any]) -> bool:
    """Whether TRL renders a row by the chat template, in either of the formats that it knows."""
    row = {name: value for name, value in row.items() if name != "prompt" or "completion" in row}
    return is_conversational(row) or is_conversational_from_value(row)


def standard_conversations(data: Any) -> Any:
    """Conversations as TRL reads them: without a spare column `prompt`, and with the roles of chat templates.

    Chat corpora repeat the first message in a column `prompt` that has no completion beside it. TRL would take it for
    the prompt of a completion. It would keep the roles of ShareGPT, which templates leave out.

    Args:
        data: a dataset, a stream, several by name, or None.
    """
    if isinstance(data, Mapping):
        return {name: standard_conversations(part) for name, part in data.items()}
    if not isinstance(data, Dataset | IterableDataset):
        return data
    names = set(data.column_names or next(iter(data), {}))
    if "prompt" in names and "completion" not in names and {"messages", "conversations"} & names:
        data = data.remove_columns("prompt")
    if "conversations" in names and not names & {"messages", "images", "image"}:
        first: Any = next(iter(data), {"conversations": None})["conversations"]
        if is_conversation(first) and "from" in first[0]:
            return data.map(_with_messages, remove_columns="conversations")
    return data


def _with_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": conversation_of(row["conversations"])}


class StartTokensMixin:
    """Mixin for an `SFTTrainer` that begins every row with the tokens that the tokenizer adds in front of a text.

    TRL cuts rows in the middle of documents (`packing_strategy="wrapped"` and `"bfd_split"`, and
    `truncation_mode="keep_end"`). The rest of a document lacks the start token, without which many teachers give
    poor logits. Start tokens are never targets, neither there nor inside a packed row. Rows without any target are
    left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("formatting_func") is None:
            for name in {"train_dataset", "eval_dataset"} & kwargs.keys():
                kwargs[name] = standard_conversations(kwargs[name])
        super().__init__(*args, **kwargs)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        prepare = super()._prepare_dataset  # type: ignore[misc] # of SFTTrainer (trl 1.16)
        if "seq_lengths" in column_names(dataset):  # packed before
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        refuse_empty(dataset, dataset_name)
        first = next(iter(dataset))
        _require_text(dataset, first, "text" if formatting_func else args.dataset_text_field, dataset_name)
        is_rendered = formatting_func is None and holds_conversation(first)
        if is_rendered and "input_ids" not in first:
            _require_chat_template(processing_class, dataset_name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        tokens = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        start = start_tokens(processing_class)
        if is_rendered and missing_start(next(iter(tokens))["input_ids"], start):
            start = []  # the chat template decides how a conversation begins
        wrapped = packing and args.packing_strategy == "wrapped"
        maps: dict[str, Any] = {}
        if isinstance(tokens, Dataset):  # `map` of a stream takes neither
            maps = {"num_proc": args.dataset_num_proc, "desc": f"Preparing rows of {dataset_name} dataset"}
        cut = copy.copy(args)
        if start:
            if args.max_length is not None and args.max_length <= len(start):
                raise DataError(
                    f"max_length={args.max_length} leaves no room behind the {len(start)} start token(s) that the "
                    "tokenizer adds to every row. Set a larger max_length."
                )
            settings = {
                "start": start,
                "longest": None if wrapped else args.max_length,
                "cuts": ("split" if args.packing_strategy == "bfd_split" else "keep_start")
                if packing
                else args.truncation_mode,
            }
            tokens = tokens.select_columns(["input_ids", "labels"])
            tokens = tokens.map(_with_start_tokens, batched=True, fn_kwargs=settings, **maps)
            if wrapped:
                cut.max_length = args.max_length - len(start)
        if not wrapped:
            tokens = rows_with_targets(tokens, dataset_name, maps)
        rows = prepare(tokens, processing_class, cut, packing, None, dataset_name)
        if next(iter(rows), None) is None:  # cut to max_length, none holds a target
            raise DataError(
                f"No token counts in the first {args.max_length} tokens of any row of the {dataset_name} dataset. Set "
                "a larger max_length."
            )
        if wrapped:
            if start:
                settings = {"start": start, "longest": None, "cuts": "keep_start", "masks": False}
                rows = rows.map(_with_start_tokens, batched=True, fn_kwargs=settings, **maps)
            rows = rows_with_targets(rows, dataset_name, maps)
        return rows


def warn_of_missing_start(trainer: Any) -> None:
    """Warn if the teacher predicts the rows far better behind a token that the tokenizer does not add."""
    rows, teacher = trainer.train_dataset, trainer.teacher_model
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if teacher is None or sharded or not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    front = separator_tokens(trainer.processing_class)
    if start_tokens(trainer.processing_class) or not front:
        return
    some = [row[: NUM_TOKENS + 1] for row in rows.select(range(min(NUM_ROWS, len(rows))))["input_ids"]]
    some = [tuple(row) for row in some if row[:1] != front]
    with trainer.accelerator.autocast():
        warn_of_broken_starts(
            teacher, TokenRows(tuple(some), None, continues=(True,) * len(some)), "The teacher", front
        )


def some_rows(data: Any, count: int | None) -> Any:
    """At most `count` rows at equal distances, of every dataset if there are several by name; None: all.

    A stream is cut after them, because its length is not known.
    """
    if data is None or count is None:
        return data
    if isinstance(data, Mapping):
        return {name: some_rows(part, count) for name, part in data.items()}
    if not hasattr(data, "__len__"):
        return data.take(count)
    return data if len(data) <= count else data.select([index * len(data) // count for index in range(count)])


def longest_row(rows: Any) -> int | None:
    """Tokens of the longest document or piece of one among some training rows; None of streams and other rows.

    Documents that are packed apart (`seq_lengths`) begin at position 0 each.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return None
    some = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)))
    if "seq_lengths" in rows.column_names:
        return max((max(lengths, default=0) for lengths in some["seq_lengths"]), default=None)
    return max(map(len, some["input_ids"]), default=None)


def refuse_empty(dataset: Any, name: str) -> None:
    """Refuse a dataset without rows.

    Raises:
        DataError: if it has none.
    """
    if dataset is None or (hasattr(dataset, "__len__") and len(dataset)):  # images are not decoded for this
        return
    if next(iter(dataset), None) is None:
        raise DataError(f"The {name} dataset holds no rows. Pass more data.")


def _require_chat_template(processing_class: Any, name: str) -> None:
    templates = (getattr(one, "chat_template", None) for one in (processing_class, text_tokenizer(processing_class)))
    if not any(templates):
        raise DataError(
            f"The {name} dataset holds conversations, and the tokenizer has no chat template. Set "
            "tokenizer.chat_template or chat_template_path, or use texts."
        )


def _require_text(dataset: Any, first: dict[str, Any], text_field: str, name: str) -> None:
    """Refuse rows in which TRL would not find their text, or would find something else.

    Args:
        dataset: the rows.
        first: one of them.
        text_field: column of the text, for rows that are neither tokens, nor conversations, nor prompts.
        name: of the dataset, for messages.

    Raises:
        DataError: naming the column.
    """
    if has_images(first):
        raise DataError(
            f"The {name} dataset has images, and the train dataset has none. Train on images too, or leave them out."
        )
    if "input_ids" in first:
        return
    if holds_conversation(first):
        refuse_image_parts(message for value in first.values() if is_conversation(value) for message in value)
        return
    for field in ("prompt", "completion") if "prompt" in first else (text_field,):
        if field not in first:
            raise DataError(
                f"The {name} dataset has no column {field!r}; its columns are {', '.join(map(repr, first))}. Set "
                "dataset_text_field to the column that holds the text, or pass formatting_func."
            )
        if not isinstance(first[field], str):
            raise DataError(
                f"The column {field!r} of the {name} dataset holds a {type(first[field]).__name__}, expected text. "
                "Set dataset_text_field to the column that holds the text, or pass formatting_func."
            )
        if not isinstance(dataset, Dataset):
            continue
        if absent := dataset.with_format("arrow")[:][field].null_count:
            raise DataError(f"The column {field!r} of the {name} dataset is empty in {absent} rows. Leave them out.")
        if field != "prompt" and not any(text.strip() for text in dataset[field]):  # stops at the first text
            raise DataError(f"The column {field!r} of the {name} dataset holds no text in any row. Pass more data.")


def rows_with_targets(rows: Any, name: str, maps: Mapping[str, Any]) -> Any:
    """The rows in which a token counts; a message tells how many others are left out.

    Args:
        rows: with labels.
        name: of the dataset, for messages.
        maps: arguments of `datasets.Dataset.filter`.

    Raises:
        DataError: if there are none.
    """
    kept = rows.filter(_has_target, **maps)
    if isinstance(rows, Dataset):
        if not len(kept):
            raise DataError(
                f"No token counts in any of the {len(rows)} rows of the {name} dataset: they are shorter than two "
                "tokens, or their labels are -100. Pass more data, or check max_length and completion_only_loss."
            )
        if len(kept) < len(rows):
            logger.warning("%d rows of the %s dataset hold no target and are left out.", len(rows) - len(kept), name)
        return kept if len(kept) < len(rows) else rows
    if next(iter(kept), None) is None:
        raise DataError(f"No token counts in any row of the {name} dataset. Pass more data.")
    return kept


def _has_target(row: Mapping[str, Any]) -> bool:
    return any(label != -100 for label in islice(row["labels"], 1, None))


def _with_start_tokens(
    rows: Mapping[str, list[list[int]]], start: Sequence[int], longest: int | None, cuts: str, masks: bool = True
) -> dict[str, list[list[int]]]:
    """Add the start tokens to rows, and cut documents that are too long.

    Args:
        rows: `input_ids` and `labels` of each.
        start: tokens that the tokenizer adds in front of a text.
        longest: tokens of a row; longer documents are cut. None cuts nothing.
        cuts: `"keep_start"` leaves the cutting to TRL, `"keep_end"` keeps the end, `"split"` makes several rows.
        masks: whether the rows are documents, whose start tokens are not targets, or pieces of a stream.
    """
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}

    def add(ids: list[int], labels: list[int]) -> None:
        lacking = missing_start(ids, start)
        found["input_ids"].append([*lacking, *ids])
        found["labels"].append([*([-100] * len(lacking)), *labels])

    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        ids, labels = list(ids), list(labels)
        if masks and ids:
            lacking = missing_start(ids, start)
            own = len(start) - len(lacking)
            ids, labels = [*lacking, *ids], [*([-100] * len(start)), *labels[own:]]
        if longest is None or len(ids) <= longest or cuts == "keep_start":
            add(ids, labels)
        elif cuts == "keep_end":
            kept = longest - len(start)
            add(ids[-kept:], labels[-kept:])
        else:
            place, room = 0, longest
            while place < len(ids):
                add(ids[place : place + room], labels[place : place + room])
                place, room = place + room, longest - len(start)
    return found
