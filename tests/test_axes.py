"""The dimension grammar against explicit nested loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from minitron_hf.axes import (
    dimension_axes,
    dimension_index,
    dimension_size,
    implied_size,
    parse_dimensions,
    product_shape,
)

SIZES = {"heads": 6, "kv": 2, "head_dim": 3, "ffn": 7, "hidden": 5}
TEXTS = [
    "hidden",
    "heads*head_dim",
    "heads*3*head_dim",
    "ffn+ffn",
    "heads*head_dim+kv*head_dim+kv*head_dim",
    "hidden*2+ffn",
    "4",
]


def label_positions(text: str) -> list[tuple]:
    """Every position of a dimension, as the piece it lies in and the unit of each factor, by counting through."""
    labels = []
    for piece, product in enumerate(text.split("+")):
        units: list[tuple] = [()]
        for factor in product.split("*"):
            size = int(factor) if factor.isdigit() else SIZES[factor]
            units = [(*unit, (factor, index)) for unit in units for index in range(size)]
        labels += [(piece, unit) for unit in units]
    return labels


@pytest.mark.parametrize("text", TEXTS)
def test_size_is_the_number_of_positions(text: str):
    [dimension] = parse_dimensions(text)
    assert dimension_size(dimension, SIZES) == len(label_positions(text))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_index_lists_the_positions_of_kept_units_in_their_order(text: str, seed: int):
    """Reordering included: the kept units may come in any order."""
    chance = random.Random(seed)
    kept = {
        axis: np.array(chance.sample(range(size), chance.randint(1, size)))
        for axis, size in SIZES.items()
        if chance.random() < 0.6
    }
    [dimension] = parse_dimensions(text)
    index = dimension_index(dimension, SIZES, kept)
    labels = label_positions(text)
    if dimension_axes(dimension).isdisjoint(kept):
        assert index is None
        return
    rank = {axis: {unit: position for position, unit in enumerate(units.tolist())} for axis, units in kept.items()}
    alive = [
        (piece, tuple(rank.get(factor, {}).get(unit, unit) for factor, unit in units), position)
        for position, (piece, units) in enumerate(labels)
        if all(unit in rank[factor] for factor, unit in units if factor in rank)
    ]
    assert index.dtype == np.int64
    assert index.tolist() == [position for *_, position in sorted(alive)]


def test_kept_everything_is_every_position():
    [dimension] = parse_dimensions("heads*head_dim+kv*head_dim")
    index = dimension_index(dimension, SIZES, {"heads": np.arange(6)})
    assert index.tolist() == list(range(24))


@pytest.mark.parametrize("text", ["heads head-dim", "heads*", "+ffn", "ffn++ffn", "heads/2", "1.5*ffn"])
def test_text_that_is_no_dimension(text: str):
    with pytest.raises(ValueError, match="neither an axis name nor an integer"):
        parse_dimensions(text)


def test_unknown_axes_have_no_size():
    [dimension] = parse_dimensions("heads*banana")
    with pytest.raises(KeyError, match="banana"):
        dimension_size(dimension, SIZES)


def test_parts():
    rows, columns = parse_dimensions("heads*3*head_dim hidden")
    assert (rows, columns) == ((("heads", 3, "head_dim"),), (("hidden",),))
    assert product_shape(rows[0], SIZES) == (6, 3, 3)
    assert dimension_axes(rows) == {"heads", "head_dim"}
    assert implied_size("4*hidden", SIZES) == 20
    assert implied_size("ffn/kv", SIZES) == 3
    assert implied_size("heads", SIZES) == 6
