"""Batches of calibration rows going through a model, counted over all processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..data import position_ids
from ..data.context import context_length
from ..errors import DataError
from ..families import ArchSpec, text_config
from ..weights import input_device
from .reductions import wide


def require_vocabulary(largest: int, config: PretrainedConfig) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        DataError: if there are some.
    """
    config = text_config(config)
    if largest >= config.vocab_size:
        raise DataError(
            f"The calibration rows hold token id {largest}, but the model's vocabulary has {config.vocab_size} "
            "entries. Use the tokenizer that belongs to this model."
        )


def require_context(longest: int, config: PretrainedConfig) -> None:
    """Refuse rows that are longer than the model's context.

    Raises:
        DataError: if there are some.
    """
    context = context_length(config)
    if context is not None and longest > context:
        raise DataError(
            f"The calibration rows hold up to {longest} tokens, more than the model's context of {context}. Cut them."
        )


def token_losses(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor, scored_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every predicted token in float32 (float64 stays), 0 elsewhere, and where there are any.

    Args:
        logits_BTV: of the model.
        ids_BT: token ids.
        mask_BT: the tokens, without padding.
        scored_BT: of these, the tokens that are not context alone.

    Returns:
        Losses [B, T − 1], and a mask of the same shape.
    """
    predicted_BT = scored_BT[:, 1:] & mask_BT[:, :-1]
    targets_BT = ids_BT[:, 1:].masked_fill(~predicted_BT, 0)
    losses = [  # row by row: a copy of all logits in float32 would be the largest tensor of all
        nn.functional.cross_entropy(
            logits_TV[:-1].to(wide(logits_TV)), targets_T.to(logits_TV.device), reduction="none"
        )
        for logits_TV, targets_T in zip(logits_BTV, targets_BT)
    ]
    predicted_BT = predicted_BT.to(logits_BTV.device)
    return torch.stack(losses).masked_fill(~predicted_BT, 0), predicted_BT


class Batches:
    """The calibration rows that a pass has seen.

    Attributes:
        rows: the rows of every batch, without padding; rows without tokens are left out.
        num_tokens: tokens seen, without padding and without those that are context alone (see `TokenRows`).
        shape_BT: shape of the batch at work.
        attended_BT: its tokens, without padding.
        mask_BT: of these, the tokens that are scored: all but those that are context alone.
    """

    def __init__(self, spec: ArchSpec, model: PreTrainedModel) -> None:
        self.spec = spec
        self.model = model
        self.sizes = spec.sizes(model.config)
        self.rows: list[list[tuple[int, ...]]] = []
        self.num_tokens = 0
        self.shape_BT: tuple[int, ...] = ()
        self.attended_BT = torch.zeros(0, 0, dtype=torch.bool)
        self.mask_BT = torch.zeros(0, 0, dtype=torch.bool)
        # The signature, not __code__: Transformers wraps `forward` in decorators.
        self.takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    def begin(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take note of a batch of `input_ids` and, where there are any, the masks of `padded_batches` [B, T]."""
        ids_BT = batch["input_ids"]
        mask_BT = batch.get("attention_mask")
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids_BT, mask_BT)]
        require_vocabulary(max(map(max, filter(None, rows)), default=0), self.model.config)
        require_context(max(map(len, rows), default=0), self.model.config)
        self.shape_BT, self.attended_BT = mask_BT.shape, mask_BT.bool()
        self.mask_BT = self.attended_BT & batch.get("scored_mask", mask_BT).bool()
        self.num_tokens += int(self.mask_BT.sum())
        self.rows.append([row for row in rows if row])
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a causal model is called with: no mask where it cannot see the padding anyway.

        Causal attention never looks right, so padding there needs no mask; and with one, padding tokens that a
        sliding window leaves with nothing to see turn NaN and spoil the keys of the others.
        """
        mask_BT = batch["attention_mask"]
        # A padding token added to the tokenizer alone lies beyond the model's vocabulary.
        inputs = {"input_ids": batch["input_ids"].masked_fill(~mask_BT.bool(), 0)}
        if bool((mask_BT.diff(dim=1) > 0).any()):
            inputs["attention_mask"] = mask_BT
            if self.takes_positions:
                inputs["position_ids"] = position_ids(mask_BT)
        return inputs

    @property
    def num_rows(self) -> int:
        """Rows with at least one token."""
        return sum(map(len, self.rows))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe what has to be observed, for the duration of the context."""
        yield

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and put the rows back in their order."""
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, (self.rows, self.num_tokens))
        self.num_tokens = sum(num_tokens for _, num_tokens in everyones)
        self.rows = [
            rows for turn in zip_longest(*(rows for rows, _ in everyones)) for rows in turn if rows is not None
        ]

    def _add_up(self, sums: Tensor) -> Tensor:
        """The same sums of all processes together."""
        sums = sums.to(input_device(self.model))
        torch.distributed.all_reduce(sums)
        return sums


def state_of(spec: ArchSpec, x: Tensor) -> Tensor:
    """What is handed from layer to layer as [B, T, H]: several residual streams side by side."""
    return x.movedim(0, 2).flatten(2) if spec.stream.stacked_states else x
