"""Decide what to cut: sizes asked for + scores → `PruningPlan`. No weights are needed, and every refusal is here."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from .artifacts import digest, read_json, replacing_file, versions, write_json
from .axes import dimension_size, parse_dimensions
from .errors import HubError, MismatchError, PlanError
from .families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, spec_for
from .importance import ImportanceScores
from .models import count_parameters, empty_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PRUNER_CONFIG_NAME = "pruner_config.json"
PLAN_NAME = "pruning_plan.json"
INDICES_NAME = "pruning_plan.safetensors"

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
        num_hidden_layers: layers to keep.
        layers_to_drop: explicit layer indices to drop, instead of a choice by scores.
        contiguous: drop one contiguous block of layers, the least important of its length (P2: dropping the 16
            individually least important layers of Llama-3.1-8B left WinoGrande at chance, a contiguous block did not).
        multiple_of: fractions of `hidden_size` and `intermediate_size` are rounded to the nearest multiple.
    """

    hidden_size: Size = None
    intermediate_size: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    num_hidden_layers: Size = None
    layers_to_drop: list[int] | None = None
    contiguous: bool = True
    multiple_of: int = 8

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
            self.layers_to_drop = list(self.layers_to_drop)
            if not all(isinstance(layer, int) and layer >= 0 for layer in self.layers_to_drop):
                raise PlanError(f"layers_to_drop={self.layers_to_drop}: expected layer indices, counted from 0.")
            if len(set(self.layers_to_drop)) != len(self.layers_to_drop):
                raise PlanError(f"layers_to_drop={self.layers_to_drop} names a layer twice.")
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise PlanError(f"multiple_of={self.multiple_of!r}: expected a positive integer.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrunerConfig:
        """The reverse of `to_dict`.

        Raises:
            PlanError: if a name is unknown.
        """
        names = [field.name for field in fields(cls)]
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


@dataclass(frozen=True)
class PruningPlan:
    """What a student is made of: complete, checked, and independent of weights.

    Attributes:
        model_type: family.
        teacher: `name_or_path`, `revision`, `digest` of the weights (None if planned from a config without scores),
            `architecture` digest, parameter counts, `config`.
        student: parameter counts, `config`.
        sizes: axis → {"teacher": size, "student": size}.
        layers_kept: teacher indices of the student's layers.
        kept: axis → int64 teacher indices of the units that stay, ascending: `[units]` for axes of the whole model,
            `[kept layers, units]` for axes of each layer. Axes that are not cut are absent.
        pruner_config: the request.
        selection: how units were ranked (metric), or None if nothing had to be ranked.
        scores: digest, settings and data digest of the scores used, or None.
        notes: decisions the reader should know of.
        versions: of the libraries that made it.
    """

    model_type: str
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, int]]
    layers_kept: tuple[int, ...]
    kept: Mapping[str, np.ndarray]
    pruner_config: Mapping[str, Any]
    selection: str | None = None
    scores: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def layers_dropped(self) -> tuple[int, ...]:
        """Teacher indices of the layers that go."""
        return tuple(sorted(set(range(self.sizes["layers"]["teacher"])) - set(self.layers_kept)))

    def kept_in(self, layer: int | None) -> dict[str, np.ndarray]:
        """Kept units of every cut axis, as seen from one teacher layer (None: outside the layers)."""
        position = None if layer is None else self.layers_kept.index(layer)
        return {
            axis: units if units.ndim == 1 else units[position]
            for axis, units in self.kept.items()
            if units.ndim == 1 or position is not None
        }

    def build_student_config(self) -> PretrainedConfig:
        """The student's config as an object of the stock class."""
        from transformers import AutoConfig

        values = dict(self.student["config"])
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the indices of units, JSON-ready."""
        return {
            "format": 1,
            "versions": dict(self.versions),
            "model_type": self.model_type,
            "teacher": dict(self.teacher),
            "student": dict(self.student),
            "sizes": {axis: dict(sizes) for axis, sizes in self.sizes.items()},
            "layers_kept": list(self.layers_kept),
            "layers_dropped": list(self.layers_dropped),
            "pruner_config": dict(self.pruner_config),
            "selection": self.selection,
            "scores": None if self.scores is None else dict(self.scores),
            "notes": list(self.notes),
        }

    @property
    def digest(self) -> str:
        """Digest of what is kept, in which teacher."""
        return digest(
            self.teacher.get("digest"),
            self.student["config"],
            list(self.layers_kept),
            {axis: units.tolist() for axis, units in self.kept.items()},
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `pruning_plan.json`, and the kept indices beside it in `pruning_plan.safetensors`."""
        folder = Path(save_directory)
        with replacing_file(folder / INDICES_NAME) as temporary:
            save_file(
                {axis: np.ascontiguousarray(units) for axis, units in self.kept.items()},
                temporary,
                metadata={"format": "np"},
            )
        write_json(folder / PLAN_NAME, self.to_dict())
        return folder / PLAN_NAME

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan that `save_pretrained` wrote.

        Raises:
            OutputError: if there is none.
            MismatchError: if it is damaged or of another format.
        """
        folder = Path(folder)
        values = read_json(folder / PLAN_NAME)
        if values.get("format") != 1:
            raise MismatchError(f"{folder / PLAN_NAME} has format {values.get('format')!r}, expected 1. Plan again.")
        try:
            kept = load_file(folder / INDICES_NAME)
            return cls(
                model_type=values["model_type"],
                teacher=values["teacher"],
                student=values["student"],
                sizes=values["sizes"],
                layers_kept=tuple(values["layers_kept"]),
                kept=kept,
                pruner_config=values["pruner_config"],
                selection=values["selection"],
                scores=values["scores"],
                notes=tuple(values["notes"]),
                versions=values["versions"],
            )
        except Exception as error:
            raise MismatchError(f"The pruning plan in {folder} is damaged ({error!r}). Plan again.") from error


def make_plan(
    model_or_config: PreTrainedModel | PretrainedConfig,
    config: PrunerConfig,
    scores: ImportanceScores | None = None,
) -> PruningPlan:
    """Choose what stays. Needs no weights: a config, or a model on the meta device, is enough.

    Args:
        model_or_config: the teacher.
        config: the student's sizes.
        scores: importance of the teacher's units; needed for every axis that is cut by choice.

    Returns:
        The plan, with the exact parameter counts of the student.

    Raises:
        UnsupportedModelError: if the family is unknown or the model is not what its table says.
        PlanError: if the sizes cannot be cut, or the stock config cannot hold them; the message names legal sizes.
        MismatchError: if the scores belong to another model.
    """
    teacher_config: PretrainedConfig = getattr(model_or_config, "config", model_or_config)
    spec = spec_for(teacher_config)
    teacher = model_or_config if hasattr(model_or_config, "parameters") else empty_model(teacher_config)
    spec.check(teacher)
    if scores is not None:
        scores.require_model(model_or_config)

    before = spec.sizes(teacher_config)
    after, notes = resolve_sizes(spec, teacher_config, config)
    cut = [axis for axis in after if axis != "layers" and after[axis] < before[axis]]
    ranked = bool(cut) or (after["layers"] < before["layers"] and config.layers_to_drop is None)
    if ranked and scores is None:
        wanted = [FIELD_OF_AXIS[axis] for axis in cut] or ["num_hidden_layers"]
        raise PlanError(
            f"Cutting {', '.join(wanted)} needs importance scores. Pass scores=estimate_importance(…), "
            "or calibration_data to prune_model."
        )

    layers_kept = _choose_layers(before["layers"], after["layers"], config, scores)
    kept = _choose_units(spec, before, after, layers_kept, cut, scores)
    student = _student_config(spec, teacher_config, after, layers_kept)
    return PruningPlan(
        model_type=spec.model_type,
        teacher={
            "name_or_path": teacher_config._name_or_path,
            "revision": getattr(teacher_config, "_commit_hash", None),
            "digest": None if scores is None else scores.digests["model"],
            "num_parameters": count_parameters(teacher),
            "num_parameters_without_embeddings": count_parameters(teacher, embeddings=False),
            "config": _plain(teacher_config),
        },
        student={**_count_student(spec, teacher, student, after, layers_kept), "config": _plain(student)},
        sizes={axis: {"teacher": before[axis], "student": after[axis]} for axis in before},
        layers_kept=layers_kept,
        kept=kept,
        pruner_config=config.to_dict(),
        selection=None if scores is None or not ranked else str(scores.settings["metric"]),
        scores=None
        if scores is None or not ranked
        else {
            "digest": scores.digest,
            "settings": dict(scores.settings),
            "data_digest": scores.digests["data"],
            "tokenizer_digest": scores.digests["tokenizer"],
        },
        notes=tuple(notes),
    )


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
        kept = (*range(sizes["layers"] - 1), depth - 1)
    else:
        kept = _choose_layers(depth, sizes["layers"], pruner_config, None)
    return _student_config(spec, config, sizes, kept)


def resolve_sizes(
    spec: ArchSpec, teacher_config: PretrainedConfig, request: PrunerConfig
) -> tuple[dict[str, int], list[str]]:
    """Sizes of all axes in the student, and notes on sizes that followed from others.

    Raises:
        PlanError: for every request that cannot be met; the message names what could.
    """
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
    notes = []
    # Coarse axes first: the legal sizes of the finer ones depend on them.
    for axis in ("layers", "kv", "heads", "ffn", "hidden"):
        value = getattr(request, FIELD_OF_AXIS[axis]) if axis in before else None
        if isinstance(value, float):
            step = _step(spec, axis, after, request.multiple_of)
            after[axis] = _round_fraction(value, before[axis], step)
    notes += _follow_equal(spec, before, after, given)
    _require_groups(spec, before, after)
    _require_multiples(spec, before, after)
    for axis in after:
        if after[axis] < before[axis]:
            _require_cuttable(spec, teacher_config, axis)
    return after, notes


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


def _step(spec: ArchSpec, axis: str, sizes: Mapping[str, int], multiple_of: int) -> int:
    """What a fraction of an axis is rounded to a multiple of."""
    step = multiple_of if axis in ("hidden", "ffn") else 1
    for inner, outer in spec.groups:
        if axis == inner:
            step = math.lcm(step, sizes[outer])
    for multiple, divisor in spec.multiples:
        if axis == multiple:
            step = math.lcm(step, sizes[divisor])
    for left, right in spec.equal:
        if axis == right:
            # hidden = heads * head_dim, and the heads follow: any multiple of what stays of the product is legal.
            fixed = [factor for factor in left.split("*") if factor not in FIELD_OF_AXIS]
            step = math.lcm(step, *(sizes[factor] for factor in fixed))
    return step


def _round_fraction(fraction: float, size: int, step: int) -> int:
    """Nearest multiple of `step` to `fraction * size`, at least one step and at most `size`.

    >>> _round_fraction(0.75, 4096, 32), _round_fraction(0.5, 172, 8), _round_fraction(0.01, 64, 8)
    (3072, 88, 8)
    """
    return min(max(round(fraction * size / step), 1) * step, size)


def _follow_equal(spec: ArchSpec, before: Mapping[str, int], after: dict[str, int], given: set[str]) -> list[str]:
    """Where the stock class holds two dimensions only at one size, let the one that was not asked for follow."""
    notes = []
    for left_text, right in spec.equal:
        [left] = parse_dimensions(left_text)
        [moving] = [factor for factor in left_text.split("*") if factor in FIELD_OF_AXIS]
        fixed = dimension_size(left, {**after, moving: 1})
        left_size = fixed * after[moving]
        if left_size == after[right]:
            continue
        names = {axis: FIELD_OF_AXIS[axis] for axis in (moving, right)}
        legal = f"{names[right]} = {fixed} × {names[moving]} (heads keep their {fixed} dimensions)"
        if right in given and moving in given:
            raise PlanError(
                f"{names[right]}={after[right]} and {names[moving]}={after[moving]} do not fit together: the stock "
                f"'{spec.model_type}' classes only hold {legal}. "
                f"Nearest: {names[right]}={fixed * after[moving]} with {names[moving]}={after[moving]}."
            )
        if right in given:
            if after[right] % fixed:
                raise PlanError(
                    f"{names[right]}={after[right]}: the stock '{spec.model_type}' classes only hold {legal}. "
                    f"Nearest: {_nearest(after[right], fixed, before[right])}."
                )
            after[moving] = after[right] // fixed
            notes.append(f"{names[moving]} follows {names[right]} to {after[moving]}: {legal}.")
        else:
            after[right] = left_size
            notes.append(f"{names[right]} follows {names[moving]} to {left_size}: {legal}.")
    return notes


def _require_groups(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    for inner, outer in spec.groups:
        names = {axis: FIELD_OF_AXIS[axis] for axis in (inner, outer)}
        largest = before[inner] // before[outer]
        if after[inner] % after[outer] or after[inner] // after[outer] > largest:
            legal = [after[outer] * each for each in range(1, largest + 1)]
            raise PlanError(
                f"{names[inner]}={after[inner]} with {names[outer]}={after[outer]}: every kept KV head keeps equally "
                f"many of its {largest} query heads, so {names[inner]} must be one of {legal}. "
                f"Set {names[inner]} to one of them, or change {names[outer]}."
            )


def _require_multiples(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    for multiple, divisor in spec.multiples:
        if after[multiple] % after[divisor]:
            raise PlanError(
                f"{FIELD_OF_AXIS[multiple]}={after[multiple]}: the stock '{spec.model_type}' config only holds "
                f"multiples of {FIELD_OF_AXIS[divisor]}={after[divisor]}. "
                f"Nearest: {_nearest(after[multiple], after[divisor], before[multiple])}."
            )


def _require_cuttable(spec: ArchSpec, config: PretrainedConfig, axis: str) -> None:
    reason = spec.refused.get(axis)
    for name, value, refused_axis, why in spec.refused_if:
        if refused_axis == axis and getattr(config, name, None) == value:
            reason = f"{name}={value}: {why}"
    if reason is not None:
        raise PlanError(f"{FIELD_OF_AXIS[axis]} of this '{spec.model_type}' model cannot be cut: {reason}.")


def _nearest(size: int, step: int, largest: int) -> str:
    below, above = size // step * step, -(-size // step) * step
    return " or ".join(str(legal) for legal in dict.fromkeys((below, above)) if 0 < legal <= largest)


def _choose_layers(depth: int, left: int, request: PrunerConfig, scores: ImportanceScores | None) -> tuple[int, ...]:
    """Teacher indices of the layers that stay."""
    num_drop = depth - left
    if request.layers_to_drop is not None:
        drop: Sequence[int] = request.layers_to_drop
    elif num_drop == 0:
        drop = []
    else:
        assert scores is not None
        if request.contiguous:
            block = scores.blocks.diagonal(num_drop - 1).numpy()
            start = int(np.argmin(block))
            drop = range(start, start + num_drop)
        else:
            drop = np.argsort(scores.layers.numpy(), kind="stable")[:num_drop].tolist()
    return tuple(sorted(set(range(depth)) - set(drop)))


def _choose_units(
    spec: ArchSpec,
    before: Mapping[str, int],
    after: Mapping[str, int],
    layers_kept: tuple[int, ...],
    cut: list[str],
    scores: ImportanceScores | None,
) -> dict[str, np.ndarray]:
    """Kept units per axis: the highest scores; ties go to the lower index. Inner axes are chosen within groups."""
    if not cut:
        return {}
    assert scores is not None
    ranking = {axis: units.numpy() for axis, units in scores.axes.items()}
    kept: dict[str, np.ndarray] = {}
    for axis in cut:
        if axis in dict(spec.groups):
            continue
        if spec.axis[axis].per_layer:
            kept[axis] = np.stack([_top(ranking[axis][layer], after[axis]) for layer in layers_kept])
        else:
            kept[axis] = _top(ranking[axis], after[axis])
    for inner, outer in spec.groups:
        if inner not in cut:
            continue
        each_before, each_after = before[inner] // before[outer], after[inner] // after[outer]
        rows = []
        for position, layer in enumerate(layers_kept):
            groups = kept[outer][position] if outer in kept else np.arange(before[outer])
            rows.append(
                np.concatenate(
                    [
                        group * each_before
                        + _top(ranking[inner][layer][group * each_before : (group + 1) * each_before], each_after)
                        for group in groups
                    ]
                )
            )
        kept[inner] = np.stack(rows)
    return kept


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, ascending.

    >>> _top(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist()
    [0, 2]
    """
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def _student_config(
    spec: ArchSpec, teacher: PretrainedConfig, sizes: Mapping[str, int], layers_kept: tuple[int, ...]
) -> PretrainedConfig:
    """The teacher's config with the student's sizes, validated by the stock class."""
    values = copy.deepcopy(teacher.to_dict())
    # Implied sizes (head_dim above all) are written out: they would otherwise change with the sizes they derive from.
    for axis in spec.axes:
        values.update(dict.fromkeys(axis.fields, sizes[axis.name]))
    for name in spec.layer_lists:
        if values.get(name) is not None:
            values[name] = [values[name][layer] for layer in layers_kept]
    for name in spec.leading_layers:
        if values.get(name) is not None:
            values[name] = sum(layer < values[name] for layer in layers_kept)
    values.pop("transformers_version", None)
    try:
        config = type(teacher)(**values)
        config.validate()
    except Exception as error:
        raise PlanError(
            f"The stock {type(teacher).__name__} refuses these sizes: {error}. Choose other sizes."
        ) from error
    if spec.sizes(config) != dict(sizes):
        raise PlanError(
            f"The stock {type(teacher).__name__} changes the sizes it is given: {spec.sizes(config)} instead of "
            f"{dict(sizes)}. Choose other sizes."
        )
    config._attn_implementation = teacher._attn_implementation
    return config


def _count_student(
    spec: ArchSpec,
    teacher: PreTrainedModel,
    student: PretrainedConfig,
    sizes: Mapping[str, int],
    layers_kept: tuple[int, ...],
) -> dict[str, int]:
    """Parameter counts by the table, proved against the stock class on the meta device."""
    names = dict(teacher.named_parameters())
    counts = {name: math.prod(shape) for name, _, shape in spec.student_parameters(names, sizes, layers_kept)}
    meta = empty_model(student)
    built = {name: parameter.numel() for name, parameter in meta.named_parameters()}
    if counts != built:
        wrong = sorted(counts.items() ^ built.items())[:4]
        raise PlanError(
            f"The stock {type(meta).__name__} built from the student's config differs from the table at {wrong}. "
            "This is a mistake in the family table: please report it."
        )
    return {
        "num_parameters": sum(counts.values()),
        "num_parameters_without_embeddings": count_parameters(meta, embeddings=False),
    }


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    """A config as JSON values, the way `config.json` holds it."""
    return json.loads(config.to_json_string(use_diff=False))
