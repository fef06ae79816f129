"""Cuts documents into token rows of limited length."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .batches import TokenRows
from .documents import DataSource, Piece, TokenizedDocuments, documents
from .image_rows import image_rows
from .images import holds_images
from .tokens import missing_start, start_tokens, text_tokenizer


def token_rows(
    data: DataSource,
    processing_class: Any = None,
    *,
    max_length: int,
    num_rows: int | None = None,
    packing: bool = True,
    overlap: int = 0,
    text_field: str = "text",
    assistant_only: bool = False,
) -> TokenRows:
    """Turn texts, token ids or a dataset into token rows. Long because all arguments are explained.

    Args:
        data: an iterable of `str`, of conversations, of token-id sequences, or of mappings (a `datasets.Dataset`, for
            example) with the columns `input_ids` (without the padding that an `attention_mask` marks), `prompt` and
            `completion`, `messages`, or `text_field`; or a single `TokenRows`, returned unchanged. Chat templates are
            applied as by TRL's `SFTTrainer`, and a prompt is context alone. With a column `images` or `image` beside
            them, every row of the data becomes one row (`data.image_rows`).
        processing_class: tokenizer, or a processor with one; needed for text. Images need a processor. Every row
            begins with the tokens that it adds in front of a text (mostly the beginning-of-text token), also a row
            that begins inside a document, because many teachers are far worse without them. These tokens are context
            alone, see `TokenRows`.
        max_length: longest row, in tokens, including those.
        num_rows: number of rows after which to stop; None: all.
        packing: join documents (each behind a separator, see `separator_tokens`) and cut them into full rows, which
            need hardly any padding; NVIDIA/Megatron-LM#4807 measured packing at +5.8 MMLU on a pruned Qwen3-8B.
            Without it, every document starts its own row, and longer documents continue on further rows.
        overlap: 1 repeats the last token of a row at the start of the next row of the same stream, so that every
            token is predicted exactly once (perplexity); 0 for calibration.
        text_field: column that holds the text.
        assistant_only: count the assistant's turns of conversations alone, as training with `assistant_only_loss`
            does; all else is context. Other documents are refused.

    Returns:
        The rows. With `overlap=1`, `num_rows` stops after the document that reaches it, whose last rows are kept, so
        that bits per byte are exact; with `overlap=0` there are at most `num_rows` rows.

    Raises:
        DataError: if there is no text, no tokenizer for it, or less text than one row of two tokens; or if a setting
            is out of range.
    """
    if assistant_only and not getattr(data, "assistant_only", not isinstance(data, TokenRows)):
        raise DataError("assistant_only: this data was tokenised without it. Pass the conversations.")
    if isinstance(data, TokenRows):
        return data
    _require_documents(data)
    if holds_images(data):
        _require_row_settings(max_length, num_rows, overlap, [])
        return image_rows(
            data,
            processing_class,
            max_length=max_length,
            num_rows=num_rows,
            text_field=text_field,
            assistant_only=assistant_only,
        )
    if isinstance(data, TokenizedDocuments):
        processing_class = _same_tokenizer(data, processing_class)
    start = [] if processing_class is None else start_tokens(processing_class)
    _require_row_settings(max_length, num_rows, overlap, start)
    cutter = _Cutter(start, max_length, overlap, packing)
    pieces = data
    if not isinstance(data, TokenizedDocuments):
        pieces = documents(data, processing_class, text_field, assistant_only)
    for piece in pieces:
        cutter.add(piece)
        if num_rows is not None and len(cutter.rows) >= num_rows:
            break
    rows = cutter.result()
    if not rows.rows:
        number = cutter.num_documents
        found = "no documents" if number == 0 else f"{number} document(s) without a token to predict"
        raise DataError(f"The data holds {found}; expected at least one text of two tokens. Pass more text.")
    if num_rows is not None and overlap == 0 and len(rows) > num_rows:
        rows = rows.select(list(range(num_rows)))
    return rows


def tokenize_once(
    data: DataSource, processing_class: Any = None, text_field: str = "text", assistant_only: bool = False
) -> DataSource:
    """Wrap data that is cut into rows several times, so that it is tokenised once (`TokenizedDocuments`).

    What holds rows, batches or images, and what `token_rows` refuses, is returned unchanged. The arguments are those
    of `token_rows`.
    """
    from torch.utils.data import DataLoader

    if data is None or isinstance(data, TokenRows | TokenizedDocuments | DataLoader | str | os.PathLike | Mapping):
        return data
    if holds_images(data):
        return data
    return TokenizedDocuments(data, processing_class, text_field, assistant_only)


def _require_documents(data: DataSource) -> None:
    """Refuse a path, and a mapping, whose keys would be read as texts."""
    if isinstance(data, str | os.PathLike):
        raise DataError(
            f"Expected texts, token rows or a dataset, got the string {str(data)[:80]!r}. "
            "Pass a list of texts, or load a file with minitron_hf.load_text_dataset(path)."
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"Expected texts, token rows or a dataset, got a {type(data).__name__} with the keys "
            f"{', '.join(map(str, data))}. Pass one of its values: a split, or its rows."
        )


def _same_tokenizer(data: TokenizedDocuments, processing_class: Any) -> Any:
    """The tokenizer of tokenised documents, which is the only one that may be given."""
    same = processing_class is data.processing_class
    if processing_class is not None and not same and text_tokenizer(processing_class) is not data.processing_class:
        raise DataError("These documents were tokenised with another tokenizer. Pass the texts themselves.")
    return data.processing_class


def _require_row_settings(max_length: int, num_rows: int | None, overlap: int, start: list[int]) -> None:
    """Refuse settings of `token_rows` that are out of range."""
    if max_length < 2:
        raise DataError(f"max_length={max_length} is too short: a row needs two tokens to predict one.")
    if overlap not in (0, 1):
        raise DataError(f"overlap={overlap}, expected 0 or 1.")
    if num_rows is not None and num_rows < 1:
        raise DataError(f"num_rows={num_rows}, expected at least 1, or None for all.")
    if max_length < len(start) + overlap + 1:
        raise DataError(
            f"max_length={max_length} is too short: every row begins with the {len(start)} token(s) that the "
            f"tokenizer adds. Expected at least {len(start) + overlap + 1}."
        )


#: Marks of the tokens of a stream.
_CONTEXT, _BEGINS_WITH_START, _FIRST = 1, 2, 4


class _Cutter:
    """Cuts a stream of documents into rows, each of which begins with the start tokens of its document."""

    def __init__(self, start: list[int], max_length: int, overlap: int, packing: bool) -> None:
        self.start, self.max_length, self.overlap, self.packing = start, max_length, overlap, packing
        self.num_documents = 0
        self.num_bytes: int | None = 0
        self.stream: list[int] = []
        self.marks = bytearray()
        self.rows: list[tuple[int, ...]] = []
        self.context: list[tuple[int, ...]] = []
        self.continues: list[bool] = []

    def add(self, piece: Piece) -> None:
        """Append a piece to the stream, and take the rows that it fills."""
        self.num_documents += piece.is_first
        self._count_bytes(piece)
        begins = _BEGINS_WITH_START if piece.begins_with_start else 0
        marks = bytearray([begins]) * len(piece.ids)
        for position in (*range(min(piece.num_context, len(marks))), *piece.context):
            marks[position] |= _CONTEXT
        if piece.is_first and marks:
            marks[0] |= _FIRST
        self.stream += piece.ids
        self.marks += marks
        self._cut(flush=piece.is_last and not self.packing)

    def _count_bytes(self, piece: Piece) -> None:
        if self.num_bytes is None or piece.num_bytes is None:
            self.num_bytes = None
            return
        # Nothing predicts the first token of a stream.
        begun = self.packing and bool(self.stream or self.rows)
        self.num_bytes += piece.num_bytes - (0 if begun else piece.num_first_bytes)

    def _cut(self, *, flush: bool) -> None:
        """Take full rows from the stream, and with `flush` also the rest."""
        place = 0
        while len(self.stream) - place > self.overlap:
            front = self.stream[place : place + len(self.start)]
            added = missing_start(front, self.start) if self.marks[place] & _BEGINS_WITH_START else []
            room = self.max_length - len(added)
            if len(self.stream) - place < room and not flush:
                break
            self._take(added, place, place + room)
            place += room - self.overlap
        self.stream = [] if flush else self.stream[place:]
        self.marks = bytearray() if flush else self.marks[place:]

    def _take(self, added: list[int], place: int, end: int) -> None:
        row = (*added, *self.stream[place:end])
        marks = self.marks[place:end]
        repeated = self.overlap if added and not marks[0] & _FIRST else 0
        context = [
            *range(len(added) + repeated),
            *(len(added) + i for i, mark in enumerate(marks) if mark & _CONTEXT and i >= repeated),
        ]
        if set(range(1, len(row))) - set(context):  # a row that predicts nothing is left out
            self.rows.append(row)
            self.context.append(tuple(context))
            self.continues.append(not marks[0] & _FIRST)

    def result(self) -> TokenRows:
        """All rows, with the rest of the stream."""
        self._cut(flush=True)
        num_bytes = self.num_bytes if self.overlap else None
        context = tuple(self.context) if any(self.context) else ()
        return TokenRows(tuple(self.rows), num_bytes, self.overlap, context, tuple(self.continues))
