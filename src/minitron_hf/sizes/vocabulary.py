"""The number of tokens that a request keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PlanError
from ..families import text_config
from .legality import _round_fraction, rounding_step
from .request import PrunerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_own_vocabulary(config: PretrainedConfig, request: PrunerConfig) -> None:
    """Refuse a cut of the vocabulary inside a model whose processor writes token ids for images or sound.

    Raises:
        PlanError: if there is one.
    """
    if request.vocab_size is not None and text_config(config) is not config:
        raise PlanError(
            f"vocab_size of this '{config.model_type}' model cannot be cut: its processor writes token ids for images "
            "or sound. Leave it out."
        )


def vocabulary_after(before: int, request: PrunerConfig) -> int:
    """Number of tokens to keep; a fraction is rounded like a number of channels.

    Raises:
        PlanError: if it is larger than the teacher's, or a fraction below 1 that comes to no change.
    """
    size = request.vocab_size
    if isinstance(size, float):
        step = rounding_step(before, 1, request.multiple_of, size)
        size, given = (before, size) if size == 1 else (_round_fraction(size, before, step), size)
        if size == before and given < 1:
            raise PlanError(f"vocab_size={given} of {before} comes to no change: give fewer, or leave it out.")
    assert size is not None
    if size > before:
        raise PlanError(f"vocab_size={size} is larger than the teacher's {before}. Pruning only removes.")
    return int(size)
