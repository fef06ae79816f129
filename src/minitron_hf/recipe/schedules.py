"""Chooses the steps, rows and warm-up of distillation for a number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.context import context_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Sreenivas et al. 2024, §3: tokens, rows of a step, tokens of a row, warm-up steps.
PAPER_TOKENS, PAPER_ROWS, PAPER_LENGTH, PAPER_WARMUP = 94e9, 1152, 8192, 40
#: Tokens in all and tokens of a step of the short runs (`benchmarks/real/experiments.yaml`: 8 rows of 512).
SHORT_TOKENS, SHORT_STEP = 1e6, 4096
#: Peak learning rate of Sreenivas et al. 2024, §3, for teachers of 8B and 12B parameters.
PAPER_RATE = 1e-4
#: Peak learning rate that was best for a teacher of 135M parameters and 0.26M tokens (`benchmarks/real`).
SHORT_RATE = 3e-4
#: Up to so many parameters and tokens the short runs decide the rate: the geometric middles of 135M and 8B parameters
#: and of 0.26M and 94B tokens.
SMALL_TEACHER, SHORT_RUN = 1e9, 150e6
#: Fewest tokens and rows of a step.
LEAST_STEP, LEAST_ROWS = 2048, 8
#: Tokens of one pass on a device where rows are short; more rows are accumulated.
PASS_TOKENS = 4096
#: Fewest steps of a round. Two rounds of 80 steps beat one round of 160 on a model of 0.9M parameters
#: (`benchmarks/results/babyllama-105-rounds.json`).
LEAST_ROUND_STEPS = 100
#: Documents that a row should hold whole, as a share of all.
WHOLE_DOCUMENTS = 0.9


@dataclass(frozen=True)
class Corpus:
    """The length of a corpus.

    Attributes:
        document_lengths: tokens of some documents.
        num_documents: number of all documents; None where it is not known.
        is_beginning: whether these are the first documents, as of streams, instead of some of the whole corpus.
        holds_images: whether they have images, whose tokens are counted.
    """

    document_lengths: Sequence[int]
    num_documents: int | None
    is_beginning: bool = False
    holds_images: bool = False

    @property
    def num_tokens(self) -> float:
        """Estimated number of tokens of all documents; NaN where their number is not known."""
        number = math.nan if self.num_documents is None else self.num_documents
        return sum(self.document_lengths) / len(self.document_lengths) * number

    def rows(self, length: int, packing: bool, batch_size: int = 1) -> tuple[float, float]:
        """Tokens that a row of training costs, padding included, and the number of rows; NaN where it is not known.

        Args:
            length: the largest row.
            packing: whether documents are joined to full rows; otherwise each is a row, padded to its batch's longest.
            batch_size: rows of a batch; 1 if there is no padding.
        """
        if packing:
            return float(length), self.num_tokens / length
        ordered = sorted(min(one, length) for one in self.document_lengths)
        # The expected maximum of a batch drawn from these documents.
        shares = [(place / len(ordered)) ** batch_size for place in range(len(ordered) + 1)]
        longest = sum(one * (after - before) for one, before, after in zip(ordered, shares, shares[1:]))
        return longest, math.nan if self.num_documents is None else float(self.num_documents)

    @property
    def row_length(self) -> int:
        """The power of two that holds `WHOLE_DOCUMENTS` of the documents whole; at least 128."""
        ordered = sorted(self.document_lengths)
        length = ordered[max(math.ceil(WHOLE_DOCUMENTS * len(ordered)), 1) - 1]
        return max(128, 2 ** math.ceil(math.log2(max(length, 1))))


@dataclass(frozen=True)
class Schedule:
    """Steps and rows of one round of distillation.

    Attributes:
        length: tokens of a row.
        batch_size: rows of a pass.
        accumulation: passes of a step.
        steps: optimiser steps of each round.
        warmup: warm-up steps among them.
        length_limit: what decided the length of a row.
    """

    length: int
    batch_size: int
    accumulation: int
    steps: int
    warmup: int
    length_limit: str

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.accumulation


def tokens_per_step(tokens: float) -> float:
    """Tokens of a step for a number of tokens in all rounds.

    A power law through the short runs here (4,096 at 1M tokens) and Sreenivas et al. 2024, §3 (9.4M at 94B tokens),
    so that both the steps and their size grow with the budget.

    >>> [round(tokens / tokens_per_step(tokens)) for tokens in (1e6, 10e6, 1e9, 94e9)]
    [244, 515, 2287, 9961]
    """
    paper_step = PAPER_ROWS * PAPER_LENGTH
    exponent = math.log(paper_step / SHORT_STEP) / math.log(PAPER_TOKENS / SHORT_TOKENS)
    return min(paper_step, max(LEAST_STEP, SHORT_STEP * (tokens / SHORT_TOKENS) ** exponent))


def peak_rate(tokens: float, parameters: int) -> float:
    """Peak learning rate for a number of tokens in all rounds and a teacher of so many parameters.

    >>> peak_rate(2e6, 134_515_008), peak_rate(2e6, 8_030_261_248), peak_rate(94e9, 134_515_008)
    (0.0003, 0.0001, 0.0001)
    """
    return SHORT_RATE if tokens < SHORT_RUN and parameters < SMALL_TEACHER else PAPER_RATE


def most_rounds(tokens: float) -> int:
    """Number of rounds that can share a number of tokens and have `LEAST_ROUND_STEPS` steps each; at least 1."""
    return max(1, int(tokens / tokens_per_step(tokens)) // LEAST_ROUND_STEPS)


def plan_schedule(
    config: PretrainedConfig, tokens: float, *, num_rounds: int = 1, corpus: Corpus | None = None
) -> Schedule:
    """Choose the steps, rows and warm-up of each round.

    Args:
        config: the teacher's config.
        tokens: tokens of all rounds together.
        num_rounds: rounds that share them.
        corpus: the training corpus; None if it is not at hand.
    """
    wanted = tokens_per_step(tokens)
    limits = {
        "the size of a step": min(PAPER_LENGTH, 2 ** int(math.log2(wanted / LEAST_ROWS))),
        "the context of the model": context_length(config) or PAPER_LENGTH,
        **({} if corpus is None else {"the length of the documents": corpus.row_length}),
    }
    reason = min(limits, key=limits.__getitem__)
    length = limits[reason]
    rows = max(LEAST_ROWS, 4 * int(wanted / length / 4 + 1e-6))  # rounded down, for more steps rather than fewer
    batch_size = max(
        size for size in range(1, rows + 1) if rows % size == 0 and size * length <= max(PASS_TOKENS, length)
    )
    steps = max(1, round(tokens / num_rounds / (rows * length)))
    warmup = max(math.ceil(steps / 100), min(PAPER_WARMUP, round(steps / 20)))
    return Schedule(length, batch_size, rows // batch_size, steps, warmup, reason)
