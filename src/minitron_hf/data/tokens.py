"""Tokenises texts, and finds the tokens that a tokenizer adds to them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import KINDS, ArgumentError, DataError
from ..files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer; of a processor (of texts and images), its tokenizer.

    Raises:
        ArgumentError: if it is something else, such as a path.
    """
    if isinstance(processing_class, str | os.PathLike | Mapping | Sequence):
        raise ArgumentError(
            f"processing_class: expected a tokenizer or processor, not a {type(processing_class).__name__}. "
            f"{KINDS['PreTrainedTokenizerBase']}"
        )
    tokenizer: PreTrainedTokenizerBase = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer


def tokenizer_digest(processing_class: Any) -> str:
    """Digest of a tokenizer's vocabulary."""
    vocabulary = text_tokenizer(processing_class).get_vocab()
    return digest(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))


def encoding_digest(processing_class: Any) -> str:
    """Digest of how a tokenizer turns text into ids: vocabulary, merges, normaliser and added tokens."""
    tokenizer = text_tokenizer(processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for setting in ("padding", "truncation"):  # of the last call
        rules.pop(setting, None)
    return digest(tokenizer_digest(tokenizer), rules, added_tokens(tokenizer))


def added_tokens(processing_class: Any) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer adds in front of a text and behind it."""
    tokenizer = text_tokenizer(processing_class)
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []


def start_tokens(processing_class: Any) -> list[int]:
    """Token ids that the tokenizer adds in front of every text: mostly the beginning-of-text token, or none.

    A teacher that was trained with them expects them at the first positions of every row. Without them, many teachers
    are far worse, because they attend to that token.
    """
    return added_tokens(processing_class)[0]


def with_end(completion: str, processing_class: Any) -> str:
    """A completion that ends with the end-of-text token, if the tokenizer has one."""
    end = str(text_tokenizer(processing_class).eos_token or "")
    return completion if completion.endswith(end) else completion + end


def separator_tokens(processing_class: Any) -> list[int]:
    """Token ids in front of every document: the start tokens, or else one separator if the tokenizer has one.

    The separator is the beginning-of-text token, or the end-of-text token of tokenizers without one, as in
    lm-evaluation-harness. It gives the first real token a context, and separates documents in a packed stream.
    """
    if start := start_tokens(processing_class):
        return start
    tokenizer = text_tokenizer(processing_class)
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if separator is None else [separator]


def tokenize(texts: Sequence[str], processing_class: Any) -> list[list[int]]:
    """Token ids of whole documents, each with its `separator_tokens` in front."""
    front = separator_tokens(processing_class)
    encoded: list[list[int]] = text_tokenizer(processing_class)(list(texts), add_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return [ids if ids[: len(front)] == front else [*front, *ids] for ids in encoded]


def missing_start(ids: Sequence[int], start: Sequence[int]) -> list[int]:
    """The start tokens that a row of token ids lacks at its beginning; empty if it begins with all of them."""
    for kept in range(len(start), 0, -1):
        if list(ids[:kept]) == list(start[len(start) - kept :]):
            return list(start[: len(start) - kept])
    return list(start)


def require_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer for text.

    Raises:
        DataError: if there is none.
    """
    if processing_class is None:
        raise DataError("The data is text, so a tokenizer is needed. Pass processing_class=tokenizer.")
    return text_tokenizer(processing_class)
