"""What the stages before, beside and after distillation are given, and sizes of their models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..families import spec_for
from ..models import count_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Workload:
    """What the stages are given.

    Attributes:
        batch_size: B.
        max_length: T of calibration, of the teacher cache.
        eval_length: T of evaluation.
        dtype: of the weights and of all passes.
        top_k: tokens per position of a teacher cache.
        drawn: whether these tokens are drawn from the teacher's distribution.
        num_rows: M, rows on which shapes are compared.
        calibration_rows: M of a streamed repair.
        repair: as in `PrunerConfig`.
        num_gaps: runs of consecutive dropped layers, at most.
        memory_limit: of `repaired_weights`; None: all projections in one pass.
        is_rotated: whether the plan has a `hidden_basis`.
        device: where the models are, `"cpu"` or `"cuda"`.
    """

    batch_size: int = 8
    max_length: int = 512
    eval_length: int = 2048
    dtype: torch.dtype = torch.bfloat16
    top_k: int = 64
    drawn: bool = False
    num_rows: int = 32
    calibration_rows: int = 1024
    repair: str = "least_squares"
    num_gaps: int = 1
    memory_limit: float | None = None
    is_rotated: bool = False
    device: str = "cuda"

    @property
    def itemsize(self) -> int:
        """Bytes of a number, b."""
        return self.dtype.itemsize


#: Kind of memory → bytes, at the moment of peak memory.
Parts = Mapping[str, int]


def weight_bytes(config: PretrainedConfig, load: Workload) -> int:
    """Bytes of a model."""
    return count_parameters(config) * load.itemsize


def vocabulary(config: PretrainedConfig) -> int:
    """V."""
    return spec_for(config).sizes(config)["vocab"]


def hidden_size(config: PretrainedConfig) -> int:
    """H."""
    return spec_for(config).sizes(config)["hidden"]


def num_layers(config: PretrainedConfig) -> int:
    """L."""
    return spec_for(config).sizes(config)["layers"]
