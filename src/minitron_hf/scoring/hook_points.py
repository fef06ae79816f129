"""Finds the units of an axis at the hook points of a family: inputs and outputs of modules.

Legend of shape suffixes: U units of an axis, R dimensions of one unit, D the units and inner dimensions that a
projection reads or writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from transformers import Conv1D

from ..families import ArchSpec
from ..families.axes import Dimension, dimension_axes, dimension_size, product_shape
from .hooks import Hooks


class UnitView:
    """The units of an axis in the input of the projection that reads them: a slice of its last dimension.

    Attributes:
        position: which dimension of the projection's weight holds them.
        num_units: how many units there are.
        is_group: whether each unit is a group of what the slice holds: the outer axis of `ArchSpec.groups`.
        is_scalar: whether each unit is one number: a neuron.
    """

    def __init__(self, spec: ArchSpec, axis: str, module: str, sizes: Mapping[str, int]) -> None:
        dimensions = spec.dimensions[f"{module}.weight"]
        member = {outer: inner for inner, outer in spec.groups}.get(axis, axis)
        [self.position] = [i for i, dim in enumerate(dimensions) if member in dimension_axes(dim)]
        dimension = dimensions[self.position]
        [index] = [i for i, product in enumerate(dimension) if member in product]
        product = dimension[index]
        self.is_group = axis not in product
        start = dimension_size(dimension[:index], sizes)
        self.slice = slice(start, start + math.prod(product_shape(product, sizes)))
        if self.is_group:
            self.shape: tuple[int, ...] = (sizes[axis], -1)
            units = [0]
        else:
            self.shape = product_shape(product, sizes)
            own = (axis, spec.axis[axis].within)
            units = [i for i, factor in enumerate(product) if factor in own]
        self.order = [*units, *(i for i in range(len(self.shape)) if i not in units)]
        self.num_units = math.prod(self.shape[i] for i in units)
        self.is_scalar = not self.is_group and len(units) == len(self.shape)

    def split(self, x: Tensor) -> Tensor:
        """[..., D] → [..., U, R]."""
        lead = x.shape[:-1]
        x = x[..., self.slice].unflatten(-1, self.shape)
        x = x.permute(*range(len(lead)), *(len(lead) + i for i in self.order))
        return x.reshape(*lead, self.num_units, -1)


def holds_stacked_experts(spec: ArchSpec, module: str) -> bool:
    """Whether a module that reads units holds the weights of many experts in 3-D tensors."""
    return f"{module}.weight" not in spec.dimensions


def stacked_axes(spec: ArchSpec) -> dict[str, list[str]]:
    """Module of stacked experts → the axes that are observed in it."""
    axes: dict[str, list[str]] = {}
    for axis, module in spec.hook_points.items():
        if holds_stacked_experts(spec, module):
            axes.setdefault(module, []).append(axis)
    return axes


def norm_paths(spec: ArchSpec, modules: Mapping[str, nn.Module], num_layers: int) -> Iterator[tuple[str, int | None]]:
    """Paths of the norms whose outputs hold the hidden channels, each with its layer; None for the last norm.

    Some layers lack some norms.
    """
    for layer in range(num_layers):
        for name in spec.layer_norms:
            if (path := spec.layer_parameter(layer, name)) in modules:
                yield path, layer
    yield spec.final_norm, None


def watch_states(spec: ArchSpec, hooks: Hooks, num_layers: int, observe: Callable[[Tensor], None]) -> None:
    """Call a function with the input of every layer, and with the output of the last."""
    for layer in range(num_layers):
        hooks.on_input(f"{spec.layers_path}.{layer}", observe)
    hooks.on_output(f"{spec.layers_path}.{num_layers - 1}", observe)


def producing_projections(
    spec: ArchSpec, axis: str, modules: Mapping[str, nn.Module], layer: int
) -> Iterator[tuple[str, Dimension]]:
    """The projections of a layer that compute the units of an axis: (module, dimension of its output).

    They are the matrices that hold the axis in the dimension that they write.
    """
    for pattern, dimensions in spec.dimensions.items():
        name, _, leaf = pattern.rpartition(".")
        module = modules.get(spec.layer_parameter(layer, name))
        if leaf == "weight" and len(dimensions) == 2 and module is not None and name != spec.hook_points[axis]:
            written = dimensions[1 if isinstance(module, Conv1D) else 0]
            if axis in dimension_axes(written):
                yield name, written


def unit_slices(axis: str, dimension: Dimension, sizes: Mapping[str, int]) -> list[slice]:
    """Slices of a dimension that each hold one value for every unit of an axis: gates and neurons are two."""
    slices, start = [], 0
    for product in dimension:
        shape = product_shape(product, sizes)
        if axis in product:
            times = math.prod(shape) // sizes[axis]  # interleaved halves: `axis*2`
            assert product[0] == axis, product
            slices += [slice(start + number, start + math.prod(shape), times) for number in range(times)]
        start += math.prod(shape)
    return slices
