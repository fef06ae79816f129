"""A request and a teacher's config → the sizes of every axis, with notes; refuses what cannot be cut."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, VOCABULARY, ArchSpec, spec_for, text_config
from ..families.axes import dimension_axes
from .classes import _spec_of_student, config_class
from .layers import fixed_layers, protected_layers
from .legality import (
    SMALL_STEP,
    Groups,
    _largest_size,
    _require_change,
    _require_groups,
    _require_least,
    _require_multiples,
    _round_fraction,
    _step,
    field_name,
    require_cuttable,
    rounding_step,
)
from .relations import follow_equal
from .request import SEQUENTIAL, PrunerConfig
from .serving import portable_spec, serving_notes
from .vocabulary import require_known_ids, vocabulary_after

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Axes whose fractions are rounded to a multiple that is more than legal: channels and neurons.
ROUNDED_AXES = ("hidden", "ffn", "moe_ffn", "shared_ffn")


def depth_to_measure(config: PretrainedConfig, pruner_config: PrunerConfig) -> dict[str, Any] | None:
    """The arguments of `estimate_importance` that say which layers a `depth_metric` has to judge.

    Returns:
        None where no layers are chosen by scores.
    """
    spec = spec_for(config)
    given = pruner_config.without_targets()  # which leaves the layers as they are given
    num_drop = spec.sizes(config)["layers"] - resolve_sizes(spec, config, given)[0]["layers"]
    if num_drop == 0 or pruner_config.layers_to_drop is not None:
        return None
    return {
        "block_length": num_drop,
        "one_by_one": not pruner_config.contiguous,
        "keep_first_layers": pruner_config.keep_first_layers,
        "keep_last_layers": pruner_config.keep_last_layers,
    }


def scoring_arguments(
    config: PretrainedConfig, pruner_config: PrunerConfig, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `estimate_importance`, completed by what a request needs.

    That is the covariance for a change of basis, and the number of layers to cut for a `depth_metric`.
    """
    if pruner_config.hidden_basis:
        arguments = {**arguments, "hidden_covariance": True}
    if arguments.get("depth_metric") is None:
        return dict(arguments)
    depth_given = pruner_config.num_hidden_layers is not None or pruner_config.layers_to_drop is not None
    if pruner_config.targets and not depth_given:
        raise PlanError(
            f"depth_metric={arguments['depth_metric']!r} has to know the number of dropped layers, which "
            f"{' and '.join(pruner_config.targets)} does not give. Give num_hidden_layers too, or leave out "
            "depth_metric."
        )
    wanted = depth_to_measure(config, pruner_config)
    if wanted is None:
        return {name: value for name, value in arguments.items() if name != "depth_metric"}
    return {**wanted, **arguments}


