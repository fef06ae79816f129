"""The dimension grammar against explicit nested loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from minitron_hf.families.axes import (
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


@pytest.mark.parametrize("seed", range(8))
def test_units_that_belong_to_the_unit_before(seed: int):
    """A projection ordered by group: counted through position by position, with whole heads as labels."""
    chance = random.Random(seed)
    groups, each, head_dim = 4, 3, 2
    sizes = {"kv": groups, "heads": groups * each, "head_dim": head_dim}
    [dimension] = parse_dimensions("5+kv*(heads/kv+1+1)*head_dim")
    left = chance.randint(1, each)
    kept: dict[str, np.ndarray] = {"kv": np.array(chance.sample(range(groups), chance.randint(1, groups)))}
    if seed % 2:
        kept = {}
    heads = [
        group * each + query
        for group in kept.get("kv", np.arange(groups)).tolist()
        for query in chance.sample(range(each), left)
    ]
    kept["heads"] = np.array(heads)

    position, where = 5, {}
    for group in range(groups):
        for member in [*range(group * each, (group + 1) * each), f"key {group}", f"value {group}"]:
            for _ in range(head_dim):
                where.setdefault(member, []).append(position)
                position += 1
    assert dimension_size(dimension, sizes) == position
    expected = list(range(5))
    for row, group in enumerate(kept.get("kv", np.arange(groups)).tolist()):
        for member in [*heads[row * left : (row + 1) * left], f"key {group}", f"value {group}"]:
            expected += where[member]
    assert dimension_index(dimension, sizes, kept).tolist() == expected


def test_kept_everything_is_every_position():
    [dimension] = parse_dimensions("heads*head_dim+kv*head_dim")
    index = dimension_index(dimension, SIZES, {"heads": np.arange(6)})
    assert index.tolist() == list(range(24))


@pytest.mark.parametrize(
    "text", ["heads head-dim", "heads*", "+ffn", "ffn++ffn", "heads/2", "1.5*ffn", "kv*(heads", "kv*()", "kv*heads/"]
)
def test_text_that_is_no_dimension(text: str):
    with pytest.raises(ValueError, match="neither an axis name nor an integer"):
        parse_dimensions(text)


@pytest.mark.parametrize("text", ["heads/kv", "kv*2*heads/kv", "heads*(heads/kv+2)", "kv*(2*heads/kv)"])
def test_units_of_a_unit_follow_it(text: str):
    with pytest.raises(ValueError, match=r"'heads/kv' in '.*' has to follow 'kv', to which it belongs"):
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
    [grouped] = parse_dimensions("kv*(heads/kv+2)*head_dim")
    assert product_shape(grouped[0], SIZES) == (2, 5, 3)
    assert dimension_axes(grouped) == {"heads", "kv", "head_dim"}
    assert implied_size("4*hidden", SIZES) == 20
    assert implied_size("ffn/kv", SIZES) == 3
    assert implied_size("heads", SIZES) == 6
