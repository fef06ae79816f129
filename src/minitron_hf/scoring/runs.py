"""Feeds calibration batches to the passes that observe a model, and records digests of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm.auto import tqdm

from ..data import TokenRows
from ..data.tokens import tokenizer_digest
from ..errors import DataError
from ..families import ArchSpec
from ..models import architecture_digest, evaluating
from ..weights import model_digest
from .batches import on_device
from .calibration import Calibration, _processes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pass(Protocol):
    """What observes batches: `ActivationPass`, `GradientPass`, `DepthPass`."""

    rows: list[list[tuple[int, ...]]]
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows with at least one token."""

    def hooks(self) -> AbstractContextManager[None]:
        """Observe, for the duration of the context."""

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model on one batch."""

    def gather(self) -> None:
        """Add up the sums of all processes."""


@dataclass
class ScoringRun:
    """One model and its calibration rows, which several passes go through.

    Attributes:
        spec: the family's table.
        model: the model that is scored.
        calibration: its rows; None where no metric needs any.
        show_progress: show a progress bar.
        digests: of model, architecture, tokenizer and, after the first pass, data.
    """

    spec: ArchSpec
    model: PreTrainedModel
    calibration: Calibration | None
    show_progress: bool
    digests: dict[str, str | None] = field(default_factory=dict)

    def add_digests(self, processing_class: PreTrainedTokenizerBase | None) -> None:
        """Compute the digests of model and tokenizer."""
        self.digests |= {
            "model": model_digest(self.model),
            "architecture": architecture_digest(self.model.config),
            "tokenizer": None if processing_class is None else tokenizer_digest(processing_class),
            "data": None,
        }

    def feed(self, observer: Pass) -> dict[str, Any]:
        """Run a pass over all batches, in turns with the other processes.

        Returns:
            What to record of the rows: their number, tokens, longest length and whether texts were packed.

        Raises:
            DataError: if the batches hold no tokens.
        """
        assert self.calibration is not None
        rank, num_processes = _processes()
        num_batches = self.calibration.num_batches
        with (
            evaluating([self.model]),
            torch.no_grad(),
            observer.hooks(),
            tqdm(
                total=None if num_batches is None else -(-num_batches // num_processes),
                desc="Scoring",
                disable=rank > 0 or not self.show_progress,
            ) as bar,
        ):
            for batch in islice(self.calibration.batches(), rank, None, num_processes):
                observer.run(on_device(batch, self.model))
                bar.update()
        if num_processes > 1:
            observer.gather()
        if not observer.num_tokens:
            raise DataError(
                "The calibration batches hold no tokens. Pass a list of texts, or a DataLoader that is not empty."
            )
        rows = tuple(row for batch_rows in observer.rows for row in batch_rows)
        self.digests["data"] = self.calibration.digest or TokenRows(rows, None).digest
        return {
            "num_rows": observer.num_rows,
            "num_tokens": observer.num_tokens,
            "max_length": max(map(len, rows)),
            "packing": self.calibration.packing,
        }
