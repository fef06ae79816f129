"""The student's config: a stock config that holds the chosen sizes and layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..compat import use_same_kernels
from ..errors import PlanError, checks_kinds
from ..families import (
    FIELD_OF_AXIS,
    PRUNER_FIELDS,
    VOCABULARY,
    VOCABULARY_FIELD,
    ArchSpec,
    named_tensors,
    spec_for,
    text_config,
)
from ..families.axes import implied_size
from ..models import empty_model, first_line
from ..vocabulary.ids import ids_in, renumbered_fields
from .classes import _equivalent_classes, config_class
from .layers import _layer_fields, fixed_layers, reason_against_layers
from .legality import axes_of_tensors, field_name, reason_not_cuttable, require_units
from .request import TARGETS, PrunerConfig
from .resolve import resolve_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Config fields that a student does not take over: the version that wrote the teacher, the code that it brings along,
#: and how its weights were stored (a model read from GGUF is dequantised).
LEFT_OUT = ("transformers_version", "auto_map", "quantization_config")

#: Names of the config field that norms add to the mean square.
NORM_EPSILONS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "norm_eps",
    "norm_epsilon",
)


@checks_kinds
def student_config(config: PretrainedConfig, pruner_config: PrunerConfig) -> PretrainedConfig:
    """The student's config, from the teacher's config alone.

    The dropped layers matter here only for lists with one entry per layer. Without `layers_to_drop`, the block just
    before the last layer is assumed (the choice of Sreenivas et al. 2024 for Llama-3.1-8B). With `vocab_size`, which
    tokens stay is not known, and ids of special tokens are placeholders.

    Raises:
        UnsupportedModelError: if the family is unknown.
        PlanError: if the sizes are impossible.
    """
    spec = spec_for(config)
    sizes, _ = resolve_sizes(spec, config, pruner_config)
    return build_student_config(
        spec,
        config,
        sizes,
        layers_without_scores(spec, config, pruner_config, sizes["layers"]),
        norm_compensation=pruner_config.norm_compensation,
        model_type=pruner_config.model_type,
    )


@checks_kinds
def check_sizes(config: PretrainedConfig, pruner_config: PrunerConfig) -> tuple[dict[str, int], list[str]]:
    """Sizes of the student and notes, by `resolve_sizes`; refuses also sizes that no tensor of the teacher has.

    Raises:
        UnsupportedModelError: if the family is unknown.
        PlanError: if the sizes are impossible, or none is given.
    """
    require_some_size(config, pruner_config)
    spec = spec_for(config)
    before, (sizes, notes) = spec.sizes(config), resolve_sizes(spec, config, pruner_config)
    cut = [axis for axis in sizes if sizes[axis] < before[axis]]
    require_units(spec, named_tensors(empty_model(config)), pruner_config, cut)
    return sizes, notes


def require_some_size(config: PretrainedConfig, pruner_config: PrunerConfig) -> None:
    """Refuse a request that names nothing to cut, or gives all sizes as they are.

    Raises:
        UnsupportedModelError: if the family is unknown.
        PlanError: listing what can be cut, with the teacher's sizes; or if the sizes are impossible.
    """
    if any(getattr(pruner_config, name) is not None for name in (*TARGETS, "model_type")):
        return
    spec = spec_for(config)
    wanted = (*PRUNER_FIELDS, VOCABULARY_FIELD, "layers_to_drop")
    named = any(getattr(pruner_config, name) is not None for name in wanted)
    if named and resolve_sizes(spec, config, pruner_config)[0] != spec.sizes(config):
        return
    reason = "All sizes that the request gives are the teacher's" if named else "The request names no size"
    sizes, held = spec.sizes(config), axes_of_tensors(spec, named_tensors(empty_model(config)))
    possible = [
        f"{name}={sizes[axis]:,}"
        for name, axis in PRUNER_FIELDS.items()
        if (axis == "layers" or axis in held) and reason_not_cuttable(spec, config, name) is None
    ]
    raise PlanError(
        f"{reason}, so nothing would be cut. This '{spec.model_type}' model has "
        f"{', '.join(possible)}. Give smaller ones, or fractions of them (hidden_size=0.75), or layers_to_drop, or "
        "target_parameters."
    )


def layers_without_scores(
    spec: ArchSpec, config: PretrainedConfig, pruner_config: PrunerConfig, left: int
) -> tuple[int, ...]:
    """Teacher indices of the layers that stay where no scores choose them: see `student_config`.

    Args:
        spec: the family.
        config: the teacher's.
        pruner_config: the request; its `layers_to_drop` decide if there are any.
        left: number of layers that stay.
    """
    depth = spec.sizes(config)["layers"]
    if pruner_config.layers_to_drop is not None:
        return tuple(layer for layer in range(depth) if layer not in pruner_config.layers_to_drop)
    blocks = [
        (*range(start), *range(start + depth - left, depth)) for start in (left - 1, *range(left - 2, -1, -1), left)
    ]
    if fixed := fixed_layers(spec, config):
        droppable = [layer for layer in (depth - 1, *range(depth - 1)) if layer not in fixed]
        drop = droppable[len(droppable) - (depth - left) :]
        blocks = [tuple(layer for layer in range(depth) if layer not in drop)]
    return next((block for block in blocks if not reason_against_layers(spec, config, block)), blocks[0])


def resolve_fractions(config: PretrainedConfig, pruner_config: PrunerConfig) -> PrunerConfig:
    """Replace the fractions of a request by numbers of units; some may come to no change.

    It names the `model_type` of other stock classes where only these can hold its sizes.

    Raises:
        PlanError: if no stock classes can.
    """
    spec = spec_for(config)
    others = () if pruner_config.model_type else _equivalent_classes(spec, config)

    def resolved(request: PrunerConfig) -> PrunerConfig:
        sizes, _ = resolve_sizes(spec, config, request, may_stay=True)
        units: dict[str, Any] = {
            name: sizes[axis]
            for name, axis in {**PRUNER_FIELDS, VOCABULARY_FIELD: VOCABULARY}.items()
            if getattr(request, name) is not None
        }
        return replace(request, **units)

    try:
        return resolved(pruner_config)
    except PlanError:
        for model_type in others:
            with contextlib.suppress(PlanError):
                return resolved(replace(pruner_config, model_type=model_type))
        raise


def build_student_config(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    sizes: Mapping[str, int],
    layers_kept: tuple[int, ...],
    *,
    norm_compensation: bool = False,
    nonuniform_sizes: Mapping[str, Sequence[int]] | None = None,
    model_type: str | None = None,
    new_ids: Mapping[int, int] | None = None,
) -> PretrainedConfig:
    """Build the teacher's config with the student's sizes, validated by the stock class.

    Args:
        spec: the teacher's family.
        teacher: the teacher's config.
        sizes: size of every axis in the student.
        layers_kept: teacher indices of the student's layers.
        norm_compensation: whether the norms' weights are scaled for a cut of the hidden size, so that their epsilon
            has to be scaled, too.
        nonuniform_sizes: axis → size in every kept layer, for axes whose sizes differ by layer.
        model_type: other stock classes than the teacher's.
        new_ids: token id → new id, of the tokens that stay where the vocabulary is cut; None if it is not known.

    Raises:
        PlanError: if the stock class does not hold these sizes or layers; the message names those that it does.
    """
    if (inner := text_config(teacher)) is not teacher:
        options: dict[str, Any] = {"norm_compensation": norm_compensation, "nonuniform_sizes": nonuniform_sizes}
        text = build_student_config(spec, inner, sizes, layers_kept, **options, new_ids=new_ids)
        renumbered = _renumbered_fields(teacher.to_dict(), spec.sizes(inner), sizes, new_ids)
        return _config_around(spec, teacher, text, renumbered)
    before = spec.sizes(teacher)
    values = copy.deepcopy(teacher.to_dict())
    values.update(_resized_fields(spec, teacher, values, sizes, layers_kept, nonuniform_sizes or {}))
    values.update(_rescaled_fields(spec, values, before, sizes, norm_compensation))
    values.update(_renumbered_fields(values, before, sizes, new_ids))
    changed: dict[str, Any] = {}
    if len(layers_kept) < before["layers"]:
        if reason := reason_against_layers(spec, teacher, layers_kept):
            raise PlanError(f"Layers {list(layers_kept)} cannot be all that is left: {reason}")
        changed = _layer_fields(spec, values, before["layers"], layers_kept)
        values.update(changed)
    for name in LEFT_OUT:
        values.pop(name, None)
    config_type = type(teacher)
    if model_type not in (None, spec.model_type):
        config_type, values = _as_equivalent_class(spec, teacher, values, str(model_type))
    try:
        config = _validated(config_type(**values))
    except Exception as error:
        nearest = _nearest_accepted(spec, config_type, values, before, sizes)
        raise PlanError(
            f"The stock {config_type.__name__} refuses these sizes: {first_line(error)} {nearest}"
        ) from error
    _require_unchanged(spec, teacher, config, sizes, changed)
    use_same_kernels(config, teacher)
    return config


def _validated(config: PretrainedConfig) -> PretrainedConfig:
    # Layers that predict further tokens are no part of the stock model, and so of no student either.
    if getattr(config, "num_mtp_layers", None):
        config.num_mtp_layers = 0
    config.validate()
    return config


def _config_around(
    spec: ArchSpec, teacher: PretrainedConfig, text: PretrainedConfig, renumbered: Mapping[str, Any]
) -> PretrainedConfig:
    """The config of a wrapper around the config of the student's language model, with new token ids."""
    whole = {**copy.deepcopy(teacher.to_dict()), **renumbered, "text_config": text.to_dict()}
    for path in spec.width_fields:
        *parents, name = path.split(".")
        holder = whole
        for parent in parents:
            holder = holder[parent]
        holder[name] = spec.sizes(text)["hidden"]
    for name in LEFT_OUT:
        whole.pop(name, None)
    wrapped = type(teacher)(**whole)
    use_same_kernels(wrapped, teacher)
    return wrapped


