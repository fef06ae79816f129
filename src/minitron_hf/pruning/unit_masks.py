"""Which positions of a tensor hold kept units."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..families import ArchSpec
from ..families.axes import Dimension, Product, dimension_axes, product_shape


def dimension_mask(
    dimension: Dimension, spec: ArchSpec, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]
) -> Tensor | None:
    """True where a dimension holds kept units, bool [length]; None where it is not cut."""
    return None if dimension_axes(dimension).isdisjoint(kept) else _sum_mask(dimension, spec, sizes, kept)


def _sum_mask(
    dimension: Dimension, spec: ArchSpec, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]
) -> Tensor:
    """True at kept positions: bool [length], or [outer, length] where they depend on the unit before."""
    pieces = [_product_mask(product, spec, sizes, kept) for product in dimension]
    outer = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
    return torch.cat([piece.expand(*outer, -1) for piece in pieces], dim=-1)


def _product_mask(
    product: Product, spec: ArchSpec, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]
) -> Tensor:
    mask: Tensor | None = None
    for factor, size in zip(product, product_shape(product, sizes)):
        if isinstance(factor, tuple):
            own = _sum_mask(factor, spec, sizes, kept)
        elif isinstance(factor, str) and (axis := factor.partition("/")[0]) in kept:
            own = unit_mask(axis, spec, sizes, kept)
            own = own.unflatten(0, (-1, size)) if "/" in factor else own
        else:
            own = torch.ones(size, dtype=torch.bool)
        if mask is None:
            mask = own
        else:
            # A row belongs to a unit of the factor before, which varies fastest so far.
            own = own if own.ndim == 1 else own.repeat(mask.shape[-1] // len(own), 1)
            mask = (mask[..., None] & own).flatten(-2)
    assert mask is not None
    return mask


def unit_mask(axis: str, spec: ArchSpec, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]) -> Tensor:
    """True at kept units of an axis: bool [units], or [outer, units] for units inside another axis."""
    units = kept[axis]
    if units.ndim == 1:
        mask = torch.zeros(sizes[axis], dtype=torch.bool)
        mask[torch.from_numpy(units)] = True
        return mask
    outer = spec.axis[axis].within
    assert outer is not None
    mask = torch.zeros(sizes[outer], sizes[axis], dtype=torch.bool)
    for row, unit in enumerate(kept.get(outer, range(sizes[outer]))):
        mask[int(unit), torch.from_numpy(units[row])] = True
    return mask
