"""Candidate shapes of a student: enumerates a space of sizes, counts each exactly, keeps those within a budget.

Needs a config alone: no weights, no data. P1 §2.3 (arXiv 2407.14679).
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
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, spec_for, text_config
from ..families.axes import dimension_axes, parse_dimensions
from ..families.tensors import own_parameters
from ..models import count_parameters, empty_model
from .layers import protected_layers
from .legality import require_cuttable, require_units, rounding_step, units_held
from .request import PrunerConfig
from .resolve import resolve_sizes
from .student import build_student_config, layers_without_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Sizes to try, by their names in `PrunerConfig`: numbers of units, fractions of the teacher's, or multiples of
#: another size, `"2.5*hidden_size"`.
Space = Mapping[str, Sequence[int | float | str]]
#: By how much of a budget or a target a shape may be smaller (P1's search spaces).
TOLERANCE = 0.05
#: Numbers of neurons, by their names in `PrunerConfig`.
NEURONS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
#: Fractions at which sizes are tried for a target; another size is then as large as the target lets it be.
COARSE: Mapping[str, Sequence[float]] = {
    "hidden_size": (1.0, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4),
    "num_attention_heads": (1.0, 3 / 4, 1 / 2),
}
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
    alike: Mapping[str, Sequence[str]] | None = None,
) -> Enumeration:
    """All shapes of a space that the stock classes can hold, counted exactly.

    Args:
        config: the teacher's.
        space: sizes to try; sizes that are not named stay.
        base: everything else that a request says (`contiguous`, `keep_first_layers`, `multiple_of`, …).
        alike: a size of the space → others that are always asked for by the same fraction.

    Raises:
        PlanError: if the space names something that is no size, or none of its shapes can be cut.
        UnsupportedModelError: if the family is unknown.
    """
    spec = spec_for(config)
    cut = _cutter(spec, config, base or PrunerConfig(), alike or {}, may_stay=bool(alike))
    _require_space(spec, space)
    found: dict[tuple[int, ...], Shape] = {}
    refused: dict[str, int] = {}
    for values in itertools.product(*space.values()):
        try:
            shape = cut(dict(zip(space, values)))
        except PlanError as error:
            reason = re.sub(r"\d+", "…", str(error))  # one reason for all sizes
            refused[reason] = refused.get(reason, 0) + 1
            continue
        found.setdefault(tuple(shape.sizes.values()), shape)
    if not found:
        reasons = "; ".join(sorted(refused)[:3])
        raise PlanError(f"No shape of this space can be cut: {reasons} Choose other sizes.")
    return Enumeration(sorted(found.values(), key=lambda shape: -shape.num_parameters), refused)


def shapes_near_target(
    config: PretrainedConfig, request: PrunerConfig, *, tolerance: float = TOLERANCE
) -> list[Shape]:
    """Shapes that have just about `request.target_parameters`, never more.

    The residual stream and attention heads are tried at the coarse fractions of `COARSE`, and the numbers of neurons
    are then as large as the target lets them be, all by the same fraction. Layers stay, unless the request says
    otherwise: before retraining, which is all that a choice among these can go by, cutting depth as well looks better
    than it is (P1). They are cut where no width is left to choose. Sizes that the request gives are kept.

    Args:
        config: the teacher's.
        request: with a target.
        tolerance: by how much of the target a shape may be smaller.

    Returns:
        The shapes, largest first; their requests have sizes instead of the target.

    Raises:
        PlanError: if the target is out of reach, or no size is left to choose.
        UnsupportedModelError: if the family is unknown.
    """
    spec = spec_for(config)
    total, target = count_parameters(config), request.target_parameters
    assert target is not None
    limit = target * total if target < 1 else float(target)
    if limit >= total:
        raise PlanError(f"target_parameters={target:,}: the teacher has {total:,}. Pruning only removes.")
    base = replace(request, target_parameters=None)
    finest, others, coarse = _choice(spec, config, base)
    size = spec.sizes(config)[PRUNER_FIELDS[finest]]
    step = 1 if finest in ("num_attention_heads", "num_hidden_layers") else rounding_step(size, 1, base.multiple_of)
    least = len(protected_layers(spec, config, base)) if finest == "num_hidden_layers" else 1
    steps = [*(count * step / size for count in range(max(least, 1), -(-size // step))), 1.0]
    cut = _cutter(spec, config, base, {finest: others}, may_stay=True)
    reasons: dict[str, None] = {}

    def largest(given: Mapping[str, float]) -> Shape | None:
        found, low, high = None, 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            try:
                shape = cut({**given, finest: steps[middle]})
            except PlanError as error:
                reasons.setdefault(str(error))
                shape = None
            if shape is not None and shape.num_parameters <= limit:
                found, low = shape, middle + 1
            else:
                high = middle
        return found

    shapes = {
        tuple(shape.sizes.values()): shape
        for values in itertools.product(*coarse.values())
        if (shape := largest(dict(zip(coarse, values)))) is not None
    }
    found = within(shapes.values(), limit, tolerance, lambda shape: shape.num_parameters)
    if not found:
        below = max((shape.num_parameters for shape in shapes.values()), default=None)
        raise PlanError(
            f"target_parameters={target:,}: no shape has between {(1 - tolerance) * limit:,.0f} and {limit:,.0f} "
            f"parameters{'' if below is None else f', the nearest below has {below:,}'}. Choose another target, or "
            f"give fewer sizes.{''.join(f' ({reason})' for reason in list(reasons)[:1])}"
        )
    return sorted(found, key=lambda shape: -shape.num_parameters)


def _choice(
    spec: ArchSpec, config: PretrainedConfig, base: PrunerConfig
) -> tuple[str, list[str], dict[str, Sequence[float]]]:
    """The size that is made to meet a target, others that go along with it, and the ones that are tried before."""
    given = [name for name in PRUNER_FIELDS if getattr(base, name) is not None]
    free = free_widths(spec, config, ("hidden_size", *NEURONS, "num_attention_heads"), given)
    neurons = [name for name in free if name in NEURONS]
    coarse = {name: COARSE[name] for name in free if name not in NEURONS}
    if neurons:
        return neurons[0], neurons[1:], coarse
    if coarse:
        finest = next(iter(coarse))
        del coarse[finest]
        return finest, [], coarse
    depth_given = base.num_hidden_layers is not None or base.layers_to_drop is not None
    if depth_given or why_uncut(spec, config, "num_hidden_layers"):
        raise PlanError(
            f"target_parameters: no size is left to choose beside {', '.join(given) or 'those that cannot be cut'}. "
            "Leave out the target, or one of the sizes."
        )
    return "num_hidden_layers", [], {}


def free_widths(
    spec: ArchSpec, config: PretrainedConfig, names: Iterable[str], given: Sequence[str] = ()
) -> list[str]:
    """Those of some sizes that can be cut, whose units the model has, and that do not follow from others.

    Args:
        spec: the family.
        config: the teacher's.
        names: of sizes, those to prefer first.
        given: sizes that are decided already.
    """
    ties = [
        {axis for side in pair for axis in dimension_axes(parse_dimensions(side)[0])} & spec.axis.keys()
        for pair in spec.equal
    ]
    free: list[str] = []
    held = units_held(spec, dict(own_parameters(empty_model(config))))
    for name in names:
        others = {PRUNER_FIELDS[other] for other in (*given, *free)}
        follows = any(PRUNER_FIELDS[name] in axes and axes & others for axes in ties)
        if name not in given and not follows and not why_uncut(spec, config, name) and PRUNER_FIELDS[name] in held:
            free.append(name)
    return free


def why_uncut(spec: ArchSpec, config: PretrainedConfig, name: str) -> str | None:
    """Why a size cannot be cut, or None.

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


