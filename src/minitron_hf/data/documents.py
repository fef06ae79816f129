"""Reads documents of any source as token ids: texts, conversations, prompts with completions, token ids.

Long texts are read in pieces, so memory does not grow with the longest document.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, cut_short
from .conversations import conversation_of as conversation_of
from .conversations import is_conversation as is_conversation
from .conversations import render_conversation as render_conversation
from .conversations import render_text as render_text
from .images import has_images
from .tokens import (
    added_tokens,
    missing_start,
    require_tokenizer,
    separator_tokens,
    start_tokens,
    tokenize,
    with_end,
)
from .turns import assistant_tokens

#: Everything that `token_rows` reads: texts, conversations, token ids, or a dataset (or its rows) with such columns.
DataSource = Any

#: Most documents, and most characters of all of them, that are tokenised at a time.
BATCH_SIZE, BATCH_CHARACTERS = 256, 1 << 18
#: Characters before a cut that are tokenised again, so that the tokens after it equal those of the whole text.
OVERLAP_CHARACTERS = 64

_CONVERSATION = ("messages", "conversations")


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        ids: token ids.
        num_context: number of leading tokens that are context alone: start tokens, or a prompt.
        begins_with_start: whether the document, and so each of its rows, begins with the tokenizer's start tokens.
        num_bytes: UTF-8 bytes of the text; None for token ids and messages.
        num_first_bytes: UTF-8 bytes of its first token if that is the first token of the document, and so unpredicted.
        context: positions of further tokens that are context alone: turns of others than the assistant.
        is_first: whether the document begins here.
        is_last: whether the document ends here.
    """

    ids: list[int]
    num_context: int = 0
    begins_with_start: bool = False
    num_bytes: int | None = None
    num_first_bytes: int = 0
    is_first: bool = True
    is_last: bool = True
    context: tuple[int, ...] = ()


def documents(
    data: DataSource, processing_class: Any, text_field: str, assistant_only: bool = False
) -> Iterator[Piece]:
    """Yield all documents that are not empty. Texts are tokenised in batches, which is much faster.

    Args:
        data: as of `token_rows`.
        processing_class: tokenizer, or a processor with one; needed for text.
        text_field: column that holds the text.
        assistant_only: whether all of a conversation but the assistant's turns is context alone.

    Raises:
        DataError: if a document cannot be read, or a tokenizer is needed and missing.
    """
    start = [] if processing_class is None else start_tokens(processing_class)
    front = start if start or processing_class is None else separator_tokens(processing_class)
    batch: list[str | Piece] = []
    num_characters = 0
    for number, document in enumerate(data):
        value = _numbered_content(number, document, text_field, processing_class, start, assistant_only)
        if isinstance(value, str):
            if len(value) > BATCH_CHARACTERS:
                yield from _encode(batch, processing_class, start, front)
                batch, num_characters = [], 0
                yield from _pieces_of(value, processing_class, start, front)
                continue
            num_characters += len(value)
        batch.append(value)
        if len(batch) == BATCH_SIZE or num_characters > BATCH_CHARACTERS:
            yield from _encode(batch, processing_class, start, front)
            batch, num_characters = [], 0
    yield from _encode(batch, processing_class, start, front)


class TokenizedDocuments:
    """Documents that are tokenised once, when they are first read.

    Every pass over it yields the same pieces: `token_rows` cuts them into rows of any length without the tokenizer.

    Args:
        data: as of `token_rows`; a generator is read as far as rows are needed.
        processing_class: tokenizer, or a processor with one; needed for text.
        text_field: column that holds the text.
        assistant_only: whether all of a conversation but the assistant's turns is context alone.
    """

    def __init__(
        self, data: DataSource, processing_class: Any = None, text_field: str = "text", assistant_only: bool = False
    ) -> None:
        self.processing_class, self.assistant_only = processing_class, assistant_only
        self._read: list[Piece] = []
        self._unread = documents(data, processing_class, text_field, assistant_only)

    def __iter__(self) -> Iterator[Piece]:
        for position in itertools.count():
            if position == len(self._read):
                piece = next(self._unread, None)
                if piece is None:
                    return
                self._read.append(piece)
            yield self._read[position]


