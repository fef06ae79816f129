"""Reductions of activations to one number per unit: over the tokens of a row, then over rows.

Legend of shape suffixes: B rows of a batch, T tokens of a row, U units of an axis, n some of the tokens of a batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "l2", "var"]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Dtype to reduce in: float32, or float64 for float64 values."""
    return torch.promote_types(x.dtype, torch.float32)


def reduce_sequence(x_BTU: Tensor, mask_BT: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce activations over the unmasked tokens of each row, in float32 (float64 for float64 input) → [B, U]."""
    dtype = accumulation_dtype(x_BTU)
    if mask_BT is not None:
        # Filled, not multiplied: attention over nothing but padding may hold NaN.
        x_BTU = x_BTU.masked_fill(~mask_BT.to(x_BTU.device)[..., None], 0)
        count_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1).to(x_BTU.device)
    else:
        count_B1 = torch.full((1, 1), x_BTU.shape[1], device=x_BTU.device)
    # One row at a time keeps intermediate tensors small. `vector_norm` along tokens takes five times as long.
    if reduction == "l2":
        return torch.stack([x_TU.to(dtype).square().sum(0) for x_TU in x_BTU]).sqrt()
    if reduction == "mean":
        return torch.stack([x_TU.to(dtype).abs().sum(0) for x_TU in x_BTU]) / count_B1
    mean_BU = x_BTU.sum(1, dtype=dtype) / count_B1
    deviation = x_BTU.to(dtype) - mean_BU[:, None]
    if mask_BT is not None:
        deviation = deviation.masked_fill(~mask_BT.to(x_BTU.device)[..., None], 0)
    return deviation.square().sum(1) / count_B1


def reduce_routed(x_nU: Tensor, row_n: Tensor, count_B: Tensor, reduction: Reduction) -> Tensor:
    """`reduce_sequence` of activations that are 0 at all but n tokens → [B, U].

    Args:
        x_nU: activations at the n tokens, [n, U].
        row_n: row of each token, [n].
        count_B: number of unmasked tokens of every row, [B], on the same device.
        reduction: reduction over the tokens of a row.
    """
    x_nU = x_nU.to(accumulation_dtype(x_nU))
    count_B1 = count_B.clamp(min=1)[:, None]

    def row_sums(y_nU: Tensor) -> Tensor:
        return y_nU.new_zeros(len(count_B), y_nU.shape[1]).index_add_(0, row_n, y_nU)

    if reduction == "l2":
        return row_sums(x_nU.square()).sqrt()
    if reduction == "mean":
        return row_sums(x_nU.abs()) / count_B1
    mean_BU = row_sums(x_nU) / count_B1
    zeros_B1 = (count_B - torch.bincount(row_n, minlength=len(count_B)))[:, None]
    return (row_sums((x_nU - mean_BU[row_n]).square()) + zeros_B1 * mean_BU.square()) / count_B1


def row_terms(reduced_BU: Tensor) -> Tensor:
    """Sums over the reduced rows of one batch for `reduce_rows`: Σ|s|, Σs and Σs², in float64 → [3, U]."""
    reduced_BU = reduced_BU.double()
    return torch.stack([reduced_BU.abs().sum(0), reduced_BU.sum(0), reduced_BU.square().sum(0)])


def reduce_rows(sums_3U: Tensor, num_rows: int, reduction: Reduction) -> Tensor:
    """Reduce over rows from the sums of `row_terms` over all batches → [U]."""
    absolute, plain, squared = sums_3U
    if reduction == "l2":
        return squared.sqrt()
    if reduction == "mean":
        return absolute / num_rows
    return (squared / num_rows - (plain / num_rows).square()).clamp(min=0)