def resolve_sizes(
    spec: ArchSpec, teacher_config: PretrainedConfig, request: PrunerConfig, *, may_stay: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Sizes of all axes in the student, and notes on sizes that were rounded or followed from others.

    Args:
        spec: the teacher's family.
        teacher_config: the teacher's.
        request: the sizes that are asked for.
        may_stay: take fractions below 1 that come to no change, instead of refusing them.

    Raises:
        PlanError: for every request that cannot be met; the message names what could.
    """
    if request.targets:
        raise PlanError(
            f"{request.targets_in_words()} names no sizes: they are chosen by measuring shapes on "
            "calibration data. Call plan_for_target(model, request, scores, data), or prune_model with "
            "calibration_data, or give sizes instead."
        )
    require_known_ids(teacher_config, request)
    teacher_config = text_config(teacher_config)
    teacher_spec, student_spec = spec, _spec_of_student(spec, teacher_config, request.model_type)
    spec = constrained_spec(teacher_spec, teacher_config, request)
    before = spec.sizes(teacher_config)
    student_type = _student_type(teacher_spec, student_spec, teacher_config)
    moved_notes = []
    if student_spec is not teacher_spec:
        moved_notes = [f"The student is of type '{spec.model_type}', whose classes hold the same model."]
    given = _given_sizes(spec, before, request)
    after = {**before, **{axis: value for axis, value in given.items() if isinstance(value, int)}}
    if request.layers_to_drop is not None:
        after["layers"] = _depth_after(spec, teacher_config, request)
    if request.vocab_size is not None:
        after[VOCABULARY] = vocabulary_after(before[VOCABULARY], request)
    groups = Groups.of(spec, teacher_config, given)
    notes = _round_fractions(spec, teacher_config, request, given, after, groups.outer_follows_inner, may_stay)
    _require_depth(spec, teacher_config, request, after["layers"])
    for inner, outer in spec.groups:
        most = _largest_size(spec, inner, before, after)
        if inner not in given and after[inner] > most:
            after[inner] = most
            notes.append(f"{FIELD_OF_AXIS[inner]} follows {FIELD_OF_AXIS[outer]} to {most}: whole groups are cut.")
    is_narrowed = spec.equal != student_spec.equal
    notes += follow_equal(spec, teacher_config, before, after, set(given), groups, portable=is_narrowed)
    for inner, outer in groups.outer_follows_inner:
        if after[inner] < after[outer]:
            after[outer] = after[inner]
            notes.append(
                f"{FIELD_OF_AXIS[outer]} follows {FIELD_OF_AXIS[inner]} to {after[inner]}: there is one for each."
            )
    for own in groups.sizes_of_layer_kinds:
        _require_groups(spec, teacher_config, {**before, **own}, {**after, **own})
    _require_multiples(spec, teacher_config, before, after)
    _require_least(spec, teacher_config, before, after)
    for axis in after:
        if after[axis] < before[axis]:
            require_cuttable(spec, teacher_config, axis)
    notes += _check_options(teacher_spec, spec, teacher_config, request, before, after)
    return after, [*notes, *moved_notes, *serving_notes(spec, student_type, teacher_config, after, groups)]


def constrained_spec(spec: ArchSpec, teacher_config: PretrainedConfig, request: PrunerConfig) -> ArchSpec:
    """The student's family, with the relations between sizes that `portable` adds.

    Args:
        spec: the teacher's family.
        teacher_config: the teacher's.
        request: what is asked for.

    Raises:
        PlanError: if `portable` cannot be met, or no stock class of the model type holds the student.
    """
    student = _spec_of_student(spec, teacher_config, request.model_type)
    if not request.portable:
        return student
    return portable_spec(student, _student_type(spec, student, teacher_config), student.sizes(teacher_config))


def _student_type(spec: ArchSpec, student: ArchSpec, teacher_config: PretrainedConfig) -> type[PretrainedConfig]:
    return type(teacher_config) if student is spec else config_class(student.model_type)


def _given_sizes(spec: ArchSpec, before: Mapping[str, int], request: PrunerConfig) -> dict[str, int | float]:
    """Axis → the size that the request gives it."""
    given: dict[str, int | float] = {}
    for name, axis in PRUNER_FIELDS.items():
        value = getattr(request, name)
        if value is None:
            continue
        if axis not in before:
            raise PlanError(
                f"{name}={value}: models of type '{spec.model_type}' have no such size. "
                f"They have {', '.join(FIELD_OF_AXIS[a.name] for a in spec.axes if a.name in FIELD_OF_AXIS)}."
            )
        if isinstance(value, int) and value > before[axis]:
            raise PlanError(f"{name}={value} is larger than the teacher's {before[axis]}. Pruning only removes.")
        given[axis] = value
    return given


def _round_fractions(
    spec: ArchSpec,
    config: PretrainedConfig,
    request: PrunerConfig,
    given: Mapping[str, int | float],
    after: dict[str, int],
    following: Collection[tuple[str, str]],
    may_stay: bool,
) -> list[str]:
    """Round the sizes that are given as fractions into `after`; returns notes on those that are rounded far."""
    before, notes = spec.sizes(config), []
    # Coarse axes first: the legal sizes of the finer ones depend on them.
    for axis in sorted(FIELD_OF_AXIS, key=lambda axis: (axis == "hidden", axis in dict(spec.groups))):
        value = given.get(axis)
        # 1.0 keeps everything, whether or not the teacher's size is such a multiple.
        if not isinstance(value, float) or value == 1:
            continue
        step = each = _step(spec, config, axis, before, after, following)
        if axis in ROUNDED_AXES:
            step = rounding_step(before[axis], each, request.multiple_of, value)
        most = _largest_size(spec, axis, before, after)
        after[axis] = min(_round_fraction(value, before[axis], step), most)
        nearest = _round_fraction(value, before[axis], math.lcm(each, SMALL_STEP))
        if axis in ROUNDED_AXES and request.multiple_of is None and after[axis] != min(nearest, most):
            notes.append(
                f"{field_name(spec, axis)}={value} of {before[axis]} is rounded to {after[axis]}, a multiple of "
                f"{step}, which kernels and quantisers like. Give a number of units, or multiple_of, for another size."
            )
        else:
            notes += _far_from(spec, axis, value, before, after, each, most, request.multiple_of)
        if not may_stay:
            _require_change(spec, config, axis, value, before, after, step)
    return notes


def _far_from(
    spec: ArchSpec,
    axis: str,
    fraction: float,
    before: Mapping[str, int],
    after: Mapping[str, int],
    each: int,
    most: int,
    multiple_of: int | None,
) -> list[str]:
    """A note where the other sizes leave a fraction another size than it would have alone.

    Args:
        spec: the family.
        axis: of the size.
        fraction: what was asked for.
        before: the teacher's sizes.
        after: the student's so far.
        each: what the size has to be a multiple of.
        most: the largest size that the other sizes leave.
        multiple_of: what the user wants channels and neurons to be multiples of.
    """
    alone = (multiple_of or SMALL_STEP) if axis in ROUNDED_AXES else 1
    size = after[axis]
    if size == _round_fraction(fraction, before[axis], alone):
        return []
    why = f"with the other sizes it has to be a multiple of {each}"
    if size == most < before[axis]:
        why = "the groups that are kept have no more"
    share = f"{size}, that is {size / before[axis]:.3g}"
    return [f"{field_name(spec, axis)}={fraction} of {before[axis]} becomes {share}: {why}."]


def _require_depth(spec: ArchSpec, config: PretrainedConfig, request: PrunerConfig, left: int) -> None:
    """Refuse fewer layers than are protected."""
    least = len(protected_layers(spec, config, request))
    if request.layers_to_drop is not None or left >= least:
        return
    start = (
        f"num_hidden_layers={left} cannot hold the {request.keep_first_layers} first and "
        f"{request.keep_last_layers} last layers that are protected"
    )
    if fixed := fixed_layers(spec, config):
        raise PlanError(
            f"{start}, and layers {sorted(fixed)}, which have to "
            "stay: later layers read what they store, or the stock classes insist on them. "
            f"Keep {least} layers or more."
        )
    raise PlanError(f"{start}. Keep more layers, or lower keep_first_layers or keep_last_layers.")


def _check_options(
    teacher_spec: ArchSpec,
    spec: ArchSpec,
    config: PretrainedConfig,
    request: PrunerConfig,
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> list[str]:
    """Refuse options that the sizes leave without meaning; returns notes on options that change nothing."""
    if request.head_add_back and not add_back_axes(teacher_spec, before, after):
        raise PlanError(
            "head_add_back adds dropped heads to kept ones, but no heads are cut, or only whole groups of them, whose "
            "keys and values no other group has. Give num_attention_heads fewer in each group, or leave it out."
        )
    if request.repair and request.head_add_back:
        raise PlanError(
            "repair cannot be combined with head_add_back: it refits projections of kept heads as they are, which "
            "add-back changes. Leave out one of them."
        )
    for name in request.nonuniform_sizes:
        if not spec.holds_lists(PRUNER_FIELDS[name], config):
            raise PlanError(
                f"nonuniform_sizes names {name}, but the stock '{spec.model_type}' config holds one for all layers, "
                "not a list. Leave it out: every layer keeps equally many."
            )
        if after[PRUNER_FIELDS[name]] >= before[PRUNER_FIELDS[name]]:
            raise PlanError(
                f"nonuniform_sizes names {name}, which is not cut. Give it a smaller size, the average of all layers."
            )
        if any(PRUNER_FIELDS[name] in pair for pair in spec.groups):
            raise PlanError(
                f"nonuniform_sizes names {name}, which is cut in whole groups, equal in every layer. Leave it out."
            )
    if request.repair and not repaired_axes(teacher_spec, before, after, request.repair):
        return [f"repair={request.repair!r} changes nothing: no units that it makes up for are cut."]
    return []


def repaired_axes(
    spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int], repair: str = "least_squares"
) -> tuple[str, ...]:
    """The cut axes that a repair makes up for, layers included.

    Args:
        spec: the family's table.
        before: size of every axis before the cut.
        after: and after it.
        repair: one of `REPAIRS`.

    Raises:
        PlanError: if units are cut that other modules than plain projections or stacked experts read.
    """
    axes = tuple(axis for axis in after if after[axis] < before[axis] and axis in spec.hook_points)
    layers = ("layers",) if after["layers"] < before["layers"] else ()
    for axis in axes:
        module = spec.hook_points[axis]
        if not any(name.startswith(f"{module}.") for name in spec.dimensions):
            raise PlanError(
                f"repair={repair!r} refits plain projections, but {FIELD_OF_AXIS[axis]} of '{spec.model_type}' "
                f"models is cut here, which {module} reads in another way. Leave out repair."
            )
    is_all = repair in ("least_squares_all", SEQUENTIAL) and after["hidden"] < before["hidden"]
    return (*axes, *layers, *(("hidden",) if is_all else ()))


def add_back_axes(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which heads can be added to each other, given the sizes before and after a cut.

    They are KV heads and query heads alike where each has its own, else query heads within their group; none where no
    head is dropped beside a kept one.

    Raises:
        PlanError: if the family holds something of its heads that is no linear map into or out of them, and so means
            nothing as a sum (sinks, decays, norms over all heads).
    """
    if not {"heads", "kv"} <= before.keys():
        axes: tuple[str, ...] = ("heads",) if after.get("heads", 0) < before.get("heads", 0) else ()
    elif before["heads"] == before["kv"]:
        axes = ("heads", "kv") if after["kv"] < before["kv"] else ()
    else:
        axes = ("heads",) if after["heads"] // after["kv"] < before["heads"] // before["kv"] else ()
    of_heads = {
        name: dimensions
        for name, dimensions in spec.dimensions.items()
        if any(not dimension_axes(dimension).isdisjoint(axes) for dimension in dimensions)
    }
    widths = {
        axis
        for dimensions in of_heads.values()
        for dimension in dimensions
        if not dimension_axes(dimension).isdisjoint(axes)
        for axis in dimension_axes(dimension)
    }
    projections = {
        name
        for name, dimensions in of_heads.items()
        if len(dimensions) == 2 and any(dimension_axes(dimension).isdisjoint(widths) for dimension in dimensions)
    }
    biases = {name.removesuffix("weight") + "bias" for name in projections if name.endswith(".weight")}
    if others := sorted(of_heads.keys() - projections - biases):
        raise PlanError(
            f"head_add_back: heads of '{spec.model_type}' models hold {', '.join(others)}, which is no linear map "
            "into or out of a head and cannot be added. Leave it out."
        )
    return axes


def _depth_after(spec: ArchSpec, config: PretrainedConfig, request: PrunerConfig) -> int:
    """Number of layers that `layers_to_drop` leaves."""
    depth, drop = spec.sizes(config)["layers"], request.layers_to_drop or []
    if outside := [layer for layer in drop if layer >= depth]:
        raise PlanError(f"layers_to_drop names layer {outside[0]}, but the teacher has layers 0 to {depth - 1}.")
    if len(drop) == depth:
        raise PlanError("layers_to_drop names every layer; at least one must stay.")
    left = depth - len(drop)
    wanted = request.num_hidden_layers
    wanted = _round_fraction(wanted, depth, 1) if isinstance(wanted, float) else wanted
    if wanted is not None and wanted != left:
        raise PlanError(
            f"num_hidden_layers={request.num_hidden_layers} and layers_to_drop disagree: dropping {len(drop)} of "
            f"{depth} layers leaves {left}. Give one of them."
        )
    fixed = fixed_layers(spec, config)
    if needed := sorted(fixed & set(drop)):
        raise PlanError(
            f"layers_to_drop names layer {needed[0]}. Layers {sorted(fixed)} of this '{spec.model_type}' model "
            "have to stay: later layers read what they store, or the stock classes insist on them."
        )
    return left
