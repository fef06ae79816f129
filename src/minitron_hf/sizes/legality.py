"""Legal sizes of an axis, and the nearest legal ones that a refusal names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, families, text_config
from ..families.axes import dimension_axes, dimension_size, implied_size, parse_dimensions
from .classes import _equivalent_classes
from .request import PrunerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


#: Multiples that kernels and quantisers like, largest first. A fraction of a number of channels or neurons is rounded
#: to the first of which the teacher has at least `FEWEST_STEPS`, else to a multiple of `SMALL_STEP`.
LARGE_STEPS = (256, 128, 64)
SMALL_STEP = 8
FEWEST_STEPS = 32


@dataclass(frozen=True)
class Groups:
    """What a request makes of units in groups, such as query heads in groups that share keys and values.

    Attributes:
        outer_follows_inner: pairs of axes (inner, outer) with one inner unit in each group, where only the inner size
            is given: the outer one follows it.
        sizes_of_layer_kinds: axis → number of groups, for every kind of layer that has another number than the config
            says; and an empty entry, for the other layers.
    """

    outer_follows_inner: Collection[tuple[str, str]]
    sizes_of_layer_kinds: Sequence[Mapping[str, int]]

    @classmethod
    def of(cls, spec: ArchSpec, config: PretrainedConfig, given: Collection[str]) -> Groups:
        """Those of a teacher, of which some axes are given a size."""
        return cls(_groups_cut_together(spec, spec.sizes(config), given), _unequal_sizes(spec, config))


def _groups_cut_together(spec: ArchSpec, before: Mapping[str, int], given: Collection[str]) -> list[tuple[str, str]]:
    """Groups (inner, outer) with one inner unit each whose outer size is not given: it follows the inner size.

    Multi-head attention, whose heads have keys and values of their own, is the example.
    """
    return [
        (inner, outer)
        for inner, outer in spec.groups
        if before[inner] == before[outer] and outer not in given and spec.axis[outer].prunable
    ]


def _unequal_sizes(spec: ArchSpec, config: PretrainedConfig) -> list[dict[str, int]]:
    """Groups that are more or fewer in some layers than the config says of all: none, and every such kind of layer."""
    outer = [axis for _, axis in spec.groups]
    sizes = spec.sizes(config)
    kinds: list[dict[str, int]] = [{}]
    for layer in spec.layer_sizes(config):
        own = {axis: layer[axis] for axis in outer if layer[axis] != sizes[axis]}
        kinds += [] if own in kinds else [own]
    return kinds


def rounding_step(size: int, each: int = 1, multiple_of: int | None = None, fraction: float = 1.0) -> int:
    """The step to whose multiples a fraction of a number of channels or neurons is rounded.

    Args:
        size: the teacher's size.
        each: divisor that the student's size must have in any case.
        multiple_of: the user's choice; None for one that follows from the size.
        fraction: the requested fraction. If it gives a multiple of a smaller step already, that step is returned.

    >>> rounding_step(576), rounding_step(2048), rounding_step(4096), rounding_step(14336)
    (8, 64, 128, 256)
    >>> rounding_step(2560, each=80), rounding_step(14336, multiple_of=32)
    (80, 32)
    >>> rounding_step(11008, fraction=0.5)  # 5,504 is 43 times 128
    128
    """
    if multiple_of is not None:
        return math.lcm(each, multiple_of)
    steps = [math.lcm(each, step) for step in LARGE_STEPS if math.lcm(each, step) * FEWEST_STEPS <= size]
    wanted = round(fraction * size)
    if steps and fraction < 1 and math.isclose(wanted, fraction * size):
        return next((step for step in steps if wanted % step == 0), steps[0])
    return steps[0] if steps else math.lcm(each, SMALL_STEP)


def _step(
    spec: ArchSpec,
    config: PretrainedConfig,
    axis: str,
    before: Mapping[str, int],
    sizes: Mapping[str, int],
    following: Collection[tuple[str, str]],
) -> int:
    """The step of the legal sizes of an axis, given the sizes decided so far.

    Args:
        spec: the family.
        config: the teacher's.
        axis: the axis.
        before: the teacher's sizes.
        sizes: the student's so far.
        following: groups (inner, outer) whose outer size follows the inner one: see `_groups_cut_together`.
    """
    step = 1
    deciding = [group for group in spec.groups if group not in following]
    for inner, outer in deciding:
        if axis == inner:
            step = math.lcm(step, sizes[outer])
    for one, other in [*spec.equal, *((right, left) for left, right in spec.equal)]:
        moving, each = _cuttable_axis(spec, one, sizes)
        follower, each_follower = _cuttable_axis(spec, other, sizes)
        if axis == moving:
            # hidden = heads * head_dim, and the heads follow in whole groups: any such multiple is legal.
            each_follower *= math.prod(sizes[outer] for inner, outer in deciding if inner == follower)
            step = math.lcm(step, each_follower // math.gcd(each_follower, each))
    return math.lcm(
        step, *(each for divided, each, _ in _required_divisors(spec, config, before, sizes) if divided == axis)
    )


def _required_divisors(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], sizes: Mapping[str, int]
) -> Iterator[tuple[str, int, str]]:
    """(Axis, what its size must be a multiple of, why)."""
    for multiple, divisor in spec.multiples:
        required = f"{field_name(spec, divisor)}={sizes[divisor]}"
        yield multiple, sizes[divisor], f"the stock '{spec.model_type}' config only holds multiples of {required}"
    for name, axis, power in spec.config_rules.scaled_fields:
        value = getattr(config, name)
        if power == 1 and isinstance(value, int):
            step = before[axis] // math.gcd(before[axis], value)
            yield axis, step, f"{name}={value} is scaled with it, and only stays whole for multiples of {step}"


def _largest_size(spec: ArchSpec, axis: str, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """The largest size of an axis within the groups kept so far."""
    return min(
        [before[axis], *(before[axis] // before[outer] * after[outer] for i, outer in spec.groups if i == axis)]
    )


def _round_fraction(fraction: float, size: int, step: int) -> int:
    """Nearest multiple of `step` to `fraction * size`, at least one step and at most `size`.

    >>> _round_fraction(0.75, 4096, 32), _round_fraction(0.5, 172, 8), _round_fraction(0.01, 64, 8)
    (3072, 88, 8)
    """
    return min(max(round(fraction * size / step), 1) * step, size)


def _cuttable_axis(spec: ArchSpec, dimension: str, sizes: Mapping[str, int]) -> tuple[str, int]:
    """The one axis of a dimension that can be cut, and the entries of the dimension per unit of it."""
    [parsed] = parse_dimensions(dimension)
    [axis] = [name for name in dimension_axes(parsed) if spec.axis[name].prunable and name not in spec.refused]
    return axis, dimension_size(parsed, {**sizes, axis: 1})


def _require_groups(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    for inner, outer in spec.groups:
        names = {axis: field_name(spec, axis) for axis in (inner, outer)}
        largest = before[inner] // before[outer]
        if after[inner] % after[outer] or after[inner] // after[outer] > largest:
            least, _ = _smallest_size(spec, config, inner)
            legal = [size for each in range(1, largest + 1) if (size := after[outer] * each) >= least]
            raise PlanError(
                f"{names[inner]}={after[inner]} with {names[outer]}={after[outer]}: every kept group keeps equally "
                f"many of its {largest}, so {names[inner]} must be one of {legal}. "
                f"Nearest: {_nearest_sizes(after[inner], legal)}."
                + (f" Or change {names[outer]}." if spec.axis[outer].prunable else "")
            )


def _require_multiples(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    divisors = list(_required_divisors(spec, config, before, after))
    for axis, divisor, why in divisors:
        if after[axis] % divisor:
            step = math.lcm(*(each for divided, each, _ in divisors if divided == axis))
            raise PlanError(
                f"{field_name(spec, axis)}={after[axis]}: {why}. "
                f"Nearest: {_nearest_sizes(after[axis], range(step, before[axis] + 1, step))}."
                + _suggest_model_type(spec, config, axis)
            )


def _suggest_model_type(spec: ArchSpec, config: PretrainedConfig, axis: str) -> str:
    """Stock classes that hold the same model without a limit on an axis."""
    free = [name for name in _equivalent_classes(spec, config) if axis not in dict(families()[name].multiples)]
    return "".join(f" Or set model_type='{name}', whose classes hold the same model at any size." for name in free)


def _require_least(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    """Routing picks a fixed number of experts, which must be there."""
    for axis in dict(spec.least):
        least, expression = _smallest_size(spec, config, axis)
        if after[axis] < min(least, before[axis]):
            step = math.lcm(*(after[outer] for inner, outer in spec.groups if inner == axis))
            raise PlanError(
                f"{field_name(spec, axis)}={after[axis]}: this model needs at least {least} ({expression}). "
                f"Keep {-(-least // step) * step} or more."
            )


def _smallest_size(spec: ArchSpec, config: PretrainedConfig, axis: str) -> tuple[int, str]:
    """The smallest size of an axis, and the expression that sets it; expressions with missing fields are ignored."""
    found = [(1, "")]
    for limited, expression in spec.least:
        names = re.findall(r"[a-z_]\w*", expression)
        values = {name: getattr(config, name, None) for name in names}
        values = {name: max(value) if isinstance(value, list) else value for name, value in values.items()}
        numbers = {name: value for name, value in values.items() if isinstance(value, int)}
        if limited == axis and len(numbers) == len(set(names)):
            found.append((implied_size(expression, numbers), expression))
    return max(found)


def field_name(spec: ArchSpec, axis: str) -> str:
    """The name under which a user knows an axis."""
    return FIELD_OF_AXIS.get(axis) or next(iter(spec.axis[axis].fields), axis)


def require_cuttable(spec: ArchSpec, config: PretrainedConfig, axis: str) -> None:
    """Refuse an axis that cannot be cut in this model.

    Raises:
        PlanError: with the reason.
    """
    reason = spec.refused.get(axis)
    if set(spec.axis[axis].fields) & set(getattr(config, "per_layer_attributes", None) or ()):
        reason = reason or "its layers hold unequal numbers of them, each its own"
    for name, value, refused_axis, why in spec.refused_if:
        if refused_axis == axis and getattr(config, name, None) == value:
            reason = f"{name}={value}: {why}"
    if reason is not None:
        raise PlanError(f"{field_name(spec, axis)} of this '{spec.model_type}' model cannot be cut: {reason}.")


def reason_not_cuttable(spec: ArchSpec, config: PretrainedConfig, name: str) -> str | None:
    """The reason why a size of a model cannot be cut, or None.

    Args:
        spec: the family.
        config: the teacher's.
        name: of the size in `PrunerConfig`.
    """
    axis = PRUNER_FIELDS[name]
    if axis not in spec.axis or not spec.axis[axis].prunable:
        return f"'{spec.model_type}' models have no {name}."
    try:
        require_cuttable(spec, text_config(config), axis)
    except PlanError as error:
        return str(error)
    return None


def _require_change(
    spec: ArchSpec,
    config: PretrainedConfig,
    axis: str,
    value: float,
    before: Mapping[str, int],
    after: Mapping[str, int],
    step: int,
) -> None:
    """Refuse a fraction below 1 that rounds to the teacher's size, and name a size that would change it."""
    if after[axis] < before[axis]:
        return
    size, name = before[axis], field_name(spec, axis)
    smaller = (size - 1) // step * step
    least, expression = _smallest_size(spec, config, axis)
    if size == 0:
        why = "this model has none. Leave it out."
    elif smaller >= least:
        steps = f", to a multiple of {step}" if step > 1 else ""
        why = f"it is rounded to all {size}{steps}. Give {smaller} or fewer, or leave it out."
    elif size == 1:
        inside = [f"Give {field_name(spec, inner)} instead, or leave" for inner, outer in spec.groups if outer == axis]
        why = f"there is only one. {inside[0] if inside else 'Leave'} it out."
    elif expression:
        why = f"this model needs at least {least} ({expression}). Leave it out."
    else:
        outer = [
            field_name(spec, outer) for inner, outer in spec.groups if inner == axis and spec.axis[outer].prunable
        ]
        also = f"Give a smaller {outer[0]}, too, or leave" if outer else "Leave"
        why = f"with the other sizes it has to be a multiple of {step}. {also} it out."
    raise PlanError(f"{name}={value} of {size} comes to no change: {why}")


