"""Tensor axes have names: the dimension grammar, and what an axis is. Pure, no torch.

A tensor is written as its dimensions, separated by spaces; a dimension is a sum (concatenation) of products (row-major
nesting) of axis names or integers. A fused q,k,v projection with grouped queries, for example, is
`"heads*head_dim+kv*head_dim+kv*head_dim hidden"`.

Where every unit of an axis holds several things side by side, they stand in parentheses after it, and `heads/kv` are
the heads that belong to that one unit of kv: `"kv*(heads/kv+1+1)*head_dim hidden"` is the same projection, ordered by
group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

#: An axis name, the units of an axis that belong to one unit of another (`heads/kv`), an integer, or a sum.
Factor: TypeAlias = "str | int | Dimension"
#: A product of factors, outermost first.
Product: TypeAlias = "tuple[Factor, ...]"
#: A sum of products: the pieces that are concatenated along one tensor dimension.
Dimension: TypeAlias = "tuple[Product, ...]"
#: The channels of the residual stream.
CHANNELS: Dimension = (("hidden",),)


@dataclass(frozen=True)
class Rounding:
    """A stock class that does not take a size as it is given.

    Attributes:
        flag: config field that switches this on. A student's config holds the size that results, and False here.
        share: fraction of the size that is taken: numerator and denominator.
        factor: config field of a factor on that, rounded down.
        multiple: config field; the size is finally rounded up to a multiple of its value.
    """

    flag: str
    share: tuple[int, int]
    factor: str
    multiple: str

    def size(self, given: int, fields: Mapping[str, Any]) -> int:
        """The size that results from the one that is given.

        Args:
            given: the size in the config.
            fields: the config's fields.

        >>> rounding = Rounding("adjust", (2, 3), "factor", "multiple")
        >>> rounding.size(100, {"adjust": True, "factor": 1.5, "multiple": 32})
        128
        >>> rounding.size(100, {"adjust": False, "factor": 1.5, "multiple": 32})
        100
        """
        if not fields[self.flag]:
            return given
        size = int(fields[self.factor] * (given * self.share[0] // self.share[1]))
        multiple = int(fields[self.multiple])
        return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Axis:
    """One named axis of a family.

    Attributes:
        name: name in the dimension grammar.
        fields: config fields that hold its size; all of them are written together. Empty where the stock config always
            derives the size.
        implied: size where the first field is missing or None, as a sum of products, each of which may be divided
            once: `"hidden/heads"`, `"4*hidden"`, `"nope_dim+rope_dim"`.
        per_layer: whether units are chosen in every layer for itself (the number of units is the same in all).
        prunable: whether units may be removed at all. Head dimension
            and positions are not, and the vocabulary is by the counts of its tokens instead of scores.
        within: the axis inside each of whose units these units are chosen: the neurons of every expert.
        rounding: how the stock class changes the size that the first field gives.
    """

    name: str
    fields: tuple[str, ...] = ()
    implied: str | None = None
    per_layer: bool = False
    prunable: bool = True
    within: str | None = None
    rounding: Rounding | None = None


def parse_dimensions(text: str) -> tuple[Dimension, ...]:
    """Parse the dimensions of one tensor.

    >>> parse_dimensions("heads*3*head_dim hidden")
    ((('heads', 3, 'head_dim'),), (('hidden',),))
    >>> parse_dimensions("ffn+ffn")
    ((('ffn',), ('ffn',)),)
    >>> parse_dimensions("kv*(heads/kv+2)*head_dim")
    ((('kv', (('heads/kv',), (2,)), 'head_dim'),),)
    """
    return tuple(_parse_sum(dimension) for dimension in text.split())


def _parse_sum(text: str, before: Factor | None = None) -> Dimension:
    return tuple(_parse_product(product, before) for product in _split(text, "+"))


def _parse_product(text: str, before: Factor | None = None) -> Product:
    factors: list[Factor] = []
    for factor in _split(text, "*"):
        before = _parse_factor(factor, text, before)
        factors.append(before)
    return tuple(factors)


def _parse_factor(text: str, product: str, before: Factor | None) -> Factor:
    if text.startswith("(") and text.endswith(")"):
        return _parse_sum(text[1:-1], before)
    if text.isdigit():
        return int(text)
    axis, divided, outer = text.partition("/")
    if not axis.isidentifier() or (divided and not outer.isidentifier()):
        raise ValueError(f"{text!r} in {product!r} is neither an axis name nor an integer")
    if divided and outer != before:
        raise ValueError(f"{text!r} in {product!r} has to follow {outer!r}, to which it belongs")
    return text


def _split(text: str, at: str) -> list[str]:
    """Split outside parentheses."""
    parts = [""]
    for character in text:
        if character == at and parts[-1].count("(") == parts[-1].count(")"):
            parts.append("")
        else:
            parts[-1] += character
    return parts


def dimension_axes(dimension: Dimension) -> frozenset[str]:
    """Names of all axes that a dimension is made of.

    >>> sorted(dimension_axes(parse_dimensions("heads*head_dim+kv*head_dim")[0]))
    ['head_dim', 'heads', 'kv']
    >>> sorted(dimension_axes(parse_dimensions("kv*(heads/kv+2)")[0]))
    ['heads', 'kv']
    """
    names: set[str] = set()
    for product in dimension:
        for factor in product:
            if isinstance(factor, str):
                names.update(factor.split("/"))
            elif isinstance(factor, tuple):
                names |= dimension_axes(factor)
    return frozenset(names)


def product_shape(product: Product, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Size of every factor of a product.

    >>> product_shape(("heads", 3, "head_dim"), {"heads": 4, "head_dim": 8})
    (4, 3, 8)
    >>> product_shape(("kv", (("heads/kv",), (2,))), {"heads": 12, "kv": 4})
    (4, 5)
    """
    return tuple(_factor_size(factor, sizes) for factor in product)


