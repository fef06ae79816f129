"""Quantisation-aware distillation: the student's projections compute with rounded weights while it trains.

A weight W enters a projection as Q(W), rounded as `quantize_checkpoint` rounds it, and its gradient is that of Q(W)
(straight-through), or 0 where Q clips it. Checkpoints hold W. torchao replaces the projections; names and shapes of
all tensors stay.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model

from ..errors import UnsupportedModelError
from ..quantization import quantised_projections, require_method

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


def fake_quantize(student: Any, method: str, *, is_split: bool) -> None:
    """Have a student's projections round their weights in every forward pass, as `quantize_checkpoint` would.

    Args:
        student: stock model; its projections are replaced, its parameters are the same objects.
        method: one of `ROUNDINGS`.
        is_split: whether FSDP or DeepSpeed splits its weights.

    Raises:
        UnsupportedModelError: if an adapter or a plugin wraps or splits the projections, or none can be quantised.
    """
    if is_peft_model(student):
        raise UnsupportedModelError(
            f"fake_quantization={method!r} with an adapter: the sum of weight and adapter would have to be rounded, "
            "not the weight. Train all weights, or leave fake_quantization out."
        )
    if is_split:
        raise UnsupportedModelError(
            f"fake_quantization={method!r} is not supported with FSDP or DeepSpeed, which split the weights that "
            "share a scale. Use one device or DDP."
        )
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    group_size, paths = quantised_projections(student.config, method)
    if method == "int4":
        rounding = IntxFakeQuantizeConfig(torch.int4, group_size=group_size, is_symmetric=True)  # type: ignore[attr-defined]
    else:
        rounding = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(student, QATConfig(weight_config=rounding, step="prepare"), filter_fn=lambda _, path: path in paths)
