"""Sizes: what a user asks for, what of it is legal, and the student's config that holds it. A config is enough."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import HubError, PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, families, spec_for, text_config
from ..families.axes import dimension_axes, dimension_size, implied_size, parse_dimensions
from ..files import read_json, write_json
from ..models import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PRUNER_CONFIG_NAME = "pruner_config.json"

#: Names of the config field that norms add to the mean square.
NORM_EPSILONS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "norm_eps",
    "norm_epsilon",
)

#: Stacked experts are multiplied by kernels that want rows of 16 bytes: so many 16-bit numbers.
EXPERT_ALIGNMENT = 8

#: Ways to make up for cut units, and the axes whose units a plain projection reads, which they can change.
REPAIRS = ("least_squares",)
REPAIRED_AXES = ("ffn", "heads", "kv")

#: A size: units to keep, a fraction of the teacher's, or None for no change.
Size = int | float | None


@dataclass
class PrunerConfig:
    """The student's sizes, under the standard config names.

    Each size is an `int` (units to keep), a `float` in (0, 1] (fraction of the teacher's), or None (unchanged).

    Attributes:
        hidden_size: width of the residual stream; one choice of channels for the whole model.
        intermediate_size: MLP neurons, chosen in every layer.
        num_attention_heads: query heads, chosen in every layer; every kept KV head keeps equally many.
        num_key_value_heads: KV heads (query groups), chosen in every layer.
        num_experts: routed experts, chosen in every layer.
        moe_intermediate_size: neurons of every routed expert, chosen in each.
        shared_expert_intermediate_size: neurons of the shared experts, chosen in every layer.
        conv_dim: channels of short convolutions, chosen in every layer; the stock classes hold as many as the residual
            stream has, so that each size follows the other.
        mamba_num_heads: state-space heads, chosen in every layer.
        mamba_head_dim: channels of every state-space head, chosen in each.
        num_hidden_layers: layers to keep.
        layers_to_drop: explicit layer indices to drop, instead of a choice by scores.
        contiguous: drop one contiguous block of layers, the least important of its length (P2: dropping the 16
            individually least important layers of Llama-3.1-8B left WinoGrande at chance, a contiguous block did not).
        keep_first_layers: layers at the beginning that a choice by scores never drops.
        keep_last_layers: layers at the end, likewise. P2: the first and the last layers matter most, which the cosine
            of block importance does not always see (`benchmarks/depth.py`).
        norm_compensation: scale the norms' weights after a cut of the hidden size by √(teacher's / student's), so that
            they divide by what the teacher would with its dropped channels zeroed, instead of by the root mean square
            of the kept ones. Exact for RMSNorm, near for LayerNorm. After distillation it was better on two real
            models and equal on the third (`benchmarks/results/*-norm-compensation.json`).
        head_add_back: let kept heads take over what sets them apart from dropped ones (P1 §2.2): by importance, with
            K of L kept, head i gains its difference to head 2K - i + 1, in all that projects into it and out of it.
            Where KV heads are shared, query heads only, within their group. It is a merge of weights: the student is
            no longer the masked teacher.
        repair: `"least_squares"`: refit the output projections of cut neurons and heads on calibration data, so that
            what is kept reproduces the teacher's layers best (`repaired_weights`).
        uneven: names of sizes that may differ from layer to layer under the same total, which goes to the layers whose
            scores are spread over most units. Only where the stock config holds one size for every layer.
        model_type: stock classes for the student, where those of another family hold exactly the same model without a
            limit on sizes that the teacher's config has (a Llama without biases is a Mistral without a window). The
            refusal of such a size names them.
        multiple_of: fractions of `hidden_size` and of numbers of neurons are rounded to the nearest multiple.
        target_parameters: parameters of the student at most, or a fraction (< 1) of the teacher's. The sizes that are
            not given are chosen by `prune_model` and `plan_for_target`, which measure shapes that meet it.
    """

    hidden_size: Size = None
    intermediate_size: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    num_experts: Size = None
    moe_intermediate_size: Size = None
    shared_expert_intermediate_size: Size = None
    conv_dim: Size = None
    mamba_num_heads: Size = None
    mamba_head_dim: Size = None
    num_hidden_layers: Size = None
    layers_to_drop: list[int] | None = None
    contiguous: bool = True
    keep_first_layers: int = 1
    keep_last_layers: int = 1
    norm_compensation: bool = True
    head_add_back: bool = False
    repair: str | None = None
    uneven: list[str] = field(default_factory=list)
    model_type: str | None = None
    multiple_of: int = 8
    target_parameters: Size = None

    def __post_init__(self) -> None:
        for name in PRUNER_FIELDS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PlanError(f"{name}={value!r}: expected a number of units, a fraction to keep, or None.")
            if isinstance(value, float) and not 0 < value <= 1:
                raise PlanError(
                    f"{name}={value}: a fraction to keep lies in (0, 1]. For a number of units, pass an int."
                )
            if isinstance(value, int) and value < 1:
                raise PlanError(f"{name}={value}: at least one unit must be kept.")
        if self.layers_to_drop is not None:
            layers = self.layers_to_drop
            if not isinstance(layers, list | tuple | range) or not all(
                isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers
            ):
                raise PlanError(f"layers_to_drop={layers!r}: expected a list of layer indices, counted from 0.")
            self.layers_to_drop = list(layers)
            if len(set(self.layers_to_drop)) != len(self.layers_to_drop):
                raise PlanError(f"layers_to_drop={self.layers_to_drop} names a layer twice.")
        if not isinstance(self.uneven, list | tuple) or any(name not in [*PRUNER_FIELDS] for name in self.uneven):
            raise PlanError(f"uneven={self.uneven!r}: expected a list of sizes, such as ['intermediate_size'].")
        self.uneven = list(self.uneven)
        for name in ("contiguous", "norm_compensation", "head_add_back"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name}={getattr(self, name)!r}: expected true or false.")
        if self.repair not in (None, *REPAIRS):
            raise PlanError(f"repair={self.repair!r} is unknown. Expected {' or '.join(map(repr, REPAIRS))}, or None.")
        if self.model_type is not None and not isinstance(self.model_type, str):
            raise PlanError(f"model_type={self.model_type!r}: expected the name of a family.")
        for name in ("keep_first_layers", "keep_last_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise PlanError(f"{name}={value!r}: expected a number of layers.")
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise PlanError(f"multiple_of={self.multiple_of!r}: expected a positive integer.")
        target = self.target_parameters
        if target is not None and (isinstance(target, bool) or not isinstance(target, int | float) or not target > 0):
            raise PlanError(f"target_parameters={target!r}: expected a number of parameters, or a fraction below 1.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrunerConfig:
        """The reverse of `to_dict`.

        Raises:
            PlanError: if a name is unknown.
        """
        names = [one.name for one in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise PlanError(f"PrunerConfig has no field {', '.join(unknown)}. Expected: {', '.join(names)}.")
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `pruner_config.json`."""
        path = Path(save_directory) / PRUNER_CONFIG_NAME
        write_json(path, self.to_dict())
        return path

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **kwargs: Any) -> PrunerConfig:
        """Read `pruner_config.json` from a folder or a Hub repository.

        Args:
            path_or_repo: folder, file or Hub id.
            **kwargs: passed to `hf_hub_download` (`revision`, `token`, …).

        Raises:
            HubError: if it is neither a folder with such a file nor a Hub repository with one.
        """
        path = Path(path_or_repo)
        file = path / PRUNER_CONFIG_NAME if path.is_dir() else path
        if not file.is_file():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                file = Path(hf_hub_download(str(path_or_repo), PRUNER_CONFIG_NAME, **kwargs))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
                raise HubError(f"No {PRUNER_CONFIG_NAME} in {path_or_repo}, here or on the Hub: {error}") from error
        return cls.from_dict(read_json(file))