def _encode(batch: list[str | Piece], processing_class: Any, start: list[int], front: list[int]) -> Iterator[Piece]:
    texts = [value for value in batch if isinstance(value, str)]
    if texts:
        require_tokenizer(processing_class)
    encoded = iter(tokenize(texts, processing_class) if texts else [])
    for value in batch:
        if not isinstance(value, str):
            if value.ids:
                yield value
            continue
        ids = next(encoded)
        if value.strip():
            yield Piece(
                ids,
                num_context=len(start),
                begins_with_start=bool(start),
                num_bytes=len(value.encode()),
                num_first_bytes=0 if front else _first_bytes(value, processing_class),
            )


def _pieces_of(text: str, processing_class: Any, start: list[int], front: list[int]) -> Iterator[Piece]:
    """Split a long text into pieces, whose tokens together are those of the whole text."""
    tokenizer = require_tokenizer(processing_class)

    def bare_ids(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    place = 0
    while place < len(text):
        end = _cut(text, place)
        part, before = text[place:end], text[max(0, place - OVERLAP_CHARACTERS) : place]
        ids, known = bare_ids(before + part), bare_ids(before) if before else []
        # If the cut changes tokens before it, the part is tokenised alone.
        ids = ids[len(known) :] if ids[: len(known)] == known else bare_ids(part)
        is_first, is_last = place == 0, end == len(text)
        suffix = added_tokens(tokenizer)[1] if is_last else []
        yield Piece(
            [*(front if is_first else ()), *ids, *suffix],
            num_context=len(start) if is_first else 0,
            begins_with_start=bool(start),
            num_bytes=len(part.encode()),
            num_first_bytes=_first_bytes(part, tokenizer) if is_first and not front else 0,
            is_first=is_first,
            is_last=is_last,
        )
        place = end


def _cut(text: str, place: int) -> int:
    """End of a piece that begins at `place`: before a single space or line break, if there is one."""
    end = place + BATCH_CHARACTERS
    if end >= len(text):
        return len(text)
    for match in re.finditer(r"\S(?=\s\S)", text[end:place:-1]):
        return end - match.end()
    return end


def _first_bytes(text: str, processing_class: Any) -> int:
    """UTF-8 bytes of the first token, which no token predicts."""
    tokenizer = require_tokenizer(processing_class)
    text = text[:1024]
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return len(text[: offsets[1][0] if len(offsets) > 1 else len(text)].encode())
    first = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:1]
    return len(str(tokenizer.decode(first)).strip().encode())


def _numbered_content(
    number: int, document: Any, text_field: str, processing_class: Any, start: list[int], assistant_only: bool
) -> str | Piece:
    """Content of a document; every refusal names its number.

    Raises:
        DataError: if the document cannot be read.
    """
    try:
        if assistant_only:
            return _turns(document, processing_class, start)
        value = _content(document, text_field, processing_class, start)
        if isinstance(value, str):
            _require_encodable(value)
        return value
    except DataError as error:
        raise DataError(f"Document {number} (counted from 0): {error}") from error


