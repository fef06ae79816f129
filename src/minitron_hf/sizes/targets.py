"""Shapes near a number of parameters: for `plan_for_target`, for `recommend` and for the checks of a recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..families import PRUNER_FIELDS, ArchSpec, spec_for, text_config
from ..families.axes import dimension_axes, parse_dimensions
from ..families.tensors import own_parameters
from ..models import count_parameters, empty_model
from .counts import count_active_parameters
from .layers import protected_layers
from .legality import axes_of_tensors, reason_not_cuttable, rounding_step
from .request import PrunerConfig
from .resolve import constrained_spec
from .shapes import (
    TOLERANCE,
    Shape,
    Space,
    counted_cost,
    enumerate_shapes,
    filter_by_budgets,
    largest_share,
    rounded_up,
    shape_builder,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Numbers of neurons, by their names in `PrunerConfig`.
NEURONS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
#: Fractions of sizes that are tried for a target; one more size is then as large as the target allows.
COARSE: Mapping[str, Sequence[float]] = {
    "hidden_size": (1.0, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4),
    "num_attention_heads": (1.0, 3 / 4, 1 / 2),
}
#: Shares of the layers that are tried together with fewer neurons. Beyond a quarter, dropped layers need states and
#: embeddings in the loss to recover (Muralidharan et al. 2024, table 17).
LAYER_SHARES = (1.0, 15 / 16, 7 / 8, 13 / 16, 3 / 4)
#: Share of the neurons that stays at least beside fewer layers.
LEAST_NEURONS = 0.5


def target_limits(config: PretrainedConfig, request: PrunerConfig) -> dict[str, float]:
    """The targets of a request in parameters, by their names.

    Raises:
        PlanError: if one is no less than the teacher has.
    """
    limits: dict[str, float] = {}
    for name, target in request.targets.items():
        total = (count_active_parameters if name == "target_active_parameters" else count_parameters)(config)
        limits[name] = target * total if target < 1 else float(target)
        if limits[name] >= total:
            raise PlanError(f"{name}={target:,}: the teacher has {total:,}. Pruning only removes.")
    return limits


def shapes_near_target(
    config: PretrainedConfig, request: PrunerConfig, *, tolerance: float | None = None
) -> list[Shape]:
    """Shapes that meet the targets of a request, and are not much smaller than one of them.

    The residual stream and the attention heads are tried at the coarse fractions of `COARSE`. The numbers of neurons
    are then as large as the targets allow, all by the same fraction. Layers stay unless the request says otherwise: a
    choice before retraining overrates cuts of depth (Muralidharan et al. 2024). They are cut where no width is left to
    choose. Sizes that the request gives are kept.

    Args:
        config: the teacher's.
        request: with a target.
        tolerance: by how much of a target a shape may be smaller; None: that of the request.

    Returns:
        The shapes, largest first; their requests have sizes instead of the target.

    Raises:
        PlanError: if a target is out of reach, or no size is left to choose.
        UnsupportedModelError: if the family is unknown.
    """
    limits = target_limits(config, request)
    assert limits
    tolerance = request.tolerance if tolerance is None else tolerance
    shapes, reasons = _largest_shapes(config, request.without_targets(), limits)
    found = filter_by_budgets(shapes, limits, tolerance, counted_cost)
    if not found:
        raise PlanError(_no_shape_message(request, shapes, limits, tolerance, reasons))
    return sorted(found, key=lambda shape: -shape.num_parameters)


def _no_shape_message(
    request: PrunerConfig,
    shapes: Sequence[Shape],
    limits: Mapping[str, float],
    tolerance: float,
    reasons: Sequence[str],
) -> str:
    """That no shape meets the targets, and which one is nearest below them."""
    ranges = " and ".join(
        f"{(1 - tolerance) * limit:,.0f} and {limit:,.0f} {'active ' if 'active' in name else ''}parameters"
        for name, limit in limits.items()
    )
    advice = "Choose another target, or give fewer sizes."
    nearest = ""
    if shapes:
        best = max(shapes, key=lambda shape: largest_share(shape, limits))
        least = rounded_up(1 - largest_share(best, limits))
        counts = f"{best.num_parameters:,}"
        if "target_active_parameters" in limits:
            counts += f", {best.num_active_parameters:,} of them active"
        nearest = f", the nearest below has {counts} ({best.name})"
        advice = f"Pass tolerance={least:g} to take it, choose another target, or give fewer sizes."
    reason = "".join(f" ({one})" for one in reasons[:1])
    return f"{request.targets_in_words()}: no shape has between {ranges}{nearest}. {advice}{reason}"


def _largest_shapes(
    config: PretrainedConfig, base: PrunerConfig, limits: Mapping[str, float]
) -> tuple[list[Shape], list[str]]:
    """The largest shape within limits at every combination of coarse sizes, and why others cannot be cut."""
    spec = spec_for(config)
    finest, others, coarse = _sizes_to_choose(spec, config, base)
    size = spec.sizes(config)[PRUNER_FIELDS[finest]]
    step = 1 if finest in ("num_attention_heads", "num_hidden_layers") else rounding_step(size, 1, base.multiple_of)
    least = len(protected_layers(spec, config, base)) if finest == "num_hidden_layers" else 1
    steps = [*(count * step / size for count in range(max(least, 1), -(-size // step))), 1.0]
    build_shape = shape_builder(spec, config, base, {finest: others}, may_stay=True)
    reasons: dict[str, None] = {}

    def build(values: Mapping[str, float]) -> Shape | None:
        try:
            return build_shape(values)
        except PlanError as error:
            reasons.setdefault(str(error))
            return None

    shapes = {
        tuple(shape.sizes.values()): shape
        for values in itertools.product(*coarse.values())
        if (shape := _largest(build, dict(zip(coarse, values)), finest, steps, limits)) is not None
    }
    return list(shapes.values()), list(reasons)


def _largest(
    build: Callable[[Mapping[str, float]], Shape | None],
    given: Mapping[str, float],
    finest: str,
    steps: Sequence[float],
    limits: Mapping[str, float],
) -> Shape | None:
    """The largest shape within limits with the given sizes; by bisection over the finest one.

    Steps that have no legal shape are passed over: they say nothing about those beside them.
    """
    found, low, high = None, 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        legal = ((at, shape) for at in range(middle, low - 1, -1) if (shape := build({**given, finest: steps[at]})))
        at, shape = next(legal, (low, None))
        if shape is not None and largest_share(shape, limits) > 1:
            high = at
        else:
            found, low = shape or found, middle + 1
    return found


def _sizes_to_choose(
    spec: ArchSpec, config: PretrainedConfig, base: PrunerConfig
) -> tuple[str, list[str], dict[str, Sequence[float]]]:
    """The size that is fitted to a target, others that get the same fraction, and the ones with coarse fractions."""
    given = [name for name in PRUNER_FIELDS if getattr(base, name) is not None]
    related = constrained_spec(spec, text_config(config), base)
    free = free_widths(spec, config, ("hidden_size", *NEURONS, "num_attention_heads"), given, related=related)
    neurons = [name for name in free if name in NEURONS]
    coarse = {name: COARSE[name] for name in free if name not in NEURONS}
    if neurons:
        return neurons[0], neurons[1:], coarse
    if coarse:
        finest = next(iter(coarse))
        del coarse[finest]
        return finest, [], coarse
    depth_given = base.num_hidden_layers is not None or base.layers_to_drop is not None
    if depth_given or reason_not_cuttable(spec, config, "num_hidden_layers"):
        raise PlanError(
            f"target_parameters: no size is left to choose beside {', '.join(given) or 'those that cannot be cut'}. "
            "Leave out the target, or one of the sizes."
        )
    return "num_hidden_layers", [], {}


def free_widths(
    spec: ArchSpec,
    config: PretrainedConfig,
    names: Iterable[str],
    given: Sequence[str] = (),
    *,
    related: ArchSpec | None = None,
) -> list[str]:
    """Those of some sizes that can be cut, whose units the model has, and that do not follow from others.

    Args:
        spec: the family.
        config: the teacher's.
        names: names of sizes, preferred ones first.
        given: names of sizes that are decided already.
        related: the student's family, with all relations between its sizes; None: `spec`.
    """
    ties: list[set[str]] = []
    for pair in (related or spec).equal:
        axes = {axis for side in pair for axis in dimension_axes(parse_dimensions(side)[0])} & spec.axis.keys()
        # Sizes that follow from one size follow from each other.
        ties = [axes.union(*(tie for tie in ties if tie & axes)), *(tie for tie in ties if not tie & axes)]
    free: list[str] = []
    held = axes_of_tensors(spec, dict(own_parameters(empty_model(config))))
    for name in names:
        axis = PRUNER_FIELDS[name]
        others = {PRUNER_FIELDS[other] for other in (*given, *free)}
        follows = any(axis in tie and tie & others for tie in ties)
        if name not in given and not follows and axis in held and reason_not_cuttable(spec, config, name) is None:
            free.append(name)
    return free


def enumerate_depths(config: PretrainedConfig) -> list[Shape]:
    """Shapes with every number of layers, largest first."""
    depth = spec_for(config).sizes(config)["layers"]
    return enumerate_shapes(config, {"num_hidden_layers": list(range(1, depth + 1))}).shapes


def enumerate_widths(config: PretrainedConfig, parameters: int) -> tuple[list[Shape], list[str]]:
    """Shapes with residual streams and MLPs of all widths, largest first, some of them below a target.

    Args:
        config: the teacher's.
        parameters: the target, in parameters.

    Returns:
        The shapes, and the names of the sizes that differ among them.
    """
    spec = spec_for(config)
    before, total = spec.sizes(config), count_parameters(config)
    widths = free_widths(spec, config, ("hidden_size", *NEURONS))
    hidden = [name for name in widths if name not in NEURONS]
    neurons = [name for name in widths if name in NEURONS]
    shapes: list[Shape] = []
    space: Space = {}
    for least in (parameters / total, 0.0):  # a narrower stream would leave some of the target unused
        space = {
            **{name: _fractions(before[PRUNER_FIELDS[name]], 8, least) for name in hidden},
            **{
                name: _fractions(before[PRUNER_FIELDS[name]], 32, least / 2 if hidden else 0.0) for name in neurons[:1]
            },
        }
        shapes = enumerate_shapes(config, space, same_fraction=dict.fromkeys(neurons[:1], neurons[1:])).shapes
        if shapes[-1].num_parameters <= parameters:
            break
    return shapes, list(space)


def _fractions(size: int, parts: int, least: float) -> list[int | float | str]:
    """Sizes to try, as fractions: multiples of the largest power of two that fits into a part.

    Muralidharan et al. 2024 tried multiples of 512 for a hidden size of 6,144.

    >>> [round(fraction * 5120) for fraction in _fractions(5120, 8, 0.8)]
    [3584, 4096, 4608, 5120]
    """
    step = 2 ** math.floor(math.log2(max(size / parts, 1)))
    steps = range(max(math.floor(least * size / step) - 1, 1), size // step + 1)
    return [*(count * step / size for count in steps if count * step < size), 1.0]


def select_near_target(shapes: Sequence[Shape], parameters: int) -> list[Shape]:
    """The shapes just below a number of parameters, or else the largest one below it; largest first.

    Args:
        shapes: candidates, largest first.
        parameters: the target, in parameters.

    Raises:
        PlanError: if all shapes are larger.
    """
    below = [shape for shape in shapes if shape.num_parameters <= parameters]
    if not below:
        least = min(shape.num_parameters for shape in shapes)
        raise PlanError(
            f"target: {parameters:,} parameters are out of reach, the smallest shape has {least:,}: embeddings and "
            "attention stay. Choose a larger target, the other goal, or a smaller teacher."
        )
    return filter_by_budgets(below, {"target_parameters": parameters}, TOLERANCE, counted_cost) or below[:1]


def shapes_with_fewer_layers(config: PretrainedConfig, parameters: int) -> list[Shape]:
    """Shapes just below a target with `LAYER_SHARES` of the layers, each with as many neurons as the target allows.

    Residual stream and attention heads stay.

    Args:
        config: the teacher's config.
        parameters: the target, in parameters.

    Returns:
        The shapes, deepest first; empty where neurons cannot be cut.
    """
    spec = spec_for(config)
    neurons = free_widths(spec, config, NEURONS)
    if not neurons:
        return []
    before = spec.sizes(config)
    build_shape = shape_builder(spec, config, PrunerConfig(), {neurons[0]: neurons[1:]}, may_stay=True)
    size = before[PRUNER_FIELDS[neurons[0]]]
    step = rounding_step(size, 1, None)
    steps = [count * step / size for count in range(1, -(-size // step))]

    def build(values: Mapping[str, float]) -> Shape | None:
        try:
            return build_shape(values)
        except PlanError:  # no such number of layers, or too few neurons
            return None

    found = []
    for layers in sorted({math.ceil(share * before["layers"]) for share in LAYER_SHARES}, reverse=True):
        depth = {} if layers == before["layers"] else {"num_hidden_layers": layers}
        shape = _largest(build, depth, neurons[0], steps, {"target_parameters": parameters})
        if shape is not None and shape.num_parameters >= (1 - TOLERANCE) * parameters:
            found.append(shape)
    return found