def _resized_fields(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    values: Mapping[str, Any],
    sizes: Mapping[str, int],
    layers_kept: tuple[int, ...],
    nonuniform_sizes: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Config fields that hold the sizes of axes, or follow from them.

    Implied sizes (head_dim above all) are written out: they would otherwise change with the sizes they derive from.
    """
    changed: dict[str, Any] = {}
    for axis in spec.axes:
        size = sizes[axis.name]
        if spec.holds_lists(axis.name, teacher):
            [name] = axis.fields
            changed[name] = [min(own, size) for own in values[name]]
            for layer, own in zip(layers_kept, nonuniform_sizes.get(axis.name, ())):
                changed[name][layer] = own
        # A number derives from no size, and its field may mean more (one group where no groups are meant).
        elif not (axis.implied or "").isdigit() or size != int(axis.implied or ""):
            for name in axis.fields:
                changed[name] = [size] * sizes["layers"] if isinstance(values.get(name), list) else size
        if axis.rounding is not None:
            changed[axis.rounding.flag] = False
    changed.update({name: implied_size(expression, sizes) for name, expression in spec.config_rules.derived_fields})
    changed.update(dict.fromkeys(spec.config_rules.absent_parts, 0))
    return changed


def _rescaled_fields(
    spec: ArchSpec,
    values: Mapping[str, Any],
    before: Mapping[str, int],
    sizes: Mapping[str, int],
    norm_compensation: bool,
) -> dict[str, Any]:
    """Config fields that are scaled with a size: see `ConfigRules.scaled_fields`; and the epsilon of scaled norms."""
    changed: dict[str, Any] = {}
    for name, size, power in spec.config_rules.scaled_fields:
        if power == 1 and isinstance(values[name], int):
            changed[name] = values[name] * sizes[size] // before[size]
        elif sizes[size] < before[size]:
            changed[name] = values[name] * (sizes[size] / before[size]) ** power
    if norm_compensation and sizes["hidden"] < before["hidden"] and _norms_are_alike(spec):
        ratio = before["hidden"] / sizes["hidden"]
        changed.update({name: values[name] * ratio for name in NORM_EPSILONS if values.get(name)})
    return changed


def _renumbered_fields(
    values: Mapping[str, Any],
    before: Mapping[str, int],
    sizes: Mapping[str, int],
    new_ids: Mapping[int, int] | None,
) -> dict[str, Any]:
    """Config fields that name token ids, where the vocabulary is cut."""
    old, new = before[VOCABULARY], sizes[VOCABULARY]
    if new == old:
        return {}
    if new_ids is None:  # numbers that the stock class takes
        new_ids = {one: min(one, new - 1) for one in ids_in(values, old)}
    return renumbered_fields(values, new_ids, old)


def _as_equivalent_class(
    spec: ArchSpec, teacher: PretrainedConfig, values: Mapping[str, Any], model_type: str
) -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """The config class of other stock classes that hold the same model, and the values of its fields."""
    config_type = config_class(model_type)
    known = config_type().to_dict().keys() - {"architectures", "model_type"}
    changes = _equivalent_classes(spec, teacher)[model_type]
    return config_type, {**{name: value for name, value in values.items() if name in known}, **changes}


def _require_unchanged(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    config: PretrainedConfig,
    sizes: Mapping[str, int],
    changed: Mapping[str, Any],
) -> None:
    """Refuse sizes, and lists with one entry per layer, that the stock class changes when it is given them."""
    built = {axis: size for axis, size in spec.sizes(config).items() if not spec.holds_lists(axis, teacher)}
    expected = {axis: sizes[axis] for axis in built}
    if built != expected:
        raise PlanError(
            f"The stock {type(config).__name__} changes the sizes it is given: {built} instead of "
            f"{expected}. Choose other sizes."
        )
    for name in set(spec.layer_lists) & changed.keys():
        given = changed[name]
        if (made := getattr(config, name)) != given:
            raise PlanError(
                f"The stock {type(teacher).__name__} cannot hold these layers in this order: it changes {name} from "
                f"{given} to {made}. Choose other layers_to_drop."
            )


def _nearest_accepted(
    spec: ArchSpec,
    config_type: type[PretrainedConfig],
    values: Mapping[str, Any],
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> str:
    """Which sizes the stock config takes instead, one axis changed at a time, found by asking it."""

    def accepted(axis: str, size: int) -> bool:
        try:
            config_type(**{**values, **dict.fromkeys(spec.axis[axis].fields, size)}).validate()
        except Exception:  # whatever the stock class raises
            return False
        return True

    found = []
    for axis in FIELD_OF_AXIS:
        if axis != "layers" and axis in after and after[axis] < before[axis] and spec.axis[axis].fields:
            below, above = range(after[axis] - 1, 0, -1), range(after[axis] + 1, before[axis] + 1)
            sides = [
                next((size for size in side if accepted(axis, size)), None) for side in (below[:256], above[:256])
            ]
            if legal := " or ".join(str(size) for size in sides if size is not None):
                found.append(f"{field_name(spec, axis)}={legal}")
    return f"Nearest: {', or '.join(found)}." if found else "Choose other sizes."


def _norms_are_alike(spec: ArchSpec) -> bool:
    """Whether all norms are over the hidden size, and read a residual stream of the teacher's scale.

    Otherwise the config's one eps is left as it is, for the other norms. The difference is small.
    """
    vectors = {name for name, dims in spec.dimensions.items() if len(dims) == 1 and name.endswith("weight")}
    return vectors == set(spec.residual_norms) and not spec.bare_norms and not spec.stream.scaled_embeddings
