"""Tokenizer models as `tokenizers` stores them: which tokens have to stay, and the model without the others.

A cut model gives every text the pieces that it had, wherever all of these stay.

- BPE applies its merges by rank. The merges inside a piece do not depend on the text around it, so a kept piece comes
  about as before if everything that it is merged from stays, in the same order.
- Unigram takes the path of pieces with the largest sum of scores. Without some pieces no path gains, so the best path
  stays the best if its pieces do. The cost of an unknown character follows from the smallest score, so that stays.
- WordPiece takes the longest match at every place. A kept match stays the longest.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Tokens of single bytes, from which unknown characters are made (`byte_fallback`).
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Pieces(ABC):
    """The model of a fast tokenizer.

    Args:
        backend: the tokenizer.

    Attributes:
        whole: the tokenizer's JSON.
        model: its model.
    """

    kind: ClassVar[str]

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.whole: dict[str, Any] = json.loads(backend.to_str())
        self.model: dict[str, Any] = self.whole["model"]

    @property
    @abstractmethod
    def tokens(self) -> Mapping[str, int]:
        """Token → id, without added tokens that the model does not hold."""

    @abstractmethod
    def required(self) -> set[str]:
        """Tokens that have to stay, so that every text still has pieces that decode to it."""

    def parts(self, token: str) -> tuple[str, ...]:
        """The tokens that a token is merged from."""
        return ()

    @abstractmethod
    def cut(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """The JSON of the model with the kept tokens alone.

        Args:
            kept: token → new id.
        """

    def has_byte_fallback(self) -> bool:
        """Whether any character that is no token becomes bytes, and decodes from them."""
        return (
            bool(self.model.get("byte_fallback"))
            and self.tokens.keys() >= set(BYTE_TOKENS)
            and '"type": "ByteFallback"' in json.dumps(self.whole["decoder"])
        )

    def written_characters(self) -> set[str]:
        """Characters that normalizer, pre-tokenizer and decoder write or look for, such as `▁` for a space.

        The decoder replaces them before it decodes bytes, so they have to stay tokens.
        """
        sections = (self.whole[name] for name in ("normalizer", "pre_tokenizer", "decoder"))
        return {character for text in _strings(sections) for character in text}

    def required_characters(self, single: Iterable[str]) -> set[str]:
        """The tokens of single characters that have to stay, and the tokens of bytes."""
        if not self.has_byte_fallback():
            return set(single)
        written = self.written_characters()
        return {token for token in single if written & set(token)} | set(BYTE_TOKENS)


class BPE(Pieces):
    """Byte-pair encoding, of bytes or of characters."""

    kind = "BPE"

    @property
    def tokens(self) -> Mapping[str, int]:
        vocabulary: dict[str, int] = self.model["vocab"]
        return vocabulary

    @cached_property
    def prefix(self) -> str:
        """What a symbol inside a word begins with."""
        return self.model.get("continuing_subword_prefix") or ""

    @cached_property
    def suffix(self) -> str:
        """What the last symbol of a word ends with."""
        return self.model.get("end_of_word_suffix") or ""

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """Merge → rank."""
        return {(left, right): rank for rank, (left, right) in enumerate(self.model["merges"])}

    def required(self) -> set[str]:
        """Symbols of single characters, which merges begin with, and the unknown token."""
        single = [token for token in self.tokens if len(self._bare(token)) == 1]
        return self.required_characters(single) | ({str(self.model.get("unk_token"))} & self.tokens.keys())

    def parts(self, token: str) -> tuple[str, ...]:
        """All symbols that lead to a token, from single characters on; none if the merges never make it."""
        symbols = self._symbols(token)
        made = set(symbols)
        while len(symbols) > 1:
            ranked = [(self.ranks.get(pair), place) for place, pair in enumerate(itertools.pairwise(symbols))]
            known = [(rank, place) for rank, place in ranked if rank is not None]
            if not known:
                return ()
            _, place = min(known)
            symbols[place : place + 2] = [self._merged(symbols[place], symbols[place + 1])]
            made.add(symbols[place])
        return tuple(sorted(made - {token})) if symbols == [token] else ()

    def cut(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """The merges whose parts and result stay, in the same order."""
        merges = [
            [left, right]
            for left, right in self.model["merges"]
            if left in kept and right in kept and self._merged(left, right) in kept
        ]
        vocabulary = {token: kept[token] for token in self.tokens if token in kept}
        return {**self.model, "vocab": vocabulary, "merges": merges}

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self.prefix) :]

    def _bare(self, token: str) -> str:
        bare = token.removeprefix(self.prefix) or token
        return bare.removesuffix(self.suffix) or bare

    def _symbols(self, token: str) -> list[str]:
        """The symbols that a word, or a part of one, begins as."""
        bare = self._bare(token)
        is_inside = bool(self.prefix) and token.startswith(self.prefix) and token != self.prefix
        symbols = [self.prefix * (is_inside or place > 0) + character for place, character in enumerate(bare)]
        symbols[-1] += self.suffix * token.endswith(self.suffix)
        return symbols


class Unigram(Pieces):
    """Pieces with scores."""

    kind = "Unigram"

    @cached_property
    def tokens(self) -> Mapping[str, int]:
        return {piece: index for index, (piece, _) in enumerate(self.model["vocab"])}

    def required(self) -> set[str]:
        """Single characters, the unknown piece, and the piece with the smallest score.

        Raises:
            UnsupportedModelError: if a piece holds a character that is no piece, and unknown characters do not become
                bytes.
        """
        pieces = self.model["vocab"]
        last = min(pieces, key=lambda piece: piece[1])[0]
        unknown = set() if self.model.get("unk_id") is None else {pieces[self.model["unk_id"]][0]}
        if not self.has_byte_fallback():
            added = {token["content"] for token in self.whole["added_tokens"]}
            self._require_own_tokens(self.tokens.keys() - added - unknown - set(BYTE_TOKENS))
        return self.required_characters(token for token in self.tokens if len(token) == 1) | unknown | {last}

    def cut(self, kept: Mapping[str, int]) -> dict[str, Any]:
        pieces = self.model["vocab"]
        vocabulary = [[piece, score] for piece, score in pieces if piece in kept]
        unknown = self.model.get("unk_id")
        if unknown is not None:
            unknown = [piece for piece, _ in vocabulary].index(pieces[unknown][0])
        return {**self.model, "vocab": vocabulary, "unk_id": unknown}

    def _require_own_tokens(self, pieces: Iterable[str]) -> None:
        for piece in sorted(pieces):
            for character in piece:
                if character not in self.tokens:
                    raise _no_own_token(self.kind, piece, character)


class WordPiece(Pieces):
    """The longest matches from the left."""

    kind = "WordPiece"

    @property
    def tokens(self) -> Mapping[str, int]:
        vocabulary: dict[str, int] = self.model["vocab"]
        return vocabulary

    def required(self) -> set[str]:
        """Single characters, at the beginning of words and inside them, and the unknown token.

        Raises:
            UnsupportedModelError: if a token that occurs inside words holds a character that is no such token.
        """
        prefix = self.model["continuing_subword_prefix"]
        single = {token for token in self.tokens if len(token.removeprefix(prefix)) == 1 or len(token) == 1}
        unknown: set[str] = {self.model["unk_token"]} & self.tokens.keys()
        added = {token["content"] for token in self.whole["added_tokens"]}
        stays = set()
        for token in sorted(self.tokens.keys() - single - unknown - added):
            inside = token.removeprefix(prefix) if token.startswith(prefix) else token[1:]
            symbols = [prefix + character for character in inside]
            symbols += [] if token.startswith(prefix) else [token[0]]
            if missing := [symbol for symbol in symbols if symbol not in self.tokens]:
                if self._is_word(token.removeprefix(prefix)):
                    raise _no_own_token(self.kind, token, missing[0])
                stays.add(token)  # such as [unused1], which no text becomes
        return single | unknown | stays

    def cut(self, kept: Mapping[str, int]) -> dict[str, Any]:
        return {**self.model, "vocab": {token: kept[token] for token in self.tokens if token in kept}}

    def _is_word(self, text: str) -> bool:
        """Whether the tokenizer leaves a text whole before it looks for pieces."""
        normalizer, splitter = self.backend.normalizer, self.backend.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        return words == [text]


def _no_own_token(kind: str, token: str, character: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The vocabulary of this {kind} tokenizer cannot be cut: its token {token!r} holds {character!r}, which is no "
        "token of its own. Without the token, texts would lose the character. Leave out vocab_size."
    )


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, without the names of fields and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(one for name, one in value.items() if name != "type")
    elif isinstance(value, Iterable):
        for one in value:
            yield from _strings(one)


KINDS: Mapping[str, type[Pieces]] = {kind.kind: kind for kind in (BPE, Unigram, WordPiece)}


def pieces_of(tokenizer: Any) -> Pieces:
    """The model of a tokenizer.

    Raises:
        UnsupportedModelError: if it is not a fast tokenizer of a known kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise UnsupportedModelError(
            f"vocab_size needs a fast tokenizer, which is stored as tokenizer.json. {type(tokenizer).__name__} is "
            "none. Leave out vocab_size, or convert the tokenizer."
        )
    kind = type(backend.model).__name__
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"vocab_size cannot rewrite a tokenizer with a {kind} model: expected {', '.join(KINDS)}. Leave it out."
        )
    return KINDS[kind](backend)
