"""Sums over the weights of each unit.

Legend of shape suffixes: U units of an axis, O units of the axis that they are within, G groups, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..families import ArchSpec
from ..families.axes import Dimension, dimension_axes, product_shape
from ..families.tensors import named_tensors
from ..weights import tensor_values


def unit_squares(tensor: Tensor, pattern: str, axis: str, spec: ArchSpec, sizes: Mapping[str, int]) -> Tensor | None:
    """Sum of the squares of a tensor's elements by the unit that they belong to.

    The elements of a group are those of its members too.

    Args:
        tensor: a tensor of the model.
        pattern: its name in the table.
        axis: the axis.
        spec: the family's table.
        sizes: sizes of all axes.

    Returns:
        float64 `[U]`, or `[O, U]` for units within others; None where no element belongs to a single unit.
    """
    outer = spec.axis[axis].within
    count = sizes[axis] * (1 if outer is None else sizes[outer])
    owners = [
        (unit_of(dimension, axis, spec, sizes), None if outer is None else unit_of(dimension, outer, spec, sizes))
        for dimension in spec.dimensions.get(pattern, ())
    ]
    if all(unit is None for unit, _ in owners) or (outer and all(other is None for _, other in owners)):
        return None
    squares = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).square()
    index = np.zeros((1,) * tensor.ndim, dtype=np.int64)
    known = np.ones((1,) * tensor.ndim, dtype=bool)
    for position, (unit, other) in enumerate(owners):
        if unit is None and other is None:
            squares = squares.sum(position, keepdim=True, dtype=torch.float64)
            continue
        shape = tuple(-1 if p == position else 1 for p in range(tensor.ndim))
        for label, step in ((unit, 1), (other, sizes[axis])):
            if label is not None:
                index = index + step * label.reshape(shape)
                known = known & (label >= 0).reshape(shape)
    index, known = np.broadcast_to(index, squares.shape), np.broadcast_to(known, squares.shape)
    found = torch.zeros(count, dtype=torch.float64)
    found.index_add_(0, torch.from_numpy(index[known]), squares.cpu().double()[torch.from_numpy(known.copy())])
    return found if outer is None else found.unflatten(0, (sizes[outer], -1))


def unit_of(dimension: Dimension, axis: str, spec: ArchSpec, sizes: Mapping[str, int]) -> np.ndarray | None:
    """Unit of an axis that every position of a dimension belongs to, −1 for none; None where none belongs to any.

    Args:
        dimension: the dimension.
        axis: the axis; the members of a group belong to it too.
        spec: the family's table.
        sizes: sizes of all axes.
    """
    members = {axis: 1, **{inner: sizes[inner] // sizes[outer] for inner, outer in spec.groups if outer == axis}}
    if dimension_axes(dimension).isdisjoint(members):
        return None
    pieces = []
    for product in dimension:
        shape = product_shape(product, sizes)
        own = [position for position, factor in enumerate(product) if factor in members]
        if not own:
            pieces.append(np.full(math.prod(shape), -1))
            continue
        unit = np.arange(shape[own[0]]) // members[str(product[own[0]])]
        inner = math.prod(shape[own[0] + 1 :])
        pieces.append(np.tile(np.repeat(unit, inner), math.prod(shape[: own[0]])))
    return np.concatenate(pieces)


def weight_magnitudes(spec: ArchSpec, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """L2 norm of all weights of every unit, and of every block of layers.

    Returns:
        axis → float32 in the shape of its units, NaN in layers that have none; blocks, float32 [L, L], NaN below the
        diagonal.
    """
    sizes = spec.sizes(model.config)
    layer_sizes = spec.layer_sizes(model.config)
    names = list(named_tensors(model))
    axes: dict[str, Tensor] = {}
    depth = sizes["layers"]
    layers_L = torch.zeros(depth, dtype=torch.float64)
    wanted = [axis.name for axis in spec.axes if axis.prunable and axis.name != "layers"]
    for axis in wanted:
        axes[axis] = torch.zeros(spec.units(axis, model.config), dtype=torch.float64)
        if spec.axis[axis].per_layer:
            for row, own in enumerate(layer_sizes):
                axes[axis][row, ..., own[axis] :] = torch.nan
            lacking = sorted(set(range(depth)) - set(spec.layers_with(axis, list(named_tensors(model, tied=True)))))
            axes[axis][lacking] = torch.nan
    for name in names:
        pattern, layer = spec.locate(name) or (name, None)
        values = tensor_values(model, name)
        if not values.is_floating_point():
            continue
        if layer is not None:
            layers_L[layer] += values.detach().double().square().sum().cpu()
        for axis in wanted:
            own = sizes if layer is None else layer_sizes[layer]
            squares = unit_squares(values, pattern, axis, spec, own)
            if squares is not None:
                place = axes[axis]
                if spec.axis[axis].per_layer:
                    place = place[layer][tuple(map(slice, spec.own_units(axis, own)))]
                place += squares
    total = layers_L.cumsum(0)
    blocks_LL = (total[None, :] - (total - layers_L)[:, None]).clamp(min=0).sqrt().float()
    blocks_LL = blocks_LL.masked_fill(torch.ones_like(blocks_LL, dtype=torch.bool).tril(-1), torch.nan)
    return {axis: squares.sqrt().float() for axis, squares in axes.items()}, blocks_LL


def channel_norms(spec: ArchSpec, model: PreTrainedModel, layer: int) -> Tensor:
    """L2 norm of everything that the matrices of one layer hold for each hidden channel, float64 [H]."""
    sizes = spec.sizes(model.config, layer)
    total_H = torch.zeros(sizes["hidden"], dtype=torch.float64)
    for name in named_tensors(model):
        pattern, where = spec.locate(name) or (name, None)
        if where == layer and len(spec.dimensions[pattern]) > 1:
            squares = unit_squares(tensor_values(model, name), pattern, "hidden", spec, sizes)
            if squares is not None:
                total_H += squares
    return total_H.sqrt()
