"""Calibration data: token rows for scoring, and how several processes share them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import PretrainedConfig

from ..compat import is_prepared_loader
from ..data import DataSource, TokenRows, padded_batches, token_rows
from ..data.context import context_length
from ..data.image_rows import ImageRows
from ..data.images import holds_images, require_image_model
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError
from ..locks import launched_processes
from .batches import require_vocabulary
from .row_starts import warn_of_broken_starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


class Calibration(NamedTuple):
    """Calibration data that several passes can read.

    Attributes:
        batches: starts a new pass over the batches.
        num_batches: number of batches; None where it is unknown.
        packing: whether texts were packed; None for data that came as rows.
        digest: of rows with images; None for what the tokens alone tell.
    """

    batches: Callable[[], Iterable[Mapping[str, Tensor]]]
    num_batches: int | None
    packing: bool | None
    digest: str | None = None


def _processes() -> tuple[int, int]:
    """Rank and number of processes; joins the processes of `accelerate launch` unless that was done before."""
    if not torch.distributed.is_available():
        return 0, 1
    if launched_processes() > 1 and not torch.distributed.is_initialized():
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def default_max_length(config: PretrainedConfig, limit: int = 512) -> int:
    """Row length for calibration and measurement, in tokens: `limit`, or the model's context if that is shorter."""
    return min(limit, context_length(config) or limit)


def _require_positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise DataError(f"{name}={number!r}: expected an integer of at least 1.")


def _of_loader(data: DataLoader[Any]) -> Calibration:
    """The batches of a loader, refused where several processes would read others."""
    if is_prepared_loader(data) and _processes()[1] > 1:
        raise DataError(
            "This DataLoader was prepared by Accelerate, so each process reads other batches. Pass the original "
            "DataLoader; its batches are shared out here."
        )
    if isinstance(data.sampler, RandomSampler) and data.sampler.generator is None and _processes()[1] > 1:
        raise DataError(
            "This DataLoader shuffles, and otherwise in each of the processes, so their shares would overlap. "
            "Pass one with shuffle=False, or with a generator of the same seed in every process."
        )
    endless = isinstance(data.dataset, torch.utils.data.IterableDataset)
    return Calibration(lambda: data, None if endless else len(data), None)


def load_calibration(
    model: PreTrainedModel,
    data: DataSource | None,
    processing_class: PreTrainedTokenizerBase | None,
    num_rows: int,
    max_length: int | None,
    packing: bool,
    batch_size: int,
    *,
    test_starts: bool = True,
) -> Calibration:
    """Cut calibration data into rows and batches.

    The arguments are those of `estimate_importance`; `test_starts` tells whether forward passes of the model may test
    if rows begin as they have to (`warn_of_broken_starts`).

    Raises:
        DataError: if there is no text, too little of it or no tokenizer for it, or an argument is out of range.
        MismatchError: if the tokenizer is not the model's.
    """
    if processing_class is not None:
        refuse_other_tokenizers(processing_class, model=model)
    if data is None:
        raise DataError("estimate_importance needs calibration data. Pass a list of texts or a dataset.")
    if isinstance(data, DataLoader):
        return _of_loader(data)
    _require_positive(
        num_rows=num_rows, batch_size=batch_size, **({} if max_length is None else {"max_length": max_length})
    )
    context = context_length(model.config)
    if max_length is not None and context is not None and max_length > context:
        logger.warning(
            "max_length=%d exceeds the model's context of %d tokens. Rows have that length.", max_length, context
        )
        max_length = context
    max_length = default_max_length(model.config) if max_length is None else max_length
    if holds_images(data):
        require_image_model(model.config)
    rows = token_rows(data, processing_class, max_length=max_length, num_rows=num_rows, packing=packing)
    if isinstance(rows, ImageRows):
        return Calibration(lambda: padded_batches(rows, batch_size), -(-len(rows) // batch_size), False, rows.digest)
    num_tokens = sum(map(len, rows.rows))  # the prompts' too, which do not count otherwise
    if num_tokens < max_length and packing and not isinstance(data, TokenRows):
        raise DataError(
            f"The calibration text holds only {num_tokens} tokens, less than one row of {max_length}. "
            f"Pass more text (the papers use 1,024 rows), or a smaller max_length."
        )
    require_vocabulary(max(max(row) for row in rows.rows), model.config)
    if test_starts:
        warn_of_broken_starts(model, rows, "The model")
    return Calibration(
        lambda: padded_batches(rows, batch_size),
        -(-len(rows) // batch_size),
        None if isinstance(data, TokenRows) else packing,
    )