def student_config(config: PretrainedConfig, pruner_config: PrunerConfig) -> PretrainedConfig:
    """The student's config, from the teacher's config alone.

    Which layers go is decided by scores, and matters here only to lists with one entry per layer; without
    `layers_to_drop`, the block just before the last layer is taken (P2's choice for Llama-3.1-8B).

    Raises:
        UnsupportedModelError: if the family is unknown.
        PlanError: if the sizes are impossible.
    """
    spec = spec_for(config)
    sizes, _ = resolve_sizes(spec, config, pruner_config)
    depth = spec.sizes(config)["layers"]
    if pruner_config.layers_to_drop is None:
        blocks = [
            (*range(start), *range(start + depth - sizes["layers"], depth))
            for start in (sizes["layers"] - 1, *range(sizes["layers"] - 2, -1, -1), sizes["layers"])
        ]
        if fixed := fixed_layers(spec, config):
            droppable = [layer for layer in (depth - 1, *range(depth - 1)) if layer not in fixed]
            drop = droppable[len(droppable) - (depth - sizes["layers"]) :]
            blocks = [tuple(layer for layer in range(depth) if layer not in drop)]
        kept = next((block for block in blocks if not lacking_kinds(spec, config, block)), blocks[0])
    else:
        kept = tuple(layer for layer in range(depth) if layer not in pruner_config.layers_to_drop)
    return build_student_config(
        spec,
        config,
        sizes,
        kept,
        norm_compensation=pruner_config.norm_compensation,
        model_type=pruner_config.model_type,
    )


