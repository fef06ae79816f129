"""Batches between the collator and the loss: the row of each position, and the cached teacher logits there.

Shapes: N tokens that count, k most likely tokens, H_t hidden width of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compat import rows_in_last_batch
from ..data.images import PLACE
from ..errors import DataError, MismatchError
from ..losses.fused import next_token_positions
from .cache_coding import KEPT_SHARE, TOKENS, decode

#: Prefix of the columns of cached hidden states, before their index among the teacher's hidden states.
STATES = "teacher_states_"
#: Entries of a batch that are not arguments of the model. Some collators also add shifted labels.
LABELS, ROW_LENGTHS, CACHED = "labels", "row_lengths", "cached_teacher"
SHIFTED_LABELS = "shift_labels"
#: Column of cached rows with images: SHA-256 of the row that each was made from, as 8 numbers of 32 bits.
SOURCE = "source_digest"


@dataclass(frozen=True)
class CachedTeacher:
    """Cached teacher logits of a batch. Neither a mapping nor a tensor, so that nothing casts it with the batch.

    Attributes:
        tokens: int64 [N, k], the most likely one first.
        log_probs: float32 [N, k]; of drawn tokens their weights.
        log_tail: float32 [N]; of drawn tokens the teacher's entropy.
        states: index into the teacher's hidden states → float32 [N, H_t].
        drawn: whether the tokens were drawn (`SampledSignal`), not the most likely ones (`TopKSignal`).
        kept_share: [N], of a student that lacks some of the teacher's tokens (`signals.kept_logits`).
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor
    states: Mapping[int, Tensor]
    drawn: bool = False
    kept_share: Tensor | None = None