def _factor_size(factor: Factor, sizes: Mapping[str, int]) -> int:
    if isinstance(factor, int):
        return factor
    if isinstance(factor, tuple):
        return dimension_size(factor, sizes)
    axis, _, outer = factor.partition("/")
    return sizes[axis] // sizes[outer] if outer else sizes[axis]


def dimension_size(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """Length of a dimension.

    >>> dimension_size(parse_dimensions("heads*head_dim+kv*head_dim")[0], {"heads": 4, "kv": 2, "head_dim": 8})
    48
    """
    return sum(math.prod(product_shape(product, sizes)) for product in dimension)


def implied_size(text: str, sizes: Mapping[str, int]) -> int:
    """Size that a config leaves to be derived from others.

    >>> sizes = {"hidden": 64, "heads": 4, "kv": 2}
    >>> implied_size("hidden/heads", sizes), implied_size("4*hidden", sizes), implied_size("heads/kv+2", sizes)
    (16, 256, 4)
    """
    return sum(_divided_product(term, sizes) for term in text.split("+"))


def _divided_product(text: str, sizes: Mapping[str, int]) -> int:
    above, _, below = text.partition("/")
    size = int(np.prod(product_shape(_parse_product(above), sizes)))
    return size // int(np.prod(product_shape(_parse_product(below), sizes))) if below else size


def dimension_index(
    dimension: Dimension, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """Positions along a dimension that survive.

    Args:
        dimension: the dimension.
        sizes: size of every axis before the cut.
        kept: kept units of every axis that is cut, in the order they shall have: `[units]`; or `[outer, units]` for
            units chosen inside every kept unit of the factor before them.

    Returns:
        int64 positions, or None when no axis of the dimension is cut.

    >>> heads_then_dims = parse_dimensions("heads*head_dim")[0]
    >>> dimension_index(heads_then_dims, {"heads": 3, "head_dim": 2}, {"heads": np.array([0, 2])}).tolist()
    [0, 1, 4, 5]
    >>> fused = parse_dimensions("ffn+ffn")[0]
    >>> dimension_index(fused, {"ffn": 3}, {"ffn": np.array([1])}).tolist()
    [1, 4]
    >>> own = {"heads": np.array([0, 2]), "head_dim": np.array([[1], [0]])}
    >>> dimension_index(heads_then_dims, {"heads": 3, "head_dim": 2}, own).tolist()
    [1, 4]
    >>> by_group = parse_dimensions("kv*(heads/kv+2)")[0]
    >>> dimension_index(by_group, {"heads": 6, "kv": 2}, {"heads": np.array([1, 2, 3, 5])}).tolist()
    [1, 2, 3, 4, 5, 7, 8, 9]
    """
    return None if dimension_axes(dimension).isdisjoint(kept) else _sum_index(dimension, sizes, kept)


def _sum_index(dimension: Dimension, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """Positions that survive: `[positions]`, or `[outer, positions]` where they depend on the unit before."""
    pieces = []
    offset = 0
    for product in dimension:
        pieces.append(_product_index(product, sizes, kept) + offset)
        offset += int(np.prod(product_shape(product, sizes)))
    outer = np.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
    return np.concatenate([np.broadcast_to(piece, (*outer, piece.shape[-1])) for piece in pieces], axis=-1)


def _product_index(product: Product, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]) -> np.ndarray:
    index: np.ndarray | None = None
    for factor, size in zip(product, product_shape(product, sizes)):
        units = _factor_units(factor, sizes, kept)
        if index is None:
            index = units
            continue
        if units.ndim == 2:
            # Row r belongs to the r-th unit of the factor before, which varies fastest so far.
            units = np.tile(units, (index.shape[-1] // len(units), 1))
        index = (index[..., None] * size + units).reshape(*index.shape[:-1], -1)
    assert index is not None
    return index


def _factor_units(factor: Factor, sizes: Mapping[str, int], kept: Mapping[str, np.ndarray]) -> np.ndarray:
    if isinstance(factor, tuple):
        return _sum_index(factor, sizes, kept)
    if isinstance(factor, int):
        return np.arange(factor)
    axis, _, outer = factor.partition("/")
    if axis not in kept:
        return np.arange(_factor_size(factor, sizes))
    units = np.asarray(kept[axis], dtype=np.int64)
    if not outer:
        return units
    # Every kept outer unit keeps equally many, in its own row.
    return units.reshape(len(kept[outer]) if outer in kept else sizes[outer], -1) % _factor_size(factor, sizes)
