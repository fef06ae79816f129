"""Quantisation-aware distillation: the student's projections compute with rounded weights while it trains.

A weight W enters a projection as Q(W), rounded as `quantize_checkpoint` rounds it, and its gradient is that of Q(W)
(straight-through), or 0 where Q clips it. Checkpoints hold W. torchao replaces the projections; names and shapes of
all tensors stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from ..errors import UnsupportedModelError
from ..quantization import quantised_projections, require_method

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Methods of `quantize_checkpoint` that round every weight by itself.
ROUNDINGS = ("int8", "int4")


def require_fake_quantization(method: str | None) -> None:
    """Refuse a method that cannot be trained through.

    Raises:
        ValueError: if the method is unknown.
        MissingDependencyError: if torchao is not installed.
    """
    if method is None:
        return
    if method not in ROUNDINGS:
        raise ValueError(f"fake_quantization={method!r}: expected one of {', '.join(ROUNDINGS)}, or None.")
    require_method(method)


def require_fake_quantizable(
    config: PretrainedConfig, method: str, *, has_adapter: bool, is_split: bool
) -> tuple[int, frozenset[str]]:
    """Refuse a student that cannot be trained with rounded weights, from its config alone.

    Args:
        config: the student's.
        method: one of `ROUNDINGS`.
        has_adapter: whether an adapter is trained.
        is_split: whether FSDP or DeepSpeed splits the weights.

    Returns:
        Inputs that share a scale (0: all of a row), and the paths of the projections to round.

    Raises:
        UnsupportedModelError: see `fake_quantize`.
    """
    if has_adapter:
        raise UnsupportedModelError(
            f"fake_quantization={method!r} with an adapter: the sum of weight and adapter would have to be rounded, "
            "not the weight. Train all weights, or leave fake_quantization out."
        )
    if is_split:
        raise UnsupportedModelError(
            f"fake_quantization={method!r} is not supported with FSDP or DeepSpeed, which split the weights that "
            "share a scale. Use one device or DDP."
        )
    return quantised_projections(config, method)


def fake_quantize(student: Any, method: str, *, is_split: bool) -> None:
    """Have a student's projections round their weights in every forward pass, as `quantize_checkpoint` would.

    Args:
        student: stock model; its projections are replaced, its parameters are the same objects.
        method: one of `ROUNDINGS`.
        is_split: whether FSDP or DeepSpeed splits its weights.

    Raises:
        UnsupportedModelError: if an adapter or a plugin wraps or splits the projections, or none can be quantised.
    """
    group_size, paths = require_fake_quantizable(
        student.config, method, has_adapter=is_peft_model(student), is_split=is_split
    )
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if method == "int4":
        rounding = IntxFakeQuantizeConfig(torch.int4, group_size=group_size, is_symmetric=True)  # type: ignore[attr-defined]
    else:
        rounding = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(student, QATConfig(weight_config=rounding, step="prepare"), filter_fn=lambda _, path: path in paths)
