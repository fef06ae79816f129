"""Projections with rounded weights for estimates of memory, which need no torchao.

They make the tensors that torchao makes (`IntxFakeQuantizer`, read in 0.18), in the same order, and keep the same ones
for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fake_quantization import require_fake_quantizable


class RoundedLinear(nn.Linear):
    """A projection that rounds its weight in every forward pass.

    Attributes:
        group_size: inputs that share a scale; 0: all of a row.
        largest: the largest integer.
        scales: scales and offsets of the last pass, which stay.
    """

    group_size: int
    largest: int
    scales: tuple[Tensor, Tensor]

    def forward(self, inputs: Tensor) -> Tensor:
        """The product with the rounded weight."""
        groups = self.weight.view(len(self.weight), -1, self.group_size or self.weight.shape[1])
        with torch.no_grad():
            ends = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = (torch.maximum(-ends[0], ends[1]) / (self.largest + 0.5)).float()
            self.scales = scale, torch.zeros_like(scale, dtype=torch.int32)
        return functional.linear(inputs, _rounded(self.weight, groups, *self.scales, self.largest), self.bias)


def seem_rounded(model: Any, method: str) -> None:
    """Have a model's projections take the memory of `fake_quantize`.

    Args:
        model: of fake tensors; changed.
        method: one of `ROUNDINGS`.

    Raises:
        UnsupportedModelError: see `fake_quantize`.
    """
    group_size, paths = require_fake_quantizable(model.config, method, has_adapter=False, is_split=False)
    for path in paths:
        module = model.get_submodule(path)
        module.__class__ = RoundedLinear
        module.group_size, module.largest = group_size, 7 if method == "int4" else 127


def _rounded(weight: Tensor, groups: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
    levels = torch.clamp(_Round.apply(groups * (1 / scale)) + zero, -largest - 1, largest)
    values = levels.view(weight.shape).view(groups.shape).to(weight.dtype, copy=True)
    return ((values - zero.to(weight.dtype)) * scale).view(weight.shape).to(weight.dtype)


class _Round(torch.autograd.Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """The nearest integers."""
        return torch.round(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return gradient
