"""Tensor axes have names: the dimension grammar, and what an axis is. Pure, no torch.

A tensor is written as its dimensions, separated by spaces; a dimension is a sum (concatenation) of products (row-major
nesting) of axis names or integers. A fused q,k,v projection with grouped queries, for example, is
`"heads*head_dim+kv*head_dim+kv*head_dim hidden"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: A product of axis names or integers, outermost first.
Product = tuple["str | int", ...]
#: A sum of products: the pieces that are concatenated along one tensor dimension.
Dimension = tuple[Product, ...]


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
        prunable: whether units may be removed at all. Head dimension, vocabulary and positions are not.
        within: the axis inside each of whose units these units are chosen: the neurons of every expert.
    """

    name: str
    fields: tuple[str, ...] = ()
    implied: str | None = None
    per_layer: bool = False
    prunable: bool = True
    within: str | None = None


def parse_dimensions(text: str) -> tuple[Dimension, ...]:
    """Parse the dimensions of one tensor.

    >>> parse_dimensions("heads*3*head_dim hidden")
    ((('heads', 3, 'head_dim'),), (('hidden',),))
    >>> parse_dimensions("ffn+ffn")
    ((('ffn',), ('ffn',)),)
    """
    return tuple(tuple(_parse_product(product) for product in dim.split("+")) for dim in text.split())


def _parse_product(text: str) -> Product:
    factors = tuple(int(factor) if factor.isdigit() else factor for factor in text.split("*"))
    for factor in factors:
        if isinstance(factor, str) and not factor.isidentifier():
            raise ValueError(f"{factor!r} in {text!r} is neither an axis name nor an integer")
    return factors


def dimension_axes(dimension: Dimension) -> frozenset[str]:
    """Names of all axes that a dimension is made of.

    >>> sorted(dimension_axes(parse_dimensions("heads*head_dim+kv*head_dim")[0]))
    ['head_dim', 'heads', 'kv']
    """
    return frozenset(factor for product in dimension for factor in product if isinstance(factor, str))


def product_shape(product: Product, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Size of every factor of a product.

    >>> product_shape(("heads", 3, "head_dim"), {"heads": 4, "head_dim": 8})
    (4, 3, 8)
    """
    return tuple(factor if isinstance(factor, int) else sizes[factor] for factor in product)


def dimension_size(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """Length of a dimension.

    >>> dimension_size(parse_dimensions("heads*head_dim+kv*head_dim")[0], {"heads": 4, "kv": 2, "head_dim": 8})
    48
    """
    return sum(int(np.prod(product_shape(product, sizes))) for product in dimension)


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
    """
    if dimension_axes(dimension).isdisjoint(kept):
        return None
    pieces = []
    offset = 0
    for product in dimension:
        index = np.zeros(1, dtype=np.int64)
        for factor, size in zip(product, product_shape(product, sizes)):
            units = kept.get(factor) if isinstance(factor, str) else None
            units = np.arange(size) if units is None else np.asarray(units, dtype=np.int64)
            if units.ndim == 2:
                # Row r belongs to the r-th unit of the factor before, which varies fastest so far.
                units = np.tile(units, (len(index) // len(units), 1))
            index = (index[:, None] * size + units).reshape(-1)
        pieces.append(index + offset)
        offset += int(np.prod(product_shape(product, sizes)))
    return np.concatenate(pieces)
