"""Candidate shapes of a student: enumerates a space of sizes, counts each exactly, keeps those within a budget.

Needs a config alone: no weights, no data. After Muralidharan et al. 2024, §2.3 (arXiv 2407.14679).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, VOCABULARY_FIELD, ArchSpec, spec_for
from ..families.tensors import own_parameters
from ..models import empty_model
from .counts import active_parameters
from .legality import require_units
from .request import TOLERANCE as TOLERANCE
from .request import PrunerConfig
from .resolve import resolve_sizes
from .student import build_student_config, layers_without_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Sizes to try, by their names in `PrunerConfig`: numbers of units, fractions of the teacher's, or multiples of
#: another size, `"2.5*hidden_size"`.
Space = Mapping[str, Sequence[int | float | str]]
_MULTIPLE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*\*\s*([a-z_]+)\s*")


@dataclass(frozen=True)
class Shape:
    """One student that could be cut.

    Attributes:
        request: its sizes, all given as numbers of units.
        sizes: size of every axis.
        num_parameters: exact, tied ones once, other parts of a wrapper included. Where layers are not alike and some
            go, it is that of `student_config`, and a plan by scores may keep others.
        num_active_parameters: those that one token uses, see `count_active_parameters`.
    """

    request: PrunerConfig
    sizes: Mapping[str, int]
    num_parameters: int
    num_active_parameters: int

    @property
    def name(self) -> str:
        """The sizes that differ from the teacher's, in few words."""
        return name_of_sizes(self.request)


def name_of_sizes(request: PrunerConfig) -> str:
    """The sizes that a request gives, in few words."""
    given = {name: getattr(request, name) for name in PRUNER_FIELDS if getattr(request, name) is not None}
    return " ".join(f"{name}={size}" for name, size in given.items()) or "unchanged"


@dataclass
class Enumeration:
    """What a space holds.

    Attributes:
        shapes: all that can be cut, largest first.
        refused: why others cannot → how many there are.
    """

    shapes: list[Shape]
    refused: dict[str, int] = field(default_factory=dict)


def enumerate_shapes(
    config: PretrainedConfig,
    space: Space,
    base: PrunerConfig | None = None,
    *,
    same_fraction: Mapping[str, Sequence[str]] | None = None,
) -> Enumeration:
    """All shapes of a space that the stock classes can hold, counted exactly.

    Args:
        config: the teacher's.
        space: sizes to try; sizes that are not named stay.
        base: everything else that a request says (`contiguous`, `keep_first_layers`, `multiple_of`, …).
        same_fraction: a size of the space → others that are always asked for by the same fraction.

    Raises:
        PlanError: if the space names something that is no size, or none of its shapes can be cut.
        UnsupportedModelError: if the family is unknown.
    """
    spec = spec_for(config)
    build_shape = shape_builder(
        spec, config, base or PrunerConfig(), same_fraction or {}, may_stay=bool(same_fraction)
    )
    _require_space(spec, space)
    found: dict[tuple[int, ...], Shape] = {}
    refused: dict[str, int] = {}
    for values in itertools.product(*space.values()):
        try:
            shape = build_shape(dict(zip(space, values)))
        except PlanError as error:
            reason = re.sub(r"\d+", "…", str(error))  # one reason for all sizes
            refused[reason] = refused.get(reason, 0) + 1
            continue
        found.setdefault(tuple(shape.sizes.values()), shape)
    if not found:
        reasons = "; ".join(sorted(refused)[:3])
        raise PlanError(f"No shape of this space can be cut: {reasons} Choose other sizes.")
    return Enumeration(sorted(found.values(), key=lambda shape: -shape.num_parameters), refused)


def shape_builder(
    spec: ArchSpec,
    config: PretrainedConfig,
    base: PrunerConfig,
    same_fraction: Mapping[str, Sequence[str]],
    *,
    may_stay: bool = False,
) -> Callable[[Mapping[str, int | float | str]], Shape]:
    """Return a function: sizes → the shape that they give, counted exactly.

    Args:
        spec: the family.
        config: the teacher's.
        base: everything of a request but its sizes.
        same_fraction: a size → others that get the same fraction.
        may_stay: see `resolve_sizes`.

    Returns:
        The function. It raises `PlanError` for sizes that cannot be cut.
    """
    teacher = empty_model(config)
    spec.check(teacher)
    parameters, before = dict(own_parameters(teacher)), spec.sizes(config)

    def build_shape(values: Mapping[str, int | float | str]) -> Shape:
        given = {**values, **{other: values[name] for name, others in same_fraction.items() for other in others}}
        request = _resolve_multiples(config, given, base)
        sizes, _ = resolve_sizes(spec, config, request, may_stay=may_stay)
        require_units(spec, parameters, request, [axis for axis in sizes if sizes[axis] < before[axis]])
        layers_kept = layers_without_scores(spec, config, request, sizes["layers"])
        student = build_student_config(spec, config, sizes, layers_kept, model_type=request.model_type)
        tensors = [(name, shape) for name, _, shape in spec.student_tensors(parameters, student, layers_kept)]
        count = sum(math.prod(shape) for _, shape in tensors)
        named: dict[str, Any] = {
            name: sizes[axis] if getattr(request, name) is not None else None for name, axis in PRUNER_FIELDS.items()
        }
        return Shape(replace(request, **named), sizes, count, active_parameters(spec, student, tensors))

    return build_shape


