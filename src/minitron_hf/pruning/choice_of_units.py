"""Chooses the units to keep on every axis, by their importance scores, and the partners of merged heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PlanError
from ..families import ArchSpec
from ..scoring.scores import ImportanceScores
from .plan import _drop_padding

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def count_nonuniform(rows: Sequence[np.ndarray], size: int, multiple_of: int) -> list[int]:
    """How many units every layer keeps, where all together keep as many as with `size` in each.

    Scores of different layers are on different scales. A unit's share of its layer's squared scores is not: the
    choice keeps the largest sum of shares, over all layers, that whole blocks of units (one or more in each) can have.

    Args:
        rows: scores of every layer, [units]; NaN beyond its own units.
        size: units in each layer, were they equal; layers that have fewer keep all.
        multiple_of: units in a block, if it divides all sizes.

    >>> even = np.array([1.0, 1.0, 1.0, 1.0])
    >>> steep = np.array([9.0, 0.1, 0.1, 0.1])
    >>> count_nonuniform([even, steep], 2, 1)
    [3, 1]
    """
    squares = [np.sort(row[~np.isnan(row)].astype(np.float64))[::-1] ** 2 for row in rows]
    total = sum(min(len(own), size) for own in squares)
    block = math.gcd(multiple_of, size, *map(len, squares))
    shares = [own.reshape(-1, block).sum(1) / max(own.sum(), np.finfo(np.float64).tiny) for own in squares]
    for own in shares:
        own[0] = np.inf
    layer_of = np.repeat(np.arange(len(shares)), list(map(len, shares)))
    chosen = np.argsort(-np.concatenate(shares), kind="stable")[: total // block]
    return [int(count) * block for count in np.bincount(layer_of[chosen], minlength=len(shares))]


def choose_units(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    layers_kept: tuple[int, ...],
    cut: list[str],
    scores: ImportanceScores | None,
    *,
    is_rotated: bool = False,
) -> dict[str, np.ndarray]:
    """Kept units per axis: the highest scores, or the first rotated channels. Inner axes are chosen within groups."""
    if not cut:
        return {}
    assert scores is not None
    sizes = spec.layer_sizes(teacher)
    before = [sizes[layer] for layer in layers_kept]
    after = spec.layer_sizes(student)
    ranking = {axis: units.numpy() for axis, units in scores.axes.items()}
    if is_rotated:  # they are in the order of their energy
        ranking["hidden"] = -np.arange(spec.sizes(teacher)["hidden"])
    kept: dict[str, np.ndarray] = {}
    for axis in cut:
        if axis in dict(spec.groups) or spec.axis[axis].within is not None:
            continue
        if spec.axis[axis].per_layer:
            rows = [_top_units(ranking[axis][layer], own[axis]) for layer, own in zip(layers_kept, after)]
            kept[axis] = _pad_rows(rows)
        else:
            kept[axis] = _top_units(ranking[axis], spec.sizes(student)[axis])
    for inner, outer in spec.groups:
        if inner not in cut:
            continue
        rows = []
        for position, layer in enumerate(layers_kept):
            each_before = before[position][inner] // before[position][outer]
            each_after = after[position][inner] // after[position][outer]
            groups = _drop_padding(kept[outer][position]) if outer in kept else np.arange(before[position][outer])
            rows.append(
                np.concatenate(
                    [
                        group * each_before
                        + _top_units(
                            ranking[inner][layer][group * each_before : (group + 1) * each_before], each_after
                        )
                        for group in groups
                    ]
                )
            )
        kept[inner] = _pad_rows(rows)
    for axis in cut:
        outer_axis = spec.axis[axis].within
        if outer_axis is None:
            continue
        chosen = []
        for position, layer in enumerate(layers_kept):
            units = kept[outer_axis][position] if outer_axis in kept else range(before[position][outer_axis])
            count = after[position][axis]
            chosen.append(np.stack([_top_units(ranking[axis][layer][unit], count) for unit in units]))
        kept[axis] = np.stack(chosen)
    return kept


def choose_partners(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    layers_kept: tuple[int, ...],
    kept: Mapping[str, np.ndarray],
    axes: tuple[str, ...],
    scores: ImportanceScores | None,
) -> dict[str, np.ndarray]:
    """The dropped head that every kept one gains its difference to, per axis of heads and kept layer; -1 for none.

    Args:
        spec: the family.
        teacher: the teacher's config.
        layers_kept: teacher indices of the layers that stay.
        kept: kept units of every cut axis.
        axes: axes of heads that are merged (`add_back_axes`); none, no partners.
        scores: importance of the teacher's units.
    """
    if not axes or scores is None:
        return {}
    sizes = spec.layer_sizes(teacher)
    ranked = axes[-1]  # KV heads decide for their query head where each has its own
    rows = np.full_like(kept[ranked], -1)
    for position, layer in enumerate(layers_kept):
        before, chosen = sizes[layer], _drop_padding(kept[ranked][position])
        values = scores.axes[ranked][layer].numpy()[: before[ranked]]
        if np.isnan(values).all():
            continue  # no attention here
        if "kv" in axes and before["heads"] != before["kv"]:
            raise PlanError(
                f"head_add_back: layer {layer} shares KV heads, but other layers do not. Leave it out for this model."
            )
        if np.isnan(values).any():
            raise PlanError(
                "head_add_back needs the order of all heads, but some were cut in an earlier round of scoring. "
                "Score with iterations=1, or leave it out."
            )
        each = before["heads"] // before["kv"] if axes == ("heads",) and "kv" in before else before[ranked]
        for group in np.unique(chosen // each):
            members = np.arange(group * each, (group + 1) * each)
            own = np.flatnonzero(chosen // each == group)
            partner_of = {
                int(members[unit]): int(members[partner])
                for unit, partner in _add_back_pairs(values[members], len(own))
            }
            rows[position, own] = [partner_of.get(int(unit), -1) for unit in chosen[own]]
    return dict.fromkeys(axes, rows)


def _add_back_pairs(scores: np.ndarray, left: int) -> list[tuple[int, int]]:
    """Pairs of a kept and a dropped unit, where the `left` units of the highest scores are kept.

    After Muralidharan et al. 2024, arXiv 2407.14679, §2.2.

    By rank, counted from 1, unit i of K kept out of L goes with 2K - i + 1, for i from 2K - L + 1 to K: the paper
    prints a lower bound that is one too low. With K < L / 2 every kept unit has a partner, and the rest has none.

    >>> _add_back_pairs(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), 3)
    [(1, 4), (2, 3)]
    >>> _add_back_pairs(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 1)
    [(4, 3)]
    """
    order = np.argsort(-scores, kind="stable").tolist()
    return [(order[rank], order[2 * left - rank - 1]) for rank in range(max(0, 2 * left - len(order)), left)]


def _pad_rows(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of unequal length as one array, filled up with -1.

    >>> _pad_rows([np.array([4]), np.array([0, 2])]).tolist()
    [[4, -1], [0, 2]]
    """
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


def _top_units(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, ascending. A layer without such units has NaN alone.

    Raises:
        PlanError: if only some units have scores, and fewer than `count`.

    >>> _top_units(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist()
    [0, 2]
    """
    known = np.count_nonzero(~np.isnan(scores))
    if 0 < known < count:
        raise PlanError(
            f"The scores rank {known} units, and {count} are to stay: the others were cut in an earlier round of "
            "scoring. Score again, for the sizes of this plan."
        )
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
