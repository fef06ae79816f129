"""Token rows, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files import digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenRows:
    """Token ids in rows of at most `max_length`, ragged, without padding.

    Attributes:
        rows: token ids, one list per row, each of length ≥ 2.
        num_bytes: UTF-8 bytes of the text whose tokens the rows predict; None for token ids and messages, or if
            tokens are left out.
        overlap: number of tokens of every row that repeat the end of the row before it (0 or 1). With 1, each token
            after the first is predicted exactly once, for every `max_length`.
        context: positions of the tokens of every row that are context alone: start tokens of the tokenizer, and
            prompts. They are neither scored nor counted, and no prediction of them is measured. Empty if no row has
            any.
        continues: whether each row begins in the middle of a document. Empty if it is unknown.
    """

    rows: tuple[tuple[int, ...], ...]
    num_bytes: int | None
    overlap: int = 0
    context: tuple[tuple[int, ...], ...] = ()
    continues: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows, including overlaps, without context."""
        return sum(map(len, self.rows)) - sum(map(len, self.context))

    @property
    def digest(self) -> str:
        """Digest of the token ids, their split into rows, and the positions of context."""
        return digest(self.rows, self.context) if any(self.context) else digest(self.rows)

    def predicted(self, index: int) -> list[int]:
        """Positions of a row's tokens whose predictions are measured."""
        context = set(self.context[index]) if self.context else set()
        return [position for position in range(1, len(self.rows[index])) if position not in context]

    @property
    def num_predicted(self) -> int:
        """Number of predictions that are measured in all rows."""
        return sum(len(self.predicted(index)) for index in range(len(self)))

    def select(self, indices: list[int]) -> TokenRows:
        """Some of the rows, in the order of `indices`."""
        return TokenRows(
            tuple(self.rows[index] for index in indices),
            self.num_bytes if sorted(indices) == list(range(len(self))) else None,
            self.overlap,
            tuple(self.context[index] for index in indices) if self.context else (),
            tuple(self.continues[index] for index in indices) if self.continues else (),
        )

    def without_images(self) -> TokenRows:
        """The rows as text alone."""
        return self

    def padded(
        self, first: int, last: int, *, pad_token_id: int = 0, padding_side: str = "right"
    ) -> dict[str, torch.Tensor]:
        """The rows from `first` to before `last` as `input_ids`, `attention_mask` and `position_ids`.

        Each is int64 [rows, longest of them]. Position ids count the unmasked tokens, so absolute position embeddings
        do not depend on the padding side. Where some tokens are context alone, `scored_mask` is the attention mask
        without them.
        """
        import torch

        chunk = self.rows[first:last]
        length = max(map(len, chunk))
        input_ids = torch.full((len(chunk), length), pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(chunk), length), dtype=torch.long)
        starts = [0 if padding_side == "right" else length - len(row) for row in chunk]
        for index, (start, row) in enumerate(zip(starts, chunk)):
            input_ids[index, start : start + len(row)] = torch.tensor(row)
            attention_mask[index, start : start + len(row)] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids(attention_mask),
        }
        if any(self.context):
            batch["scored_mask"] = attention_mask.clone()
            for index, start in enumerate(starts):
                batch["scored_mask"][index, [start + position for position in self.context[first + index]]] = 0
        return batch


def padded_batches(
    rows: TokenRows, batch_size: int, *, pad_token_id: int = 0, padding_side: str = "right"
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of some rows at a time, in order; see `TokenRows.padded`."""
    for first in range(0, len(rows), batch_size):
        last = min(first + batch_size, len(rows))
        yield rows.padded(first, last, pad_token_id=pad_token_id, padding_side=padding_side)


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token among the unmasked ones, int64 [batch, length]; padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
