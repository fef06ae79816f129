"""Chooses the tokens to keep: those that have to stay, then the most frequent ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import MismatchError, PlanError
from .pieces import Pieces, pieces_of
from .required import required_tokens


def choose_tokens(
    tokenizer: Any, counts: np.ndarray, size: int, num_rows: int, needed: Iterable[int] = ()
) -> np.ndarray:
    """The ids of the tokens to keep.

    Required tokens stay (`required_tokens`). The others are taken by their counts, smaller ids first among equals,
    each together with all tokens that it is merged from. Rows of the embeddings beyond the tokenizer come last.

    Args:
        tokenizer: a fast tokenizer.
        counts: how often every token id occurs in a corpus, [ids]; ids beyond it do not occur.
        size: number of tokens to keep.
        num_rows: rows of the model's embeddings.
        needed: further ids that stay.

    Returns:
        int64 ids, ascending: [size].

    Raises:
        UnsupportedModelError: if the tokenizer cannot be rewritten.
        MismatchError: if it has tokens beyond the embeddings.
        PlanError: if fewer tokens are asked for than have to stay.
    """
    closure, kept = _required(tokenizer, size, num_rows, needed)
    known: dict[str, int] = tokenizer.get_vocab()
    times = np.zeros(num_rows, dtype=np.int64)
    times[: min(len(counts), num_rows)] = counts[:num_rows]
    ranked = [int(index) for index in np.lexsort((np.arange(num_rows), -times))]
    used = set(known.values())
    _add(kept, [index for index in ranked if index in used], size, closure)
    _add(kept, [index for index in range(num_rows) if index not in used], size, closure)
    return np.array(sorted(kept), dtype=np.int64)


def require_choice(tokenizer: Any, size: int, num_rows: int) -> None:
    """Refuse what `choose_tokens` refuses, before any corpus is counted.

    Raises:
        MinitronError: see there.
    """
    _required(tokenizer, size, num_rows, ())


def _required(tokenizer: Any, size: int, num_rows: int, needed: Iterable[int]) -> tuple[_Closure, set[int]]:
    """The tokens that have to stay, and what tells the parts of others."""
    pieces = pieces_of(tokenizer)
    known: dict[str, int] = tokenizer.get_vocab()
    if (largest := max(known.values())) >= num_rows:
        raise MismatchError(
            f"The tokenizer has the token {largest}, and the model's embeddings have {num_rows} rows. Pass the "
            "tokenizer that belongs to the model."
        )
    closure = _Closure(pieces, known)
    kept = closure({*required_tokens(tokenizer, pieces), *needed})
    if len(kept) > size:
        raise PlanError(
            f"vocab_size={size:,}: {len(kept):,} tokens have to stay: single characters or bytes, special and added "
            "tokens, those of the chat template, and what they are merged from. "
            f"Keep {len(kept):,} or more."
        )
    return closure, kept


def _add(kept: set[int], ranked: list[int], size: int, closure: _Closure) -> None:
    """Add tokens in their order, with all that they are merged from, as long as there is room."""
    while len(kept) < size:
        before = len(kept)
        for index in ranked:
            if index not in kept:
                needed = closure([index]) - kept
                if len(kept) + len(needed) <= size:
                    kept |= needed
            if len(kept) == size:
                return
        if len(kept) == before:
            return


class _Closure:
    """Tokens with everything that they are merged from."""

    def __init__(self, pieces: Pieces, known: dict[str, int]) -> None:
        self.pieces, self.known = pieces, known
        self.token = {index: token for token, index in known.items()}
        self.found: dict[int, set[int]] = {}

    def __call__(self, ids: Iterable[int]) -> set[int]:
        together: set[int] = set()
        for index in ids:
            if index not in self.found:
                token = self.token.get(index, "")
                parts = self.pieces.parts(token) if token in self.pieces.tokens else ()
                self.found[index] = {index, *(self.known[part] for part in parts if part in self.known)}
            together |= self.found[index]
        return together