def axes_of_tensors(spec: ArchSpec, names: Iterable[str]) -> set[str]:
    """Axes that some tensor of a model has.

    Args:
        spec: the family.
        names: names of all tensors of the model.
    """
    patterns = {found[0] for name in names if (found := spec.locate(name)) is not None}
    return {axis for pattern in patterns for each in spec.dimensions[pattern] for axis in dimension_axes(each)}


def require_units(spec: ArchSpec, names: Iterable[str], request: PrunerConfig, cut: Collection[str]) -> None:
    """Refuse sizes that a config holds, but no tensor of the model has.

    The neurons of MLPs are an example, in a model whose layers all have experts.

    Args:
        spec: the family.
        names: names of all tensors of the teacher.
        request: the sizes that are asked for.
        cut: axes that are cut.

    Raises:
        PlanError: naming the size.
    """
    held = axes_of_tensors(spec, names)
    for name, axis in PRUNER_FIELDS.items():
        value = getattr(request, name)
        if value is not None and axis != "layers" and axis in cut and axis not in held:
            others = [FIELD_OF_AXIS[one.name] for one in spec.axes if one.name in held and one.name in FIELD_OF_AXIS]
            raise PlanError(
                f"{name}={value}: the config of this '{spec.model_type}' model holds such a size, but no layer has "
                f"these units, so nothing would change. Leave it out. It has {', '.join(others)}."
            )


def _nearest_sizes(size: int, legal: Sequence[int]) -> str:
    """The legal sizes around a size, in words."""
    return " or ".join(map(str, nearest_of(size, legal)))


def nearest_of(size: int, legal: Sequence[int]) -> list[int]:
    """The legal sizes around a size, of an ascending sequence of them: one, two, or none if there are none."""
    below, above = [one for one in legal if one <= size], [one for one in legal if one >= size]
    return list(dict.fromkeys((*below[-1:], *above[:1])))