def _sisters(spec: ArchSpec, config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """Other families whose stock classes hold this model: model type → changes to the config."""
    return {
        model_type: changes
        for model_type, needed, changes in spec.sisters
        if all(getattr(config, name, None) == value for name, value in needed.items())
    }


def _carrier(spec: ArchSpec, config: PretrainedConfig, model_type: str | None) -> ArchSpec:
    """The table of the stock classes that are to hold the student."""
    if model_type in (None, spec.model_type):
        return spec
    if model_type not in (possible := _sisters(spec, config)):
        others = f"Only those of {' or '.join(map(repr, possible))} do" if possible else "No others do"
        raise PlanError(
            f"model_type={model_type!r}: its stock classes do not hold this '{spec.model_type}' model unchanged. "
            f"{others}. Leave model_type out to keep the teacher's."
        )
    return families()[str(model_type)]


def with_classes(config: PretrainedConfig, pruner_config: PrunerConfig) -> PrunerConfig:
    """The request itself, or with the `model_type` of other stock classes where only these can hold its sizes.

    Raises:
        PlanError: if no stock classes can.
    """
    spec = spec_for(config)
    others = () if pruner_config.model_type else _sisters(spec, config)
    try:
        resolve_sizes(spec, config, pruner_config)
        return pruner_config
    except PlanError:
        for model_type in others:
            request = replace(pruner_config, model_type=model_type)
            with contextlib.suppress(PlanError):
                resolve_sizes(spec, config, request)
                return request
        raise


def depth_to_measure(config: PretrainedConfig, pruner_config: PrunerConfig) -> dict[str, Any] | None:
    """The arguments of `estimate_importance` that say which layers a `depth_metric` has to judge.

    Returns:
        None where no layers are chosen by scores.
    """
    spec = spec_for(config)
    given = replace(pruner_config, target_parameters=None)  # which leaves the layers as they are given
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
    """Arguments of `estimate_importance`, completed where a `depth_metric` has to know what is to be cut."""
    if arguments.get("depth_metric") is None:
        return dict(arguments)
    depth_given = pruner_config.num_hidden_layers is not None or pruner_config.layers_to_drop is not None
    if pruner_config.target_parameters is not None and not depth_given:
        raise PlanError(
            f"depth_metric={arguments['depth_metric']!r} has to know how many layers go, and target_parameters does "
            "not say. Give num_hidden_layers too, or leave out depth_metric."
        )
    wanted = depth_to_measure(config, pruner_config)
    if wanted is None:
        return {name: value for name, value in arguments.items() if name != "depth_metric"}
    return {**wanted, **arguments}


def resolve_sizes(
    spec: ArchSpec, teacher_config: PretrainedConfig, request: PrunerConfig
) -> tuple[dict[str, int], list[str]]:
    """Sizes of all axes in the student, and notes on sizes that followed from others.

    Raises:
        PlanError: for every request that cannot be met; the message names what could.
    """
    if request.target_parameters is not None:
        raise PlanError(
            f"target_parameters={request.target_parameters:,} names no sizes: they are chosen by measuring shapes on "
            "calibration data. Call plan_for_target(model, request, scores, data), or prune_model with "
            "calibration_data, or give sizes instead."
        )
    teacher_config = text_config(teacher_config)
    teachers, spec = spec, _carrier(spec, teacher_config, request.model_type)
    before = spec.sizes(teacher_config)
    after = dict(before)
    given: set[str] = set()
    for name, axis in PRUNER_FIELDS.items():
        value = getattr(request, name)
        if value is None:
            continue
        if axis not in before:
            raise PlanError(
                f"{name}={value}: models of type '{spec.model_type}' have no such size. "
                f"They have {', '.join(FIELD_OF_AXIS[a.name] for a in spec.axes if a.name in FIELD_OF_AXIS)}."
            )
        given.add(axis)
        if isinstance(value, int):
            if value > before[axis]:
                raise PlanError(f"{name}={value} is larger than the teacher's {before[axis]}. Pruning only removes.")
            after[axis] = value

    if request.layers_to_drop is not None:
        after["layers"] = _depth_after(request, before["layers"])
        fixed = fixed_layers(spec, teacher_config)
        if needed := sorted(fixed & set(request.layers_to_drop)):
            raise PlanError(
                f"layers_to_drop names layer {needed[0]}. Layers {sorted(fixed)} of this '{spec.model_type}' model "
                "have to stay: later layers read what they store, or the stock classes insist on them."
            )
    notes = []
    # Coarse axes first: the legal sizes of the finer ones depend on them.
    for axis in sorted(FIELD_OF_AXIS, key=lambda axis: (axis == "hidden", axis in dict(spec.groups))):
        value = getattr(request, FIELD_OF_AXIS[axis]) if axis in before else None
        if isinstance(value, float):
            # 1.0 keeps everything, whether or not the teacher's size is such a multiple.
            step = 1 if value == 1 else _step(spec, teacher_config, axis, before, after, request.multiple_of)
            after[axis] = min(_round_fraction(value, before[axis], step), _most(spec, axis, before, after))
    least = len(protected_layers(spec, teacher_config, request))
    if request.layers_to_drop is None and after["layers"] < least and (fixed := fixed_layers(spec, teacher_config)):
        raise PlanError(
            f"num_hidden_layers={after['layers']} cannot hold the {request.keep_first_layers} first and "
            f"{request.keep_last_layers} last layers that are protected, and layers {sorted(fixed)}, which have to "
            "stay: later layers read what they store, or the stock classes insist on them. "
            f"Keep {least} layers or more."
        )
    if request.layers_to_drop is None and after["layers"] < least:
        raise PlanError(
            f"num_hidden_layers={after['layers']} cannot hold the {request.keep_first_layers} first and "
            f"{request.keep_last_layers} last layers that are protected. Keep more layers, or lower "
            "keep_first_layers or keep_last_layers."
        )
    for inner, outer in spec.groups:
        most = _most(spec, inner, before, after)
        if inner not in given and after[inner] > most:
            after[inner] = most
            notes.append(f"{FIELD_OF_AXIS[inner]} follows {FIELD_OF_AXIS[outer]} to {most}: whole groups are cut.")
    notes += _follow_equal(spec, before, after, given)
    for own in _unequal_sizes(spec, teacher_config):
        _require_groups(spec, teacher_config, {**before, **own}, {**after, **own})
    _require_multiples(spec, teacher_config, before, after)
    _require_least(spec, teacher_config, before, after)
    for axis in after:
        if after[axis] < before[axis]:
            require_cuttable(spec, teacher_config, axis)
    if request.head_add_back and not add_back_axes(teachers, before, after):
        raise PlanError(
            "head_add_back adds dropped heads to kept ones, but no heads are cut, or only whole groups of them, whose "
            "keys and values no other group has. Give num_attention_heads fewer in each group, or leave it out."
        )
    if request.repair and request.head_add_back:
        raise PlanError(
            "repair cannot be combined with head_add_back: it refits projections of kept heads as they are, which "
            "add-back changes. Leave out one of them."
        )
    if request.repair and not repaired_axes(teachers, before, after):
        notes.append("repair changes nothing: neither neurons nor heads are cut.")
    for name in request.uneven:
        if not spec.holds_lists(PRUNER_FIELDS[name], teacher_config):
            raise PlanError(
                f"uneven names {name}, but the stock '{spec.model_type}' config holds one for all layers, not a list. "
                "Leave it out: every layer keeps equally many."
            )
        if after[PRUNER_FIELDS[name]] >= before[PRUNER_FIELDS[name]]:
            raise PlanError(
                f"uneven names {name}, which is not cut. Give it a smaller size, the average of all layers."
            )
        if any(PRUNER_FIELDS[name] in pair for pair in spec.groups):
            raise PlanError(f"uneven names {name}, which is cut in whole groups, equal in every layer. Leave it out.")
    if spec is not teachers:
        notes.append(f"The student is of type '{spec.model_type}', whose classes hold the same model.")
    notes += _serving_notes(
        spec, type(teacher_config) if spec is teachers else config_class(spec.model_type), before, after
    )
    return after, notes


def repaired_axes(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> tuple[str, ...]:
    """The cut axes that a repair makes up for, given the sizes before and after a cut.

    Raises:
        PlanError: if units are cut that other modules than plain projections read (experts, state spaces).
    """
    axes = tuple(axis for axis in after if after[axis] < before[axis] and axis in spec.taps)
    for axis in axes:
        if axis not in REPAIRED_AXES or f"{spec.taps[axis]}.weight" not in spec.dimensions:
            raise PlanError(
                f"repair='least_squares' refits plain projections, but {FIELD_OF_AXIS[axis]} of '{spec.model_type}' "
                f"models is cut here, which {spec.taps[axis]} reads in another way. Leave out repair."
            )
    return axes


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


def config_class(model_type: str) -> type[PretrainedConfig]:
    """The stock config class of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _serving_notes(
    spec: ArchSpec, config_type: type[PretrainedConfig], before: Mapping[str, int], after: Mapping[str, int]
) -> list[str]:
    """Sizes that Transformers takes, and other programs or fast kernels may not."""
    notes: list[str] = []
    if after == before:
        return notes
    head_dim = spec.axis.get("head_dim")
    declared = {declared.name for declared in fields(cast(Any, config_type))}
    if head_dim is not None and head_dim.fields == ("head_dim",) and "head_dim" not in declared:
        shared = after["hidden"] // after["heads"]
        if after["heads"] * after["head_dim"] != after["hidden"]:
            notes.append(
                f"head_dim={after['head_dim']} is honoured by Transformers, but is no declared field of "
                f"{config_type.__name__}: other runtimes are known to take hidden_size // num_attention_heads "
                f"= {shared} instead. Try yours before you rely on it, or keep "
                "hidden_size = num_attention_heads × head_dim."
            )
    if "moe_ffn" in after:
        for axis in ("hidden", "moe_ffn"):
            if after[axis] % EXPERT_ALIGNMENT and not before[axis] % EXPERT_ALIGNMENT:
                nearest = _nearest(after[axis], range(EXPERT_ALIGNMENT, before[axis] + 1, EXPERT_ALIGNMENT))
                notes.append(
                    f"{_name(spec, axis)}={after[axis]}: fast kernels for stacked experts need rows of 16 bytes, that "
                    f"is, multiples of {EXPERT_ALIGNMENT} in 16 bits (nearest: {nearest}). Load the student "
                    "with experts_implementation='eager', or choose one of them."
                )
    return notes


def fixed_layers(spec: ArchSpec, config: PretrainedConfig) -> set[int]:
    """Layers that cannot be dropped: later ones read what they store, or the stock classes insist on them."""
    config = text_config(config)
    depth = spec.sizes(config)["layers"]
    fixed = {
        layer for kinds, kind in spec.fixed_layers for layer, own in enumerate(getattr(config, kinds)) if own == kind
    }
    return fixed | {layer % depth for layer in spec.fixed_ends}


def protected_layers(spec: ArchSpec, config: PretrainedConfig, request: PrunerConfig) -> set[int]:
    """Layers that a choice by scores never drops."""
    depth = spec.sizes(config)["layers"]
    first, last = request.keep_first_layers, request.keep_last_layers
    ends = {layer for layer in range(depth) if layer < first or layer >= depth - last}
    return ends | fixed_layers(spec, config)


def _unequal_sizes(spec: ArchSpec, config: PretrainedConfig) -> list[dict[str, int]]:
    """Groups that are more or fewer in some layers than the config says of all: none, and every such kind of layer."""
    outer = [axis for _, axis in spec.groups]
    sizes = spec.sizes(config)
    kinds: list[dict[str, int]] = [{}]
    for layer in spec.layer_sizes(config):
        own = {axis: layer[axis] for axis in outer if layer[axis] != sizes[axis]}
        kinds += [] if own in kinds else [own]
    return kinds


def _depth_after(request: PrunerConfig, depth: int) -> int:
    drop = request.layers_to_drop or []
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
    return left


def _step(
    spec: ArchSpec,
    config: PretrainedConfig,
    axis: str,
    before: Mapping[str, int],
    sizes: Mapping[str, int],
    multiple_of: int,
) -> int:
    """What a fraction of an axis is rounded to a multiple of."""
    step = multiple_of if axis in ("hidden", "ffn", "moe_ffn", "shared_ffn") else 1
    for inner, outer in spec.groups:
        if axis == inner:
            step = math.lcm(step, sizes[outer])
    for one, other in [*spec.equal, *((right, left) for left, right in spec.equal)]:
        moving, each = _moving(spec, one, sizes)
        follower, each_follower = _moving(spec, other, sizes)
        if axis == moving:
            # hidden = heads * head_dim, and the heads follow in whole groups: any such multiple is legal.
            each_follower *= math.prod(sizes[outer] for inner, outer in spec.groups if inner == follower)
            step = math.lcm(step, each_follower // math.gcd(each_follower, each))
    return math.lcm(step, *(each for divided, each, _ in _divisors(spec, config, before, sizes) if divided == axis))


def _divisors(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], sizes: Mapping[str, int]
) -> Iterator[tuple[str, int, str]]:
    """(Axis, what its size must be a multiple of, why)."""
    for multiple, divisor in spec.multiples:
        why = f"the stock '{spec.model_type}' config only holds multiples of {_name(spec, divisor)}={sizes[divisor]}"
        yield multiple, sizes[divisor], why
    for name, axis, power in spec.scaled_fields:
        value = getattr(config, name)
        if power == 1 and isinstance(value, int):
            step = before[axis] // math.gcd(before[axis], value)
            yield axis, step, f"{name}={value} is scaled with it, and only stays whole for multiples of {step}"


def _most(spec: ArchSpec, axis: str, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Most units of an axis that the groups kept so far have."""
    return min(
        [before[axis], *(before[axis] // before[outer] * after[outer] for i, outer in spec.groups if i == axis)]
    )


def _round_fraction(fraction: float, size: int, step: int) -> int:
    """Nearest multiple of `step` to `fraction * size`, at least one step and at most `size`.

    >>> _round_fraction(0.75, 4096, 32), _round_fraction(0.5, 172, 8), _round_fraction(0.01, 64, 8)
    (3072, 88, 8)
    """
    return min(max(round(fraction * size / step), 1) * step, size)


def _follow_equal(spec: ArchSpec, before: Mapping[str, int], after: dict[str, int], given: set[str]) -> list[str]:
    """Where the stock class holds two dimensions only at one size, let the one that was not asked for follow."""
    notes = []
    fixed = set(given)
    for left_text, right_text in spec.equal:
        left, each_left = _moving(spec, left_text, after)
        right, each_right = _moving(spec, right_text, after)
        if each_left * after[left] == each_right * after[right]:
            continue
        names = {axis: _name(spec, axis) for axis in (left, right)}
        why = f" (heads keep their {each_left} dimensions)" if left == "heads" else ""
        times = f"{each_right} × " if each_right > 1 else ""
        legal = f"{times}{names[right]} = {each_left} × {names[left]}{why}"
        moves, follows, each, each_following = left, right, each_left, each_right
        if right in fixed:
            moves, follows, each, each_following = right, left, each_right, each_left
        followed, rest = divmod(each * after[moves], each_following)
        if left in fixed and right in fixed:
            step = each_right // math.gcd(each_right, each_left)
            heads = max(after[left] // step, 1) * step
            raise PlanError(
                f"{names[right]}={after[right]} and {names[left]}={after[left]} do not fit together: the stock "
                f"'{spec.model_type}' classes only hold {legal}. "
                f"Nearest: {names[right]}={each_left * heads // each_right} with {names[left]}={heads}."
            )
        if rest:
            step = each_following // math.gcd(each_following, each)
            raise PlanError(
                f"{names[moves]}={after[moves]}: the stock '{spec.model_type}' classes only hold {legal}. "
                f"Nearest: {_nearest(after[moves], range(step, before[moves] + 1, step))}."
            )
        after[follows] = followed
        fixed.add(follows)
        notes.append(f"{names[follows]} follows {names[moves]} to {followed}: {legal}.")
    return notes


def _moving(spec: ArchSpec, dimension: str, sizes: Mapping[str, int]) -> tuple[str, int]:
    """The one axis of a dimension that can be cut, and how much the dimension holds of each of its units."""
    [parsed] = parse_dimensions(dimension)
    [axis] = [name for name in dimension_axes(parsed) if spec.axis[name].prunable and name not in spec.refused]
    return axis, dimension_size(parsed, {**sizes, axis: 1})


def _require_groups(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    for inner, outer in spec.groups:
        names = {axis: _name(spec, axis) for axis in (inner, outer)}
        largest = before[inner] // before[outer]
        if after[inner] % after[outer] or after[inner] // after[outer] > largest:
            least, _ = _least(spec, config, inner)
            legal = [size for each in range(1, largest + 1) if (size := after[outer] * each) >= least]
            raise PlanError(
                f"{names[inner]}={after[inner]} with {names[outer]}={after[outer]}: every kept group keeps equally "
                f"many of its {largest}, so {names[inner]} must be one of {legal}. "
                f"Nearest: {_nearest(after[inner], legal)}."
                + (f" Or change {names[outer]}." if spec.axis[outer].prunable else "")
            )


def _require_multiples(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    divisors = list(_divisors(spec, config, before, after))
    for axis, divisor, why in divisors:
        if after[axis] % divisor:
            step = math.lcm(*(each for divided, each, _ in divisors if divided == axis))
            raise PlanError(
                f"{_name(spec, axis)}={after[axis]}: {why}. "
                f"Nearest: {_nearest(after[axis], range(step, before[axis] + 1, step))}." + _offer(spec, config, axis)
            )


def _offer(spec: ArchSpec, config: PretrainedConfig, axis: str) -> str:
    """Stock classes that hold the same model without a limit on an axis."""
    free = [name for name in _sisters(spec, config) if axis not in dict(families()[name].multiples)]
    return "".join(f" Or set model_type='{name}', whose classes hold the same model at any size." for name in free)


def _require_least(
    spec: ArchSpec, config: PretrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    """Routing picks a fixed number of experts, which must be there."""
    for axis in dict(spec.least):
        least, expression = _least(spec, config, axis)
        if after[axis] < min(least, before[axis]):
            step = math.lcm(*(after[outer] for inner, outer in spec.groups if inner == axis))
            raise PlanError(
                f"{_name(spec, axis)}={after[axis]}: this model needs at least {least} ({expression}). "
                f"Keep {-(-least // step) * step} or more."
            )


def _least(spec: ArchSpec, config: PretrainedConfig, axis: str) -> tuple[int, str]:
    """Fewest units that an axis must keep, and the expression that says so; those of missing fields say nothing."""
    found = [(1, "")]
    for limited, expression in spec.least:
        names = re.findall(r"[a-z_]\w*", expression)
        values = {name: getattr(config, name, None) for name in names}
        values = {name: max(value) if isinstance(value, list) else value for name, value in values.items()}
        numbers = {name: value for name, value in values.items() if isinstance(value, int)}
        if limited == axis and len(numbers) == len(set(names)):
            found.append((implied_size(expression, numbers), expression))
    return max(found)


def _name(spec: ArchSpec, axis: str) -> str:
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
        raise PlanError(f"{FIELD_OF_AXIS[axis]} of this '{spec.model_type}' model cannot be cut: {reason}.")


def _nearest(size: int, legal: Sequence[int]) -> str:
    """The legal sizes around a size, of an ascending sequence of them."""
    below, above = [one for one in legal if one <= size], [one for one in legal if one >= size]
    return " or ".join(str(one) for one in dict.fromkeys((*below[-1:], *above[:1])))


def build_student_config(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    sizes: Mapping[str, int],
    layers_kept: tuple[int, ...],
    *,
    norm_compensation: bool = False,
    uneven: Mapping[str, Sequence[int]] | None = None,
    model_type: str | None = None,
) -> PretrainedConfig:
    """The teacher's config with the student's sizes, validated by the stock class.

    `uneven` has the sizes of the layers that stay, for axes whose sizes are not to be equal; `model_type` names other
    stock classes than the teacher's.
    """
    if (inner := text_config(teacher)) is not teacher:
        text = build_student_config(
            spec, inner, sizes, layers_kept, norm_compensation=norm_compensation, uneven=uneven
        )
        whole = {**copy.deepcopy(teacher.to_dict()), "text_config": text.to_dict()}
        whole.pop("transformers_version", None)
        wrapped = type(teacher)(**whole)
        wrapped._attn_implementation = teacher._attn_implementation
        return wrapped
    config_type = type(teacher)
    values = copy.deepcopy(teacher.to_dict())
    # Implied sizes (head_dim above all) are written out: they would otherwise change with the sizes they derive from.
    # A number derives from none, and what it is implied by (one group where no groups are meant) may mean more.
    for axis in spec.axes:
        if spec.holds_lists(axis.name, teacher):
            [name] = axis.fields
            values[name] = [min(own, sizes[axis.name]) for own in values[name]]
            for layer, own in zip(layers_kept, (uneven or {}).get(axis.name, ())):
                values[name][layer] = own
        elif not (axis.implied or "").isdigit() or sizes[axis.name] != int(axis.implied or ""):
            for name in axis.fields:
                listed = isinstance(values.get(name), list)
                values[name] = [sizes[axis.name]] * sizes["layers"] if listed else sizes[axis.name]
        if axis.rounding is not None:
            values[axis.rounding.flag] = False
    values.update({name: implied_size(expression, sizes) for name, expression in spec.derived_fields})
    values.update(dict.fromkeys(spec.absent_parts, 0))
    before = spec.sizes(teacher)
    for name, size, power in spec.scaled_fields:
        if power == 1 and isinstance(values[name], int):
            values[name] = values[name] * sizes[size] // before[size]
        elif sizes[size] < before[size]:
            values[name] *= (sizes[size] / before[size]) ** power
    hidden = before["hidden"]
    if norm_compensation and sizes["hidden"] < hidden and _norms_are_alike(spec):
        values.update({name: values[name] * hidden / sizes["hidden"] for name in NORM_EPSILONS if values.get(name)})
    changed: dict[str, Any] = {}
    if len(layers_kept) < before["layers"]:
        if lacking := lacking_kinds(spec, teacher, layers_kept):
            raise PlanError(f"Layers {list(layers_kept)} cannot be all that is left: {lacking}")
        changed = _layer_fields(spec, values, before["layers"], layers_kept)
        values.update(changed)
    values.pop("transformers_version", None)
    if model_type not in (None, spec.model_type):
        config_type = config_class(str(model_type))
        known = config_type().to_dict().keys() - {"architectures"}
        values = {name: value for name, value in values.items() if name in known and name != "model_type"}
        values.update(_sisters(spec, teacher)[str(model_type)])
    try:
        config = config_type(**values)
        # Layers that predict further tokens are no part of the stock model, and so of no student either.
        if getattr(config, "num_mtp_layers", None):
            config.num_mtp_layers = 0
        config.validate()
    except Exception as error:
        nearest = _nearest_accepted(spec, config_type, values, before, sizes)
        raise PlanError(
            f"The stock {config_type.__name__} refuses these sizes: {first_line(error)} {nearest}"
        ) from error
    built = {axis: size for axis, size in spec.sizes(config).items() if not spec.holds_lists(axis, teacher)}
    expected = {axis: sizes[axis] for axis in built}
    if built != expected:
        raise PlanError(
            f"The stock {config_type.__name__} changes the sizes it is given: {built} instead of "
            f"{expected}. Choose other sizes."
        )
    for name in set(spec.layer_lists) & changed.keys():
        if (made := getattr(config, name)) != changed[name]:
            raise PlanError(
                f"The stock {type(teacher).__name__} cannot hold layers {list(layers_kept)} in this order: it changes "
                f"{name} from {changed[name]} to {made}. Choose other layers_to_drop."
            )
    config._attn_implementation = teacher._attn_implementation
    return config


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
                found.append(f"{_name(spec, axis)}={legal}")
    return f"Nearest: {', or '.join(found)}." if found else "Choose other sizes."


def _norms_are_alike(spec: ArchSpec) -> bool:
    """Whether all norms are over the hidden size, and read a residual stream of the teacher's scale.

    Otherwise the one eps of the config must stay what the others need; it hardly matters.
    """
    vectors = {name for name, dims in spec.dimensions.items() if len(dims) == 1 and name.endswith("weight")}
    return vectors == set(spec.residual_norms) and not spec.bare_norms and not spec.scaled_embeddings


def lacking_kinds(spec: ArchSpec, config: PretrainedConfig, layers_kept: Iterable[int]) -> str:
    """What layers a choice of layers lacks, as a sentence; empty when it lacks none.

    Args:
        spec: the family.
        config: the teacher's config.
        layers_kept: teacher indices of the layers that stay.
    """
    config = text_config(config)
    kept = set(layers_kept)
    for name, kinds in spec.needed_kinds:
        needed = [layer for layer, kind in enumerate(getattr(config, name)) if kind in kinds]
        if needed and kept.isdisjoint(needed):
            return (
                f"the stock '{spec.model_type}' classes do not work without a layer of {name} "
                f"{' or '.join(kinds)}. Keep one of {needed}."
            )
    for names in spec.sparse_ranges:
        if _sparse_range([getattr(config, name) for name in names], sorted(kept)) is None:
            return (
                f"no values of {', '.join(names)} describe which of them have experts. "
                "Choose layers_to_drop so that these follow each other, or repeat as they did."
            )
    for name, reusing in spec.reusing_layers:
        source = 0
        for layer, kind in enumerate(getattr(config, name)):
            if kind != reusing:
                source = layer
            elif layer in kept and source not in kept:
                return (
                    f"layer {layer} ({name} '{kind}') uses what layer {source} computes. "
                    f"Keep layer {source} too, or drop both."
                )
    if spec.derived_kinds:
        shallower = copy.deepcopy(config)
        setattr(shallower, spec.axis["layers"].fields[0], len(kept))
        for name, rule in spec.derived_kinds:
            kinds = getattr(config, name)
            if getattr(shallower, name) != [kinds[layer] for layer in sorted(kept)]:
                return (
                    f"their {name} follow from {rule}, which stay as they are. "
                    "Choose layers_to_drop so that the kinds of layers repeat as they did, or num_hidden_layers so "
                    "that one block of layers can go."
                )
    return ""


def _sparse_range(described: Sequence[int], layers_kept: Iterable[int]) -> tuple[int, int, int] | None:
    """First, last and period of the layers that have experts, once only some layers stay; None where none describe it.

    Args:
        described: the same three numbers for all layers.
        layers_kept: those that stay, ascending.
    """
    first, last, period = described
    kept = list(layers_kept)
    sparse = [new for new, layer in enumerate(kept) if first <= layer <= last and (layer + 1) % period == 0]
    if not sparse:
        return len(kept), len(kept) - 1, period
    for every in range(1, len(kept) + 1):
        if [new for new in range(sparse[0], sparse[-1] + 1) if (new + 1) % every == 0] == sparse:
            return sparse[0], sparse[-1], every
    return None


def _layer_fields(
    spec: ArchSpec, values: Mapping[str, Any], depth: int, layers_kept: tuple[int, ...]
) -> dict[str, Any]:
    """Config fields that say something of single layers, for the layers that stay."""

    def renumbered(layers: Iterable[int]) -> list[int]:
        layers = set(layers)
        return [new for new, layer in enumerate(layers_kept) if layer in layers]

    changed: dict[str, Any] = {}
    for name in spec.layer_lists:
        if isinstance(values.get(name), list | tuple):
            changed[name] = [values[name][layer] for layer in layers_kept]
    for name, listed in spec.layer_patterns:
        changed[name] = [[[values[listed][layer] for layer in layers_kept], 1]]
    if own := values.get("per_layer_config"):
        own = {int(layer): overrides for layer, overrides in own.items()}
        changed["per_layer_config"] = {new: own[layer] for new, layer in enumerate(layers_kept) if layer in own}
    for name in spec.leading_layers:
        # May exceed the depth (Qwen2's default is 28), hence not recounted without need.
        if values.get(name) is not None:
            changed[name] = sum(layer < values[name] for layer in layers_kept)
    for name in spec.trailing_layers:
        if values.get(name) is not None:
            changed[name] = sum(layer >= depth - values[name] for layer in layers_kept)
    for name in spec.layer_indices:
        if values.get(name) is not None:
            changed[name] = renumbered(values[name])
    for listed, period in spec.sparse_layers:
        dense = {layer for layer in range(depth) if layer in (values[listed] or ()) or (layer + 1) % values[period]}
        changed |= {listed: renumbered(dense), period: 1}
    for names in spec.sparse_ranges:
        described = _sparse_range([values[name] for name in names], layers_kept)
        assert described is not None, "lacking_kinds() comes first"
        changed |= dict(zip(names, described))
    return changed