@dataclass
class WithRowLengths:
    """A collator that adds the length of each row of a flattened batch, so that tokens can be assigned to rows."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        batch[ROW_LENGTHS] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch


@dataclass
class WithCachedTeacher:
    """A collator that also passes on the cached teacher logits of its rows."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if TOKENS not in examples[0]:
            return self.collator(examples)
        batch = self._batch_of(examples)
        tokens, log_probs, log_tail, drawn = decode(examples, tuple(examples[0]))
        states = {
            int(name.removeprefix(STATES)): _concatenated(examples, name, len(log_tail))
            for name in examples[0]
            if name.startswith(STATES)
        }
        share = _concatenated(examples, KEPT_SHARE, len(log_tail))[:, 0] if KEPT_SHARE in examples[0] else None
        batch[CACHED] = CachedTeacher(tokens, log_probs, log_tail, states, drawn, share)
        return batch

    def _batch_of(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of the rows alone. The cached columns are arrays, for speed; the collator expects lists."""
        others = [name for name in examples[0] if not name.startswith("teacher_")]
        return self.collator([{name: np.asarray(row[name]).tolist() for name in others} for row in examples])


@dataclass
class WithCachedImages(WithCachedTeacher):
    """The same for rows with images, which are rendered again: their tokens must be those of the cached rows."""

    def _batch_of(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        cached = ("input_ids", LABELS, SOURCE)
        others = [name for name in examples[0] if name not in cached and not name.startswith("teacher_")]
        batch = self.collator([{name: row[name] for name in others} for row in examples])
        for row, found in zip(examples, rows_of(batch), strict=True):
            if any(not np.array_equal(row[name], values) for name, values in found.items()):
                raise MismatchError(
                    f"{row.get(PLACE, 'A row')}: the processor makes other tokens of it than when the teacher cache "
                    "was written. Use the processor and the chat template of that time, or write the cache again."
                )
        return batch


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Token ids and labels of every row of a padded batch, without padding."""
    real = batch["attention_mask"].bool()
    return [{name: batch[name][i][real[i]].numpy() for name in ("input_ids", LABELS)} for i in range(len(real))]


@dataclass
class WithKnownTokens:
    """A collator that refuses tokens for which the models have no embedding."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    vocab_size: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        tokens = batch.get("input_ids")
        if isinstance(tokens, Tensor) and tokens.numel() and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"A batch holds the token {int(tokens.max())}, and the models have embeddings of {self.vocab_size} "
                "tokens. Use the tokenizer that belongs to the models, also for padding; or resize both models "
                "with resize_token_embeddings."
            )
        return batch


def _concatenated(examples: list[dict[str, Any]], name: str, num_tokens: int) -> Tensor:
    """A column of all rows: [N, width], with N = `num_tokens`."""
    values = torch.from_numpy(np.concatenate([np.asarray(example[name]) for example in examples]))
    return values.reshape(num_tokens, len(values) // num_tokens if num_tokens else 1)


def is_cached(columns: Iterable[str] | None) -> bool:
    """Whether rows with these columns hold cached teacher logits."""
    return TOKENS in (columns or ())


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that are arguments of the model."""
    return {key: value for key, value in batch.items() if key not in (LABELS, ROW_LENGTHS, CACHED)}


def row_of_positions(batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Row index of every position of the flattened batch, int64 [B * T], and the number of rows."""
    labels = batch[LABELS]
    lengths = batch.get(ROW_LENGTHS)
    if lengths is None:
        num_rows, length = labels.shape
        return torch.arange(num_rows, device=labels.device).repeat_interleave(length), num_rows
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    padding = rows.new_full((labels.numel() - len(rows),), len(lengths) - 1)  # of `pad_to_multiple_of`, at the end
    return torch.cat([rows, padding]), len(lengths)


def without_repeated_rows(batch: Mapping[str, Any], accelerator: Any) -> Mapping[str, Any]:
    """A batch of one process, in which no token counts of rows that another process has too.

    Accelerate fills the last batch of an epoch with rows from its beginning, so that all processes get equally many.
    """
    state, parallelism = accelerator.gradient_state, accelerator.parallelism_config
    if parallelism is not None and parallelism.tp_enabled:  # all processes have the same rows
        return batch
    if accelerator.num_processes == 1 or not state.end_of_dataloader or LABELS not in batch:
        return batch
    rows_left = rows_in_last_batch(state)
    if rows_left < 1:
        return batch
    row_of_position, num_rows = row_of_positions(batch)
    labels = batch[LABELS]
    row = accelerator.process_index * num_rows + row_of_position.to(labels.device)
    repeated = (row >= rows_left).view_as(labels)
    masked = {name: batch[name].masked_fill(repeated, -100) for name in (LABELS, SHIFTED_LABELS) if name in batch}
    if CACHED in batch:  # repeated rows come last
        cached, count = batch[CACHED], len(next_token_positions(masked[LABELS])[0])
        states = {index: values[:count] for index, values in cached.states.items()}
        first = (cached.tokens[:count], cached.log_probs[:count], cached.log_tail[:count])
        share = None if cached.kept_share is None else cached.kept_share[:count]
        masked[CACHED] = CachedTeacher(*first, states, cached.drawn, share)
    return {**batch, **masked}


def read_streams(data: Any) -> Any:
    """The rows of a stream in a list; of several datasets by name those of each stream. Other data stay."""
    if isinstance(data, Mapping):
        return {name: read_streams(part) for name, part in data.items()}
    return data if data is None or hasattr(data, "__len__") else list(data)


class RepeatedRowsMixin:
    """Mixin for a `Trainer` that counts each row at the end of an epoch once, in any number of processes."""

    accelerator: Any
    eval_dataset: Any

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of an optimiser step, and the number of tokens that count in them."""
        batches = (without_repeated_rows(batch, self.accelerator) for batch in epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)  # type: ignore[misc]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation; of several processes each reads a stream as a whole.

        Accelerate would share out its shards, which are not equally long, and fill the last batch with repeated rows.
        """
        if self.accelerator.num_processes > 1:
            if eval_dataset is None or isinstance(eval_dataset, str):  # the trainer's own, or one of them
                self.eval_dataset = read_streams(self.eval_dataset)
            else:
                eval_dataset = read_streams(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
