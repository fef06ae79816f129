"""Counts the tokens of a corpus, and cuts a tokenizer by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.documents import DataSource, Piece, TokenizedDocuments, documents
from ..data.image_rows import image_documents
from ..data.images import holds_images, placeholder_ids
from ..data.tokens import require_tokenizer, tokenizer_digest
from ..errors import DataError
from .choice import choose_tokens
from .rewriting import cut_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Every so many documents, one is held out to measure tokens per byte, up to so many tokens of all of them.
HELD_OUT_EVERY, HELD_OUT_TOKENS = 10, 250_000


@dataclass(frozen=True)
class VocabularyCut:
    """The tokens that stay, and what that costs.

    Attributes:
        kept: int64 ids that stay, ascending: [tokens].
        tokenizer: the tokenizer that emits them alone, under new ids.
        facts: the entry `vocabulary` of a plan: digests of both tokenizers (`teacher_tokenizer`,
            `student_tokenizer`), `num_tokens` of the corpus and the fraction of them that stay (`share_kept`), and
            `tokens_per_byte` of both on `num_bytes` of text that is `held_out` of the counts, or not.
    """

    kept: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]

    @property
    def new_ids(self) -> dict[int, int]:
        """Token id → its new id, of the tokens that stay."""
        return {int(old): new for new, old in enumerate(self.kept)}

    @property
    def note(self) -> str:
        """What the cut costs, in a sentence or two."""
        rate = self.facts["tokens_per_byte"]
        text = (
            f"Vocabulary: the {len(self.kept):,} tokens that stay make up {self.facts['share_kept']:.2%} of the "
            "corpus as the teacher reads it."
        )
        if rate is None:
            return text
        what = "Held-out text" if self.facts["held_out"] else "The text"
        gain = rate["student"] / rate["teacher"] - 1
        both = f"{rate['student']:.4f} tokens per byte instead of {rate['teacher']:.4f}"
        return f"{text} {what} takes {both} ({gain:+.1%})."


@dataclass(frozen=True)
class TokenCounts:
    """How often a corpus has each token, from which `PrunerConfig(vocab_size=…)` chooses.

    Attributes:
        tokenizer: the teacher's.
        counts: int64, how often every token id occurs: [tokens].
        sample: texts to measure tokens per byte on.
        held_out: whether these were left out of the counts.
    """

    tokenizer: PreTrainedTokenizerBase
    counts: np.ndarray
    sample: tuple[str, ...] = ()
    held_out: bool = False
    _cuts: dict[Any, VocabularyCut] = field(default_factory=dict, repr=False, compare=False)

    def cut(self, size: int, num_rows: int, needed: Sequence[int] = ()) -> VocabularyCut:
        """Choose the tokens to keep, and cut the tokenizer to them.

        Args:
            size: number of tokens to keep.
            num_rows: rows of the model's embeddings.
            needed: further ids that stay, such as those in the model's config.

        Raises:
            UnsupportedModelError: if the tokenizer cannot be rewritten.
            MismatchError: if it has tokens beyond the embeddings.
            PlanError: if more tokens than that have to stay.
        """
        key = (size, num_rows, tuple(sorted(needed)))
        if key not in self._cuts:
            kept = choose_tokens(self.tokenizer, self.counts, size, num_rows, needed)
            tokenizer = cut_tokenizer(self.tokenizer, kept)
            used = kept[kept < len(self.counts)]
            facts = {
                "teacher_tokenizer": tokenizer_digest(self.tokenizer),
                "student_tokenizer": tokenizer_digest(tokenizer),
                "num_tokens": int(self.counts.sum()),
                "share_kept": float(self.counts[used].sum() / max(int(self.counts.sum()), 1)),
                "held_out": self.held_out,
                "num_bytes": sum(len(text.encode()) for text in self.sample),
                "tokens_per_byte": self._rates(tokenizer),
            }
            self._cuts[key] = VocabularyCut(kept, tokenizer, facts)
        return self._cuts[key]

    def _rates(self, student: PreTrainedTokenizerBase) -> dict[str, float] | None:
        """Tokens per byte of the sample for both tokenizers; None without a sample."""
        num_bytes = sum(len(text.encode()) for text in self.sample)
        if not num_bytes:
            return None
        rates = {}
        for name, tokenizer in (("teacher", self.tokenizer), ("student", student)):
            encoded = tokenizer(list(self.sample), add_special_tokens=False, verbose=False)["input_ids"]
            rates[name] = sum(map(len, encoded)) / num_bytes
        return rates


def count_tokens(
    data: DataSource, processing_class: Any, *, text_field: str = "text", max_tokens: int | None = None
) -> TokenCounts:
    """Count the tokens of a corpus, for `PrunerConfig(vocab_size=…)`.

    Every tenth document is left out, up to 250,000 tokens, to measure how many more tokens the cut takes.

    Args:
        data: texts, conversations, token rows or a dataset: text like the student's later input, as much as there is.
            Of rows with images, the tokens that stand for images count, too.
        processing_class: the teacher's tokenizer; for images its processor.
        text_field: column that holds the text.
        max_tokens: number of tokens after which reading stops; None reads all.

    Returns:
        The counts.

    Raises:
        DataError: if there is no tokenizer, or the corpus has no tokens.
        UnsupportedModelError: if the tokenizer cannot be rewritten.

    Example:
        >>> counts = count_tokens(texts, tokenizer)  # doctest: +SKIP
        >>> plan = make_plan(teacher, PrunerConfig(vocab_size=24_000), token_counts=counts)  # doctest: +SKIP
    """
    from .pieces import pieces_of

    tokenizer = require_tokenizer(processing_class)
    pieces_of(tokenizer)  # refuses before anything is read
    pieces: Iterable[Piece]
    if holds_images(data):
        pieces = image_documents(data, processing_class, text_field)
    else:
        pieces = data if isinstance(data, TokenizedDocuments) else documents(data, tokenizer, text_field)
    counted, read = np.zeros(len(tokenizer), dtype=np.int64), 0
    first, held_out = _Sample(), _Sample()
    for number, piece in enumerate(pieces):
        if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and held_out.has_room:
            held_out.add(piece)
        else:
            counted = _added(counted, piece.ids)
            first.add(piece)
        read += len(piece.ids)
        if max_tokens is not None and read >= max_tokens:
            break
    if not counted.any():
        raise DataError("The corpus has no tokens, so none can be chosen for vocab_size. Pass text.")
    is_held_out = bool(held_out.pieces)
    sample = held_out if is_held_out else first
    no_text = set(placeholder_ids(processing_class))
    texts = tuple(
        str(tokenizer.decode([token for token in piece.ids if token not in no_text])) for piece in sample.pieces
    )
    return TokenCounts(tokenizer, counted, texts, is_held_out)


class _Sample:
    """Documents up to a number of tokens."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.num_tokens = 0

    @property
    def has_room(self) -> bool:
        return self.num_tokens < HELD_OUT_TOKENS

    def add(self, piece: Piece) -> None:
        """Keep a document if there is room."""
        if self.has_room:
            self.pieces.append(piece)
            self.num_tokens += len(piece.ids)


def _added(counts: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    found = np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))
    found[: len(counts)] += counts
    return found
