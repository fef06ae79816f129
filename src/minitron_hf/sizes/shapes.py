"""Candidate shapes of a student: enumerates a space of sizes, counts each exactly, keeps those within a budget.

Needs a config alone: no weights, no data. After Muralidharan et al. 2024, §2.3 (arXiv 2407.14679).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, spec_for
from ..families.tensors import own_parameters
from ..models import empty_model
from .legality import require_units
from .request import PrunerConfig
from .resolve import resolve_sizes
from .student import build_student_config, layers_without_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Sizes to try, by their names in `PrunerConfig`: numbers of units, fractions of the teacher's, or multiples of
#: another size, `"2.5*hidden_size"`.
Space = Mapping[str, Sequence[int | float | str]]
#: By how much of a budget or a target a shape may be smaller (as in the search spaces of Muralidharan et al. 2024).
TOLERANCE = 0.05
_MULTIPLE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*\*\s*([a-z_]+)\s*")


@dataclass(frozen=True)
class Shape:
    """One student that could be cut.

    Attributes:
        request: its sizes, all given as numbers of units.
        sizes: size of every axis.
        num_parameters: exact, tied ones once, other parts of a wrapper included. Where layers are not alike and some
            go, it is that of `student_config`, and a plan by scores may keep others.
    """

    request: PrunerConfig
    sizes: Mapping[str, int]
    num_parameters: int

    @property
    def name(self) -> str:
        """The sizes that differ from the teacher's, in few words."""
        given = {
            name: getattr(self.request, name) for name in PRUNER_FIELDS if getattr(self.request, name) is not None
        }
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
        count = sum(math.prod(shape) for *_, shape in spec.student_tensors(parameters, student, layers_kept))
        named: dict[str, Any] = {
            name: sizes[axis] if getattr(request, name) is not None else None for name, axis in PRUNER_FIELDS.items()
        }
        return Shape(replace(request, **named), sizes, count)

    return build_shape


def filter_by_budget(
    shapes: Iterable[Shape], budget: float, tolerance: float, measure: Callable[[Shape], float]
) -> list[Shape]:
    """Keep the shapes that cost at most a budget, and at least `(1 - tolerance)` of it.

    Args:
        shapes: candidates.
        budget: the most that a student may cost.
        tolerance: by how much of the budget it may cost less.
        measure: function that gives the cost of a shape.
    """
    return [shape for shape in shapes if (1 - tolerance) * budget <= measure(shape) <= budget]


def require_budget(
    shapes: Sequence[Shape], name: str, budget: float, tolerance: float, measure: Callable[[Shape], float]
) -> list[Shape]:
    """Keep the shapes within a budget, as `filter_by_budget` does, and refuse a budget that none meets.

    Raises:
        PlanError: if no shape is.
    """
    found = filter_by_budget(shapes, budget, tolerance, measure)
    if not found:
        least, most = min(map(measure, shapes)), max(map(measure, shapes))
        raise PlanError(
            f"{name}={budget:,.10g}: none of the {len(shapes)} shapes of this space costs between "
            f"{(1 - tolerance) * budget:,.10g} and that; they cost {least:,.10g} to {most:,.10g}. "
            "Change the budget, the tolerance or the space."
        )
    return found


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
    model: Any = empty_model(config).eval()
    model = model.to(dtype)
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
    logs = [[math.log(size) for size in shape.sizes.values()] for shape in ordered]
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