def _content(document: Any, text_field: str, processing_class: Any, start: list[int]) -> str | Piece:
    if isinstance(document, Mapping):
        if has_images(document):
            raise DataError(
                "It has images, and is read one at a time. Pass a dataset or a list of all rows, of which every one "
                "has a list 'images', empty where there is none."
            )
        if "input_ids" in document:
            ids, mask = document["input_ids"], document.get("attention_mask")
            document = ids if mask is None else [token for token, kept in zip(_as_list(ids), _as_list(mask)) if kept]
        elif "prompt" in document and "completion" in document:
            return _completion(document, processing_class, start)
        elif name := next((name for name in _CONVERSATION if is_conversation(document.get(name))), None):
            ids = render_conversation(document[name], document, processing_class)
            return _piece_of_ids(ids, start, add=False)
        elif text_field in document:
            document = document[text_field]
        else:
            raise DataError(
                f"A row of the dataset has the columns {sorted(document)}; expected 'input_ids', 'messages', 'prompt' "
                f"and 'completion', or {text_field!r}. Name the text column with text_field=…"
            )
    if isinstance(document, str):
        return document
    document = _as_list(document)
    if isinstance(document, Iterable):
        ids = list(document)
        if all(isinstance(token, int) for token in ids):
            return _piece_of_ids(ids, start, add=True)
        if is_conversation(ids):
            return _piece_of_ids(render_conversation(ids, {}, processing_class), start, add=False)
    raise DataError(
        f"Expected a text, a conversation or a sequence of token ids, got {type(document).__name__}: "
        f"{cut_short(str(document), 60)!r}."
    )


def _piece_of_ids(ids: list[int], start: list[int], *, add: bool, num_context: int = 0) -> Piece:
    """Token ids as a document.

    Args:
        ids: token ids.
        start: start tokens of the tokenizer.
        add: whether to add missing start tokens. A conversation begins as its template renders it.
        num_context: number of leading tokens that are context alone.
    """
    if not ids:
        return Piece([])
    missing = missing_start(ids, start)
    if add and missing:
        ids, missing = [*missing, *ids], []
    begins = bool(start) and not missing
    return Piece(ids, num_context=max(num_context, len(start) if begins else 0), begins_with_start=begins)


# Completions, read like TRL's SFTTrainer


def _turns(document: Any, processing_class: Any, start: list[int]) -> Piece:
    """A conversation of which only the assistant's turns are no context."""
    row = document if isinstance(document, Mapping) else {"messages": document}
    found = [row.get(name) for name in ("prompt" if "completion" in row else "", *_CONVERSATION)]
    if "input_ids" in row or not any(is_conversation(value) for value in found):
        raise DataError(
            "assistant_only counts the assistant's turns of conversations, and this is none: expected 'messages', or "
            "'prompt' and 'completion' with lists of messages."
        )
    ids, counts = assistant_tokens(row, processing_class)
    piece = _piece_of_ids(ids, start, add=False)
    return replace(piece, context=tuple(place for place, one in enumerate(counts) if not one))


def _completion(row: Mapping[str, Any], processing_class: Any, start: list[int]) -> Piece:
    """A prompt, which is context alone, and its completion."""
    prompt, completion = row["prompt"], row["completion"]
    if is_conversation(prompt) and is_conversation(completion):
        before = render_conversation(prompt, row, processing_class, add_generation_prompt=True)
        ids = render_conversation([*prompt, *completion], row, processing_class)
    elif isinstance(prompt, str) and isinstance(completion, str):
        tokenizer = require_tokenizer(processing_class)
        completion = with_end(completion, tokenizer)
        before = tokenizer(prompt, verbose=False)["input_ids"]
        ids = tokenizer(prompt + completion, verbose=False)["input_ids"]
    else:
        raise DataError(
            f"A row has the prompt {cut_short(str(prompt), 60)!r} and the completion "
            f"{cut_short(str(completion), 60)!r}; expected two texts or two lists of messages."
        )
    shared = next((i for i, (one, other) in enumerate(zip(before, ids)) if one != other), min(len(before), len(ids)))
    return _piece_of_ids(ids, start, add=False, num_context=shared)


def _require_encodable(text: str) -> None:
    """Refuse text that UTF-8 cannot encode.

    Raises:
        DataError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"It is not valid text: {error}. Clean it, for example with text.encode('utf-8', 'replace').decode()."
        ) from error


def _as_list(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values
