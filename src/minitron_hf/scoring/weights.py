"""Sums and ranges of the weights of every unit.

Legend of shape suffixes: U units of an axis, O units of the axis that they are within, G groups, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..families import ArchSpec
from ..families.axes import Dimension, dimension_axes, dimension_size, product_shape
from ..families.tensors import named_tensors
from ..hardware import sum_dtype
from ..weights import tensor_values

#: Elementwise function of weights, such as `torch.square` or `torch.abs`.
Term = Callable[[Tensor], Tensor]

#: Values that are converted to float32 or float64 at a time: the stacked experts of a layer may be a tenth of a model.
CHUNK_VALUES = 1 << 24


def unit_sums(
    tensor: Tensor, pattern: str, axis: str, spec: ArchSpec, sizes: Mapping[str, int], term: Term
) -> Tensor | None:
    """Sum a term of a tensor's elements over the unit that they belong to.

    The elements of a group include those of its members.

    Args:
        tensor: a tensor of the model.
        pattern: its name in the table.
        axis: the axis.
        spec: the family's table.
        sizes: sizes of all axes.
        term: elementwise function whose values are summed.

    Returns:
        float64 `[U]`, or `[O, U]` for units within others; None where no element belongs to a single unit.
    """
    return _by_unit(tensor, spec.dimensions.get(pattern, ()), axis, spec, sizes, term, "sum")


def _by_unit(
    tensor: Tensor,
    dimensions: Sequence[Dimension],
    axis: str,
    spec: ArchSpec,
    sizes: Mapping[str, int],
    term: Term,
    reduction: Literal["sum", "amax"],
) -> Tensor | None:
    """`unit_sums`, or the largest term of each unit: -inf for a unit without elements."""
    outer = spec.axis[axis].within
    count = sizes[axis] * (1 if outer is None else sizes[outer])
    owners = [
        (unit_indices(dimension, axis, spec, sizes), unit_indices(dimension, outer, spec, sizes) if outer else None)
        for dimension in dimensions
    ]
    if all(unit is None for unit, _ in owners) or (outer and all(other is None for _, other in owners)):
        return None
    found = torch.full((count,), 0.0 if reduction == "sum" else -torch.inf, dtype=torch.float64)
    for rows in _slices(tensor):
        part = tensor[rows].detach()
        terms = term(part.to(torch.promote_types(part.dtype, torch.float32)))
        index = np.zeros((1,) * tensor.ndim, dtype=np.int64)
        known = np.ones((1,) * tensor.ndim, dtype=bool)
        for position, labels in enumerate(owners):
            own = [label if label is None or position else label[rows] for label in labels]
            if all(label is None for label in own):
                if reduction == "sum":
                    terms = terms.sum(position, keepdim=True, dtype=sum_dtype(terms.device))
                else:
                    terms = terms.amax(position, keepdim=True)
                continue
            shape = tuple(-1 if p == position else 1 for p in range(tensor.ndim))
            for label, step in zip(own, (1, sizes[axis])):
                if label is not None:
                    index = index + step * label.reshape(shape)
                    known = known & (label >= 0).reshape(shape)
        index, known = np.broadcast_to(index, terms.shape), np.broadcast_to(known, terms.shape)
        values = terms.cpu().double()[torch.from_numpy(known.copy())]
        found.scatter_reduce_(0, torch.from_numpy(index[known]), values, reduction)
    return found if outer is None else found.unflatten(0, (sizes[outer], -1))


def unit_ranges(spec: ArchSpec, model: PreTrainedModel, axis: str, layer: int) -> Tensor:
    """Range of the weights of every unit in one layer: largest minus smallest, each as a share of the layer's largest.

    The shares of all matrices that hold the axis are added. A tensor that holds several side by side, such as gate and
    up projection, counts as these.

    Args:
        spec: the family's table.
        model: the model.
        axis: a prunable axis.
        layer: index of the layer.

    Returns:
        float64 `[U]`, or `[O, U]` for units within others.
    """
    sizes = spec.sizes(model.config, layer)
    total = torch.zeros(spec.own_units(axis, sizes), dtype=torch.float64)
    for name in named_tensors(model):
        pattern, where = spec.locate(name) or (name, None)
        if where != layer or len(spec.dimensions[pattern]) < 2:
            continue
        for part, dimensions in _apart(tensor_values(model, name), spec.dimensions[pattern], sizes):
            largest = _by_unit(part, dimensions, axis, spec, sizes, torch.positive, "amax")
            smallest = _by_unit(part, dimensions, axis, spec, sizes, torch.neg, "amax")
            if largest is not None and smallest is not None:
                range_U = (largest + smallest).nan_to_num(nan=0.0, neginf=0.0)
                total += range_U / range_U.max().clamp(min=torch.finfo(torch.float64).tiny)
    return total


def _apart(
    tensor: Tensor, dimensions: Sequence[Dimension], sizes: Mapping[str, int]
) -> Iterator[tuple[Tensor, Sequence[Dimension]]]:
    """The matrices that a tensor holds side by side, such as queries, keys and values, with their dimensions."""
    for position, dimension in enumerate(dimensions):
        if len(dimension) > 1:
            lengths = [dimension_size((product,), sizes) for product in dimension]
            for part, product in zip(tensor.split(lengths, position), dimension, strict=True):
                yield from _apart(part, [*dimensions[:position], (product,), *dimensions[position + 1 :]], sizes)
            return
    yield tensor, dimensions


def _slices(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first dimension with at most `CHUNK_VALUES` values each, or a single row."""
    rows = max(1, CHUNK_VALUES * len(tensor) // max(1, tensor.numel()))
    return (slice(start, start + rows) for start in range(0, len(tensor), rows))


def unit_indices(dimension: Dimension, axis: str, spec: ArchSpec, sizes: Mapping[str, int]) -> np.ndarray | None:
    """Index of the unit that each position of a dimension belongs to, −1 for none; None if no position has one.

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


def sum_by_unit(spec: ArchSpec, model: PreTrainedModel, term: Term) -> tuple[dict[str, Tensor], Tensor]:
    """Sum a term of all weights of every unit, and of every block of layers.

    Args:
        spec: the family's table.
        model: the model.
        term: elementwise function of weights, ≥ 0: `torch.square`, `torch.abs`.

    Returns:
        axis → float64 sums in the shape of its units, NaN in layers that have none; sums of blocks, float64 [L, L],
        NaN below the diagonal.
    """
    axes = zero_scores(spec, model)
    layer_sizes = spec.layer_sizes(model.config)
    layers_L = torch.zeros(len(layer_sizes), dtype=torch.float64)
    for name in named_tensors(model):
        pattern, layer = spec.locate(name) or (name, None)
        values = tensor_values(model, name)
        if not values.is_floating_point():
            continue
        if layer is not None:
            for part in values.detach().reshape(-1).split(CHUNK_VALUES):
                layers_L[layer] += term(part.to(sum_dtype(part.device))).sum().cpu()
        sizes = spec.sizes(model.config) if layer is None else layer_sizes[layer]
        for axis, place in axes.items():
            sums = unit_sums(values, pattern, axis, spec, sizes, term)
            if sums is not None and spec.axis[axis].per_layer:
                place[layer][tuple(map(slice, spec.own_units(axis, sizes)))] += sums
            elif sums is not None:
                place += sums
    total_L = layers_L.cumsum(0)
    blocks_LL = (total_L[None, :] - (total_L - layers_L)[:, None]).clamp(min=0)
    return axes, below_diagonal_nan(blocks_LL)


def zero_scores(spec: ArchSpec, model: PreTrainedModel) -> dict[str, Tensor]:
    """Prunable axis → float64 zeros in the shape of its units, NaN in layers that have none."""
    layer_sizes = spec.layer_sizes(model.config)
    tied_names = list(named_tensors(model, tied=True))
    axes: dict[str, Tensor] = {}
    for axis in (axis.name for axis in spec.axes if axis.prunable and axis.name != "layers"):
        axes[axis] = torch.zeros(spec.units(axis, model.config), dtype=torch.float64)
        if spec.axis[axis].per_layer:
            for row, sizes in enumerate(layer_sizes):
                axes[axis][row, ..., sizes[axis] :] = torch.nan
            lacking = sorted(set(range(len(layer_sizes))) - set(spec.layers_with(axis, tied_names)))
            axes[axis][lacking] = torch.nan
    return axes


def unobserved_scores(spec: ArchSpec, model: PreTrainedModel, observed: Collection[str]) -> dict[str, Tensor]:
    """L2 norm of the weights of units outside the layers that no observer sees: the neurons of a projector.

    Args:
        spec: the family's table.
        model: the model.
        observed: axes that have scores.

    Returns:
        axis → float64 [U].
    """
    sizes = spec.sizes(model.config)
    missing = [
        axis.name
        for axis in spec.axes
        if axis.prunable and not axis.per_layer and axis.name != "layers" and axis.name not in observed
    ]
    squares = {axis: torch.zeros(sizes[axis], dtype=torch.float64) for axis in missing}
    for name in named_tensors(model) if missing else ():
        pattern, layer = spec.locate(name) or (name, None)
        for axis, place in squares.items() if layer is None else ():
            sums = unit_sums(tensor_values(model, name), pattern, axis, spec, sizes, torch.square)
            place += 0 if sums is None else sums
    return {axis: place.sqrt() for axis, place in squares.items()}


def below_diagonal_nan(blocks_LL: Tensor) -> Tensor:
    """Scores of blocks, with NaN where a block would end before it begins."""
    return blocks_LL.masked_fill(torch.ones_like(blocks_LL, dtype=torch.bool).tril(-1), torch.nan)


def channel_norms(spec: ArchSpec, model: PreTrainedModel, layer: int) -> Tensor:
    """L2 norm of the weights that the matrices of one layer hold for each hidden channel, float64 [H]."""
    sizes = spec.sizes(model.config, layer)
    total_H = torch.zeros(sizes["hidden"], dtype=torch.float64)
    for name in named_tensors(model):
        pattern, where = spec.locate(name) or (name, None)
        if where == layer and len(spec.dimensions[pattern]) > 1:
            squares = unit_sums(tensor_values(model, name), pattern, "hidden", spec, sizes, torch.square)
            if squares is not None:
                total_H += squares
    return total_H.sqrt()
