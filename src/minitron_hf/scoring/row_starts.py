"""Detects teachers that fail on rows that begin in the middle of a document.

Many teachers attend to the first token of a text, and are far worse without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..data import TokenRows
from ..models import evaluating
from ..weights import input_device
from .reductions import accumulation_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

#: Number of rows that are tested, and of tokens in each. The test takes two forward passes for each row: at most 1,028
#: tokens, and the logits of 129 at a time, however many rows there are.
NUM_ROWS, NUM_TOKENS = 4, 128
#: Increase of the cross-entropy that causes a warning, in nats per token: the perplexity is 1.6 times as high.
LARGE_INCREASE = 0.5


def warn_of_broken_starts(
    model: PreTrainedModel, rows: TokenRows, name: str, front: Sequence[int] | None = None
) -> None:
    """Warn if rows that begin inside a document are predicted far better after the first token of documents.

    The same tokens are predicted with that token and without it, because first and later rows differ as texts do.

    Args:
        model: the teacher.
        rows: rows that say where they begin (`TokenRows.continues`). Other rows, and rows that begin with that token
            already, are not tested.
        name: name of the model in the message.
        front: token ids that documents could begin with; by default the first token of the first rows.
    """
    firsts = {row[0] for row, is_later in zip(rows.rows, rows.continues) if not is_later}
    firsts = firsts if front is None else set(front)
    later = [index for index, is_later in enumerate(rows.continues) if is_later and len(rows.rows[index]) > 2]
    later = [index for index in later if not (rows.context and rows.context[index])][:NUM_ROWS]
    if len(firsts) != 1 or not later:
        return
    # One token fewer, so that the token in front fits into the model's context.
    tested = [rows.rows[index][:-1][:NUM_TOKENS] for index in later]
    plain, led = (
        sum(_loss(model, (*front, *row), len(front) + 1) for row in tested) / len(tested)
        for front in ((), tuple(firsts))
    )
    if plain - led > LARGE_INCREASE:
        logger.warning(
            "%s has a cross-entropy of %.2f nats per token on the rows, and of %.2f on the same rows behind the "
            "token %d, with which texts begin. Measurements and training on these rows are wrong. Have the tokenizer "
            "add that token (tokenizer.add_bos_token = True), or put it before every row of ids.",
            name,
            plain,
            led,
            *firsts,
        )


@torch.no_grad()
def _loss(model: PreTrainedModel, row: Sequence[int], start: int) -> float:
    """Mean cross-entropy of the tokens of a row from a position on, in nats."""
    ids_1T = torch.tensor([row]).to(input_device(model))
    with evaluating([model]):
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, start - 1 : -1]
    targets_T = ids_1T[0, start:].to(logits_TV.device)
    return float(torch.nn.functional.cross_entropy(logits_TV.to(accumulation_dtype(logits_TV)), targets_T))