def _cutter(
    spec: ArchSpec,
    config: PretrainedConfig,
    base: PrunerConfig,
    alike: Mapping[str, Sequence[str]],
    *,
    may_stay: bool = False,
) -> Callable[[Mapping[str, int | float | str]], Shape]:
    """Sizes → the shape they give, counted; `PlanError` where it cannot be cut. `may_stay`: see `resolve_sizes`."""
    teacher = empty_model(config)
    spec.check(teacher)
    parameters, before = dict(own_parameters(teacher)), spec.sizes(config)

    def cut(values: Mapping[str, int | float | str]) -> Shape:
        given = {**values, **{other: values[name] for name, others in alike.items() for other in others}}
        request = _resolved(config, given, base)
        sizes, _ = resolve_sizes(spec, config, request, may_stay=may_stay)
        require_units(spec, parameters, request, [axis for axis in sizes if sizes[axis] < before[axis]])
        layers_kept = layers_without_scores(spec, config, request, sizes["layers"])
        student = build_student_config(spec, config, sizes, layers_kept, model_type=request.model_type)
        count = sum(math.prod(shape) for *_, shape in spec.student_tensors(parameters, student, layers_kept))
        named: dict[str, Any] = {
            name: sizes[axis] if getattr(request, name) is not None else None for name, axis in PRUNER_FIELDS.items()
        }
        return Shape(replace(request, **named), sizes, count)

    return cut


def within(shapes: Iterable[Shape], budget: float, tolerance: float, measure: Callable[[Shape], float]) -> list[Shape]:
    """The shapes that cost no more than a budget, and no less than `(1 - tolerance)` of it.

    Args:
        shapes: candidates.
        budget: the most that a student may cost.
        tolerance: by how much of the budget it may cost less.
        measure: what a shape costs.
    """
    return [shape for shape in shapes if (1 - tolerance) * budget <= measure(shape) <= budget]


def affordable(
    shapes: Sequence[Shape], name: str, budget: float, tolerance: float, measure: Callable[[Shape], float]
) -> list[Shape]:
    """`within`, for a budget of some name.

    Raises:
        PlanError: if no shape is.
    """
    found = within(shapes, budget, tolerance, measure)
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

    The cache is that of the stock model, asked on the meta device.

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


def different(shapes: Sequence[Shape], count: int, *, cost: Callable[[Shape], float] | None = None) -> list[Shape]:
    """Some shapes that differ from each other, the cheapest of their surroundings first.

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
    if unknown := sorted(set(space) - set(known)):
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


def _resolved(config: PretrainedConfig, values: Mapping[str, int | float | str], base: PrunerConfig) -> PrunerConfig:
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
