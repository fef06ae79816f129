"""Whether a teacher is broken on rows that begin in the middle of a document.

Many teachers rest their attention on the first token of a text, and are far worse where it is missing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..data import TokenRows
from ..models import evaluating
from ..weights import input_device
from .reductions import wide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

#: Rows of either kind that are compared, and tokens of each.
NUM_ROWS, NUM_TOKENS = 8, 256
#: Nats per token that are far: the perplexity is 1.6 times as high.
FAR = 0.5


def warn_of_later_rows(model: PreTrainedModel, rows: TokenRows, name: str = "model") -> None:
    """Warn where the cross-entropy on rows that begin inside a document is far above that on documents' first rows.

    Args:
        model: the teacher.
        rows: rows that say where they begin (`TokenRows.continues`); others are not looked at.
        name: of the model, for the message.
    """
    if len(set(rows.continues)) < 2:
        return
    later, first = (
        [index for index, is_later in enumerate(rows.continues) if is_later is kind] for kind in (True, False)
    )
    losses = [
        [_loss(model, rows.rows[index], rows.predicted(index)) for index in indices[:NUM_ROWS]]
        for indices in (later, first)
    ]
    means = [sum(values) / len(values) for values in losses]
    if means[0] - means[1] > FAR + 3 * math.hypot(*map(_error, losses)):
        _warn(name, f"{means[0]:.2f} nats per token on rows that begin inside a document", means[1], "on first rows")


def warn_of_missing_separator(model: PreTrainedModel, rows: TokenRows, separator: Sequence[int]) -> None:
    """Warn where rows that begin inside a document would be predicted far better behind a separator.

    Args:
        model: the teacher.
        rows: the rows.
        separator: token ids in front of documents, see `data.tokens.separator_tokens`.
    """
    later = [i for i, is_later in enumerate(rows.continues) if is_later and not (rows.context and rows.context[i])]
    if not later or not separator:
        return
    losses = [
        [
            _loss(model, (*front, *rows.rows[i]), [len(front) + position for position in rows.predicted(i)])
            for i in later[:NUM_ROWS]
        ]
        for front in ((), separator)
    ]
    means = [sum(values) / len(values) for values in losses]
    if means[0] - means[1] > FAR:
        _warn("model", f"{means[0]:.2f} nats per token on the rows", means[1], "on the same rows behind a separator")


def _warn(name: str, found: str, other: float, where: str) -> None:
    logger.warning(
        "The %s has a cross-entropy of %s, and of %.2f %s. It seems to expect a token at the beginning of every row "
        "that the tokenizer does not add, so what is measured and learned on such rows is wrong. Have the tokenizer "
        "add it (tokenizer.add_bos_token = True), or put it in front of every row of token ids.",
        name,
        found,
        other,
        where,
    )


def _error(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values)) / max(1, len(values) - 1)


@torch.no_grad()
def _loss(model: PreTrainedModel, row: Sequence[int], predicted: Sequence[int]) -> float:
    """Mean cross-entropy of some tokens of the beginning of a row, in nats."""
    ids_T = torch.tensor(row[:NUM_TOKENS])
    places = torch.tensor([position for position in predicted if position < len(ids_T)])
    if not len(places):
        return math.nan
    with evaluating([model]):
        logits_TV = model(input_ids=ids_T[None].to(input_device(model)), use_cache=False).logits[0]
    chosen_NV = logits_TV[(places - 1).to(logits_TV.device)]
    targets_N = ids_T[places].to(logits_TV.device)
    return float(torch.nn.functional.cross_entropy(chosen_NV.to(wide(chosen_NV)), targets_N))
