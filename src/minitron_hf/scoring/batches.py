"""Batches of calibration rows: checks, inputs of the model, and counts over all processes."""

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
from ..data.images import image_inputs, placeholder_ids
from ..errors import DataError
from ..families import ArchSpec, text_config
from ..weights import input_device
from .reductions import accumulation_dtype

#: What a batch of text holds; the rest belongs to images.
TEXT_BATCH = ("input_ids", "attention_mask", "scored_mask")


def on_device(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Tensor]:
    """What a pass reads of a batch, on the device where the model takes its inputs.

    Raises:
        DataError: if it holds no token ids.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        found = f"a {type(batch).__name__}" if ids is None else f"a {type(ids).__name__} as input_ids"
        raise DataError(
            f"A DataLoader gave {found}, expected batches with the integer tensor input_ids [rows, tokens], and "
            "optionally attention_mask. Pass such batches, or texts or token rows instead of the DataLoader."
        )
    device = input_device(model)
    text = {name: batch[name].to(device) for name in TEXT_BATCH if name in batch}
    return {**text, **image_inputs(batch, model)}


def require_vocabulary(largest: int, config: PretrainedConfig) -> None:
    """Refuse token ids outside the model's vocabulary.

    Raises:
        DataError: if the largest id is outside.
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
        DataError: if the longest row is.
    """
    context = context_length(config)
    if context is not None and longest > context:
        raise DataError(
            f"The calibration rows hold up to {longest} tokens, more than the model's context of {context}. "
            "Pass shorter rows, or texts with a smaller max_length."
        )


def token_losses(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor, scored_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every predicted token, in float32 (float64 for float64 logits).

    Args:
        logits_BTV: logits of the model, [B, T, V].
        ids_BT: token ids, [B, T].
        mask_BT: True at tokens, False at padding, [B, T].
        scored_BT: True at tokens that are not context alone, [B, T].

    Returns:
        Losses [B, T − 1], 0 where nothing is predicted, and the mask of predicted tokens, [B, T − 1].
    """
    predicted_BT = scored_BT[:, 1:] & mask_BT[:, :-1]
    targets_BT = ids_BT[:, 1:].masked_fill(~predicted_BT, 0)
    losses = [  # row by row: a float32 copy of all logits would be the largest tensor
        nn.functional.cross_entropy(
            logits_TV[:-1].to(accumulation_dtype(logits_TV)), targets_T.to(logits_TV.device), reduction="none"
        )
        for logits_TV, targets_T in zip(logits_BTV, targets_BT)
    ]
    predicted_BT = predicted_BT.to(logits_BTV.device)
    return torch.stack(losses).masked_fill(~predicted_BT, 0), predicted_BT


class Batches:
    """The calibration rows that a pass has read.

    Attributes:
        rows: the rows of every batch, without padding; rows without tokens are left out.
        num_tokens: number of tokens, without padding and without context (see `TokenRows`).
        shape_BT: shape of the current batch.
        attended_BT: True at its tokens, False at padding.
        mask_BT: True at its tokens that are scored: all but context.
        predicted_BT: True at those of them whose predictions count: no token of an image.
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
        self.predicted_BT = self.mask_BT
        self.placeholders = torch.tensor(placeholder_ids(model.config), dtype=torch.long)
        # The signature, not __code__: Transformers wraps `forward` in decorators.
        self.takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    def begin(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check and count a batch, and make it the current one.

        Args:
            batch: `input_ids` and, optionally, the masks of `padded_batches`, each [B, T], and inputs of images.

        Returns:
            `input_ids` and `attention_mask`, each [B, T], and the inputs of images.

        Raises:
            DataError: if tokens are outside the vocabulary, or rows longer than the context.
        """
        ids_BT = batch["input_ids"]
        mask_BT = batch.get("attention_mask")
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids_BT, mask_BT)]
        is_image_BT = torch.isin(ids_BT, self.placeholders.to(ids_BT.device))
        text_BT = ids_BT.masked_fill(is_image_BT | ~mask_BT.bool(), 0)  # the embedding of an image is another
        require_vocabulary(int(text_BT.max()) if text_BT.numel() else 0, self.model.config)
        require_context(max(map(len, rows), default=0), self.model.config)
        self.shape_BT, self.attended_BT = mask_BT.shape, mask_BT.bool()
        self.mask_BT = self.attended_BT & batch.get("scored_mask", mask_BT).bool()
        self.predicted_BT = self.mask_BT & ~is_image_BT
        self.num_tokens += int(self.mask_BT.sum())
        self.rows.append([row for row in rows if row])
        images = {name: value for name, value in batch.items() if name not in TEXT_BATCH}
        return {"input_ids": ids_BT, "attention_mask": mask_BT, **images}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of a causal model: without a mask where all padding is on the right, which no token attends to.

        A mask there would do harm: padding tokens that a sliding window leaves without any token to attend to become
        NaN.
        """
        mask_BT = batch["attention_mask"]
        images = {name: value for name, value in batch.items() if name not in TEXT_BATCH}
        # A padding token that was added to the tokenizer alone lies outside the model's vocabulary.
        inputs = {"input_ids": batch["input_ids"].masked_fill(~mask_BT.bool(), 0), **images}
        if bool((mask_BT.diff(dim=1) > 0).any()):
            inputs["attention_mask"] = mask_BT
            if self.takes_positions and not images:  # some models have positions of their own for images
                inputs["position_ids"] = position_ids(mask_BT)
        return inputs

    @property
    def num_rows(self) -> int:
        """Rows with at least one token."""
        return sum(map(len, self.rows))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe modules for the duration of the context; by default none."""
        yield

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and restore the order of the rows."""
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, (self.rows, self.num_tokens))
        self.num_tokens = sum(num_tokens for _, num_tokens in everyones)
        self.rows = [
            rows for turn in zip_longest(*(rows for rows, _ in everyones)) for rows in turn if rows is not None
        ]

    def _add_up(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        sums = sums.to(input_device(self.model))
        torch.distributed.all_reduce(sums)
        return sums


def stream_states(spec: ArchSpec, x: Tensor) -> Tensor:
    """The state between two layers as [B, T, H]; several residual streams are concatenated along H."""
    return x.movedim(0, 2).flatten(2) if spec.stream.stacked_states else x