#: Name of a budget or target of parameters → the field of a shape that it limits.
COUNTED = {
    "max_parameters": "num_parameters",
    "max_active_parameters": "num_active_parameters",
    "target_parameters": "num_parameters",
    "target_active_parameters": "num_active_parameters",
}


def counted_cost(name: str, shape: Shape) -> float:
    """What a budget of parameters, one of `COUNTED`, counts of a shape."""
    return float(getattr(shape, COUNTED[name]))


def largest_share(
    shape: Shape, budgets: Mapping[str, float], cost: Callable[[str, Shape], float] = counted_cost
) -> float:
    """The largest share of a budget that a shape uses; above 1 if it exceeds one."""
    return max(cost(name, shape) / limit for name, limit in budgets.items())


def filter_by_budgets(
    shapes: Iterable[Shape], budgets: Mapping[str, float], tolerance: float, cost: Callable[[str, Shape], float]
) -> list[Shape]:
    """Keep the shapes that meet all budgets, and use at least `(1 - tolerance)` of one of them.

    Args:
        shapes: candidates.
        budgets: name of a budget → the most that a student may cost.
        tolerance: by how much of every budget it may cost less.
        cost: function of the name of a budget and a shape. It is called in the order of the budgets, up to the first
            one that a shape exceeds.
    """
    return [
        shape
        for shape in shapes
        if all(cost(name, shape) <= limit for name, limit in budgets.items())
        and any(cost(name, shape) >= (1 - tolerance) * limit for name, limit in budgets.items())
    ]


def require_budgets(
    shapes: Sequence[Shape], budgets: Mapping[str, float], tolerance: float, cost: Callable[[str, Shape], float]
) -> list[Shape]:
    """Keep the shapes within budgets, as `filter_by_budgets` does, and refuse budgets that none meets.

    Raises:
        PlanError: if no shape is; it names what the shapes cost, and the nearest smaller one.
    """
    found = filter_by_budgets(shapes, budgets, tolerance, cost)
    if found:
        return found
    given = ", ".join(f"{name}={limit:,.10g}" for name, limit in budgets.items())
    within = [shape for shape in shapes if all(cost(name, shape) <= limit for name, limit in budgets.items())]
    if within:
        nearest = max(within, key=lambda shape: largest_share(shape, budgets, cost))
        least = rounded_up(1 - largest_share(nearest, budgets, cost))
        costs = " and ".join(f"{name} {cost(name, nearest):,.10g}" for name in budgets)
        raise PlanError(
            f"{given}: none of the {len(shapes)} shapes of this space costs that, or up to {tolerance:.0%} less. The "
            f"nearest smaller one is {nearest.name}, with {costs}: tolerance={least:g} takes "
            "it. Or change the budget or the space."
        )
    ranges = "; ".join(
        f"{name} is {min(costs):,.10g} to {max(costs):,.10g}"
        for name in budgets
        for costs in [[cost(name, shape) for shape in shapes]]
    )
    raise PlanError(
        f"{given}: none of the {len(shapes)} shapes of this space costs so little: {ranges}. Raise the budget, or "
        "extend the space."
    )


def rounded_up(fraction: float) -> float:
    """A fraction rounded up to hundredths.

    >>> rounded_up(0.0712)
    0.08
    """
    return math.ceil(round(100 * fraction, 6)) / 100


def memory_bytes(
    config: PretrainedConfig, num_parameters: int, *, context_length: int, batch_size: int, dtype: torch.dtype
) -> int:
    """Bytes of weights, and of the cache of keys, values and states when `context_length` tokens are in it.

    The stock model builds its cache on the meta device, which is measured.

    Args:
        config: the model's.
        num_parameters: the model's.
        context_length: tokens of every sequence.
        batch_size: sequences.
        dtype: of weights and cache.
    """
    return num_parameters * dtype.itemsize + cache_bytes(
        config, context_length=context_length, batch_size=batch_size, dtype=dtype
    )


