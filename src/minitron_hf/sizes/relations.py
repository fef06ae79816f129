"""Sizes that are held only together: what follows from what was asked for, and the nearest sizes that fit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..families import ArchSpec
from ..families.runtimes import HEADS_FILL_HIDDEN, MLP_FOUR_TIMES_HIDDEN
from .legality import (
    Groups,
    _cuttable_axis,
    _require_groups,
    _require_least,
    _required_divisors,
    field_name,
    nearest_of,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Relations of two sizes that `portable` asks for.
PORTABLE_RELATIONS = (HEADS_FILL_HIDDEN, MLP_FOUR_TIMES_HIDDEN)


def fitting_sizes(
    spec: ArchSpec,
    config: PretrainedConfig,
    sizes: Mapping[str, int],
    groups: Groups,
    relation: tuple[str, str],
    axis: str,
) -> dict[int, int]:
    """The sizes of one axis of a relation that a plan takes beside the other sizes → the other axis's size.

    Args:
        spec: the family.
        config: the teacher's.
        sizes: the student's; those of the other axes are kept.
        groups: of the student.
        relation: two dimensions that are equal, such as `("heads*head_dim", "hidden")`.
        axis: the axis, of either dimension.
    """
    both = [_cuttable_axis(spec, dimension, sizes) for dimension in relation]
    (moving, each), (follower, each_follower) = both if both[0][0] == axis else reversed(both)
    before, step = spec.sizes(config), each_follower // math.gcd(each_follower, each)
    found = {}
    for size in range(step, before[moving] + 1, step):
        tried = {**sizes, moving: size, follower: each * size // each_follower}
        tried |= {outer: tried[inner] for inner, outer in groups.outer_follows_inner if inner in (moving, follower)}
        if tried[follower] <= before[follower] and _is_legal(spec, config, before, tried, groups):
            found[size] = tried[follower]
    return found


def _is_legal(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], sizes: Mapping[str, int], groups: Groups
) -> bool:
    if any(sizes[axis] % divisor for axis, divisor, _ in _required_divisors(spec, config, before, sizes)):
        return False
    with contextlib.suppress(PlanError):
        for own in groups.sizes_of_layer_kinds:
            _require_groups(spec, config, {**before, **own}, {**sizes, **own})
        _require_least(spec, config, before, sizes)
        return True
    return False


def follow_equal(
    spec: ArchSpec,
    config: PretrainedConfig,
    before: Mapping[str, int],
    after: dict[str, int],
    given: Collection[str],
    groups: Groups,
    *,
    portable: bool,
) -> list[str]:
    """Where two dimensions are held only at one size, let the one that was not asked for follow.

    Args:
        spec: the family.
        config: the teacher's.
        before: the teacher's sizes.
        after: the student's, which are changed.
        given: axes that were asked for.
        groups: of the student.
        portable: whether heads fill the hidden size because `portable` asks for it, not the stock class.
    """
    notes = []
    fixed = set(given)
    for relation in spec.equal * len(spec.equal):  # a size that follows may move another
        left, each_left = _cuttable_axis(spec, relation[0], after)
        right, each_right = _cuttable_axis(spec, relation[1], after)
        if each_left * after[left] == each_right * after[right]:
            continue
        formula = _in_words(spec, relation, after)
        holders = f"the stock '{spec.model_type}' classes only hold {formula}"
        if portable and relation in PORTABLE_RELATIONS:
            holders = f"with portable=True, {spec.model_type} students only have {formula}"
        moves, follows, each, each_following = left, right, each_left, each_right
        if right in fixed:
            moves, follows, each, each_following = right, left, each_right, each_left
        name, other = field_name(spec, moves), field_name(spec, follows)
        followed, rest = divmod(each * after[moves], each_following)
        if {left, right} <= fixed:
            fitting = fitting_sizes(spec, config, after, groups, relation, follows)
            pairs = [f"{name}={fitting[one]} with {other}={one}" for one in nearest_of(after[follows], list(fitting))]
            wrong = f"{name}={after[moves]} and {other}={after[follows]} do not fit together: {holders}."
            raise PlanError(f"{wrong}{_nearest(pairs)}")
        wrong = ""
        if rest:
            wrong = f"{name}={after[moves]}: {holders}."
        elif why := _reason_against_groups(spec, config, {**after, follows: followed}, follows, groups):
            wrong = f"{name}={after[moves]}: {holders}, and {other}={followed} does not fit {why}."
        if wrong:
            fitting = fitting_sizes(spec, config, after, groups, relation, moves)
            raise PlanError(f"{wrong}{_nearest(nearest_of(after[moves], list(fitting)))}")
        after[follows] = followed
        fixed.add(follows)
        notes.append(f"{other} follows {name} to {followed}: {formula}.")
    return notes


def _in_words(spec: ArchSpec, relation: tuple[str, str], sizes: Mapping[str, int]) -> str:
    """A relation in the names of the user's sizes."""
    (left, each_left), (right, each_right) = (_cuttable_axis(spec, one, sizes) for one in relation)
    why = f" (heads keep their {each_left} dimensions)" if left == "heads" else ""
    sides = [
        f"{each} × {field_name(spec, axis)}" if each > 1 else field_name(spec, axis)
        for axis, each in ((right, each_right), (left, each_left))
    ]
    return f"{' = '.join(sides)}{why}"


def _reason_against_groups(
    spec: ArchSpec,
    config: PretrainedConfig,
    sizes: Mapping[str, int],
    axis: str,
    groups: Groups,
) -> str:
    """The number of groups that a size cannot be shared out to; empty if it can."""
    before = spec.sizes(config)
    for inner, outer in spec.groups:
        if inner == axis and (inner, outer) not in groups.outer_follows_inner:
            each, rest = divmod(sizes[inner], sizes[outer])
            if rest or each > before[inner] // before[outer]:
                return f"{field_name(spec, outer)}={sizes[outer]}"
    return ""


def _nearest(sizes: Iterable[object]) -> str:
    """The last sentence of a refusal; empty if nothing fits."""
    found = " or ".join(map(str, sizes))
    return f" Nearest: {found}." if found else ""