@torch.no_grad()
def cache_bytes(config: PretrainedConfig, *, context_length: int, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes that the stock model's cache takes; see `memory_bytes`.

    Raises:
        PlanError: if the model cannot be run without weights.
    """
    model: Any = empty_model(config).eval().to(dtype)
    # The other ways to compute stacked experts need values, or bfloat16 on the meta device.
    with contextlib.suppress(ValueError):
        model.set_experts_implementation("batched_mm")
    tokens = torch.zeros(batch_size, context_length, dtype=torch.long, device="meta")
    try:
        output: Any = model.base_model(input_ids=tokens, use_cache=True)
        cache = output.past_key_values
        tensors = [
            tensor
            for layer in cache.layers
            for tensor in vars(layer).values()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        ]
    except Exception as error:
        raise PlanError(
            f"The cache of a {config.model_type} model cannot be told without running it ({error}). "
            "Give a budget of parameters instead."
        ) from error
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def select_diverse(
    shapes: Sequence[Shape], count: int, *, cost: Callable[[Shape], float] | None = None
) -> list[Shape]:
    """Select shapes that differ from each other, and of similar ones the cheapest.

    The largest radius is taken at which `count` shapes remain when each, in the order of their cost, is left out if
    one that was taken before is nearer than the radius. Distances are the largest difference of a size, in logarithms,
    relative to what the size spans among all shapes.

    Args:
        shapes: candidates.
        count: how many to keep.
        cost: lower is better; None takes the order they are in.
    """
    if len(shapes) <= count:
        return list(shapes) if cost is None else sorted(shapes, key=cost)
    ordered = list(shapes) if cost is None else sorted(shapes, key=cost)
    # An axis that a model lacks has size 0.
    logs = [[math.log(max(size, 1)) for size in shape.sizes.values()] for shape in ordered]
    spans = [max(column) - min(column) or 1.0 for column in zip(*logs)]

    def distance(one: int, other: int) -> float:
        return max(abs(a - b) / span for a, b, span in zip(logs[one], logs[other], spans))

    def taken(radius: float) -> list[int]:
        chosen: list[int] = []
        for index in range(len(ordered)):
            if all(distance(index, other) >= radius for other in chosen):
                chosen.append(index)
        return chosen

    radii = sorted({distance(one, other) for one, other in itertools.combinations(range(len(ordered)), 2)})
    low, high = 0, len(radii)  # radius 0 takes all
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(taken(radii[middle])) >= count else (low, middle)
    return [ordered[index] for index in taken(radii[low])[:count]]


def _require_space(spec: ArchSpec, space: Space) -> None:
    known = [FIELD_OF_AXIS[axis.name] for axis in spec.axes if axis.name in FIELD_OF_AXIS]
    if VOCABULARY_FIELD in space:
        raise PlanError(
            f"space: {VOCABULARY_FIELD} is not searched: all shapes have the same tokens. Leave it out, and cut the "
            f"vocabulary with {VOCABULARY_FIELD} of base (of prune, in a recipe with a search)."
        )
    if unknown := sorted(map(str, set(space) - set(known))):
        raise PlanError(
            f"space: a '{spec.model_type}' model has no {', '.join(unknown)}. Expected some of {', '.join(known)}."
        )
    for name, values in space.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise PlanError(f"space: {name}={values!r}: expected a list of sizes.")
        for text in (value for value in values if isinstance(value, str)):
            match = _MULTIPLE.fullmatch(text)
            if match is None or match[2] not in known or any(isinstance(v, str) for v in space.get(match[2], ())):
                raise PlanError(f"space: {name}={text!r}: expected a size, a fraction, or such as '2.5*hidden_size'.")


def _resolve_multiples(
    config: PretrainedConfig, values: Mapping[str, int | float | str], base: PrunerConfig
) -> PrunerConfig:
    """A request with multiples of other sizes worked out, against the shape that the others give."""
    plain: dict[str, Any] = {name: value for name, value in values.items() if not isinstance(value, str)}
    request = replace(base, **plain)
    if len(plain) == len(values):
        return request
    sizes, _ = resolve_sizes(spec_for(config), config, request)
    for name, text in values.items():
        if isinstance(text, str) and (match := _MULTIPLE.fullmatch(text)):
            changes: dict[str, Any] = {name: round(float(match[1]) * sizes[PRUNER_FIELDS[match[2]]])}
            request = replace(request, **changes)
    return request
