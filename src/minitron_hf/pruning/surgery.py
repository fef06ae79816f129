"""Do what the plan says: index the teacher's tensors into a new stock model. The teacher is never touched."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.initialization import no_init_weights

from ..data import DataSource, token_rows
from ..errors import MismatchError, PlanError, UnsupportedModelError
from ..families import FIELD_OF_AXIS, ArchSpec, named_tensors, spec_for
from ..families.axes import Axis, Dimension, dimension_axes, dimension_index
from ..models import (
    architecture_digest,
    count_parameters,
    empty_model,
    input_device,
    load_config,
    load_model,
    load_tokenizer,
    on_meta,
    set_tensor,
    tensor_values,
)
from ..scoring.importance import ImportanceScores, default_max_length, estimate_importance, require_weights
from ..scoring.observers import require_vocabulary
from ..sizes.request import PrunerConfig, resolve_sizes, scoring_arguments, student_config, with_classes
from ..sizes.shapes import TOLERANCE, different, shapes_near_target
from .candidates import Candidate, Divergence, behind
from .plan import PruningPlan, config_values, make_plan
from .repair import repaired_weights
from .verification import verified_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Arguments of `estimate_importance` that say which rows of the data are read, and how.
CALIBRATION_ARGUMENTS = ("num_samples", "max_length", "packing", "batch_size")


def apply_plan(
    model: PreTrainedModel, plan: PruningPlan, *, repaired: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Build the student: a new stock model with indexed copies of the teacher's tensors.

    It is of the teacher's class, unless the plan names other stock classes that hold the same model.

    Dtypes and devices follow the teacher's parameters (offloaded ones are cut on the CPU), tied heads stay tied, and
    the plan is attached as `student.pruning_plan`.

    Args:
        model: the teacher; not changed.
        plan: made for this teacher.
        repaired: tensors to take instead of the teacher's, by name, before they are cut (`repaired_weights`), for a
            plan with a repair.

    Returns:
        The student, in evaluation mode.

    Raises:
        MismatchError: if the plan was made for another architecture or other weights.
        PlanError: if the plan has a repair and there is none here, or the reverse.
        UnsupportedModelError: if the model is not what its family table says.
    """
    if plan.repair and repaired is None:
        raise PlanError(
            f"This plan has repair={plan.repair!r}, which needs data. Call carry_out(model, plan, data), give --data "
            "to minitron-hf prune, or plan without repair."
        )
    if repaired and not plan.repair:
        raise PlanError(
            "This plan has no repair, so repaired= would not be recorded. Plan with PrunerConfig(repair=…)."
        )
    spec = spec_for(model.config)
    spec.check(model)
    if on_meta(model):
        raise UnsupportedModelError(
            f"Weights of this {type(model).__name__} have no values (they are on the meta device). "
            "Load them onto a device."
        )
    _require_architecture(model, plan)
    require_weights(model, plan.teacher.get("digest"), "The plan and its scores")

    config = plan.build_student_config()
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    config._name_or_path = model.config._name_or_path
    with no_init_weights(), input_device(model):
        student = _student_class(model, config)._from_config(config, dtype=model.dtype)
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, source, shape in spec.student_tensors(tensors, student.config, plan.layers_kept):
            values = (repaired or {}).get(source)
            if values is None:
                values = tensor_values(model, source).detach()
            tensor = student_tensor(values, source, spec, model.config, plan)
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            set_tensor(student, name, tensor.clone() if tensor.is_set_to(values) else tensor)
    student.tie_weights()
    student.generation_config = copy.deepcopy(model.generation_config)
    student.pruning_plan = plan
    return student.eval()


def prune_model(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    config: PrunerConfig,
    *,
    calibration_data: DataSource | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    scores: ImportanceScores | None = None,
    verify: bool = False,
    iterations: int = 1,
    **importance_kwargs: Any,
) -> PreTrainedModel:
    """Score, plan and cut in one call. The plan's notes are logged as warnings.

    Args:
        model_or_path: the teacher: a model, a folder or a Hub id. It is not changed.
        config: the student's sizes, or a target for them (`plan_for_target`).
        calibration_data: texts, token rows or a dataset to score the teacher on, unless `scores` are given. A repair
            goes through it once more, so no generator then.
        processing_class: tokenizer for the texts; loaded from the teacher's path when left out.
        scores: scores made before by `estimate_importance`.
        verify: compare the student's logits with those of the teacher with the same units masked, on a few tokens
            (`verify_student`), and note the gap in the plan.
        iterations: score and cut in so many rounds (`iterate_importance`).
        **importance_kwargs: passed on to `estimate_importance` (`metric`, `depth_metric`, `num_samples`, …). What a
            `depth_metric` has to measure follows from `config`.

    Returns:
        The student: a new stock model that `save_pretrained` and `AutoModelForCausalLM.from_pretrained` know, with
        the plan as `student.pruning_plan`.

    Raises:
        MinitronError: see `estimate_importance`, `make_plan`, `apply_plan` and `verify_student`. Impossible sizes are
            refused before any compute.

    Example:
        >>> student = prune_model("meta-llama/Llama-3.1-8B", PrunerConfig(hidden_size=0.75, intermediate_size=0.65),
        ...                       calibration_data=texts)  # doctest: +SKIP
    """
    scored = calibration_data is not None or importance_kwargs.get("metric") == "random"
    if scores is not None and scored:
        raise PlanError("Pass either scores or calibration_data, not both.")
    if config.repair and calibration_data is None:
        raise PlanError(
            f"repair={config.repair!r} needs calibration_data. Pass it instead of scores, or call make_plan and "
            "carry_out(model, plan, data)."
        )
    if config.target_parameters is not None and (calibration_data is None or isinstance(calibration_data, Iterator)):
        raise PlanError(
            "target_parameters needs calibration_data that can be gone through more than once (a list, a dataset): "
            "shapes are measured on it after it was scored. With scores made before, call plan_for_target(model, "
            "config, scores, data) and apply_plan(model, plan)."
        )
    if importance_kwargs and not scored:
        raise PlanError(
            f"{', '.join(importance_kwargs)}: only used to score calibration_data. Pass it, or leave them out."
        )
    # Every refusal of sizes comes before the weights are loaded, and before the scoring.
    teacher_config = model_or_path.config if isinstance(model_or_path, nn.Module) else load_config(model_or_path)
    if config.target_parameters is None:
        student_config(teacher_config, config)
    else:
        shapes_near_target(teacher_config, config)
    model = load_model(model_or_path)
    if scored:
        if processing_class is None and not isinstance(model_or_path, nn.Module):
            processing_class = load_tokenizer(model_or_path)
        scores = iterate_importance(
            model,
            config,
            calibration_data,
            iterations=iterations,
            processing_class=processing_class,
            **importance_kwargs,
        )
    if config.target_parameters is not None and scores is not None and calibration_data is not None:
        arguments = {name: importance_kwargs[name] for name in ("max_length",) if name in importance_kwargs}
        plan = plan_for_target(model, config, scores, calibration_data, processing_class=processing_class, **arguments)
    else:
        plan = make_plan(model, config, scores)
    for note in plan.notes:
        logger.warning(note)
    arguments = {name: value for name, value in importance_kwargs.items() if name in CALIBRATION_ARGUMENTS}
    return carry_out(model, plan, calibration_data, processing_class=processing_class, verify=verify, **arguments)


def plan_for_target(
    model: PreTrainedModel,
    request: PrunerConfig,
    scores: ImportanceScores,
    data: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    tolerance: float = TOLERANCE,
    num_shapes: int = 16,
    num_rows: int = 32,
    max_length: int | None = None,
) -> PruningPlan:
    """Choose the sizes for `request.target_parameters`, by the proxy alone, and plan them.

    Shapes that meet the target (`shapes_near_target`) are cut one after another and compared with the teacher before
    any retraining, on the same tokens, without a repair. The lowest KL wins. Ranks before retraining can deceive:
    `search_architectures` retrains the best.

    Args:
        model: the teacher; not changed.
        request: with a target. Sizes that it gives are kept.
        scores: importance of the teacher's units.
        data: texts or token rows to measure on.
        processing_class: tokenizer of texts.
        tolerance: by how much of the target the student may be smaller; it is never larger.
        num_shapes: shapes to measure; of more, some that differ are taken.
        num_rows: rows to measure on.
        max_length: tokens of a row.

    Returns:
        The plan of the best shape; all that were measured are its `candidates`, KL ± standard error in its notes.

    Raises:
        PlanError: if the target is out of reach, no size is left to choose, or none of the shapes can be planned.
        MismatchError: if the scores belong to another model.
    """
    if request.target_parameters is None:
        raise PlanError("plan_for_target needs target_parameters. With sizes, call make_plan(model, request, scores).")
    shapes = different(shapes_near_target(model.config, request, tolerance=tolerance), num_shapes)
    max_length = max_length or default_max_length(model.config)
    rows = token_rows(data, processing_class, max_length=max_length, num_rows=num_rows)
    require_vocabulary(max(max(row) for row in rows.rows), model.config)
    total = count_parameters(model)
    limit = request.target_parameters * (total if request.target_parameters < 1 else 1)
    measure = Divergence(model, rows)
    candidates: list[Candidate] = []
    refusals: list[str] = []
    for shape in shapes:
        try:
            plan = make_plan(model, replace(shape.request, repair=None), scores)
        except PlanError as error:
            refusals.append(str(error))
            continue
        candidate = Candidate(shape.request, plan.student["num_parameters"])
        if candidate.num_parameters > limit:  # where layers are not alike, it depends on which of them go
            refusals.append(f"{candidate.name} has {candidate.num_parameters:,} parameters with the layers that stay.")
            continue
        student = apply_plan(model, plan)
        candidate.proxy = measure(student, candidate)
        candidates.append(candidate)
        del student
    if not candidates:
        raise PlanError(
            f"target_parameters={request.target_parameters:,}: none of {len(shapes)} shapes can be cut: {refusals[0]}"
        )
    best, *others = sorted(candidates, key=lambda candidate: candidate.proxy_kl)
    for other in others:
        other.behind = behind(other, best, rows)
    plan = make_plan(model, best.request, scores)
    return replace(
        plan,
        candidates=tuple(candidate.proxy_dict() for candidate in (best, *others)),
        notes=(*plan.notes, _choice_note(request.target_parameters, best, others)),
    )


def _choice_note(target: float, best: Candidate, others: Sequence[Candidate]) -> str:
    assert best.proxy is not None
    note = (
        f"Sizes for target_parameters={target:,}: {best.name} ({best.num_parameters:,} parameters), KL "
        f"{best.proxy['value']:.3f} ± {best.proxy['stderr']:.3f} before retraining, the lowest of "
        f"{len(others) + 1} measured"
    )
    if not others or others[0].behind is None:
        return f"{note}."
    gap = others[0].behind
    return f"{note}; next {others[0].name}, {gap['value']:.3f} ± {gap['stderr']:.3f} behind."


def carry_out(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: DataSource | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    verify: bool = False,
    **row_arguments: Any,
) -> PreTrainedModel:
    """`apply_plan`, with the repair that the plan may have, and verified on demand.

    Args:
        model: the teacher; not changed.
        plan: made for it.
        data: calibration data for a repair (`repaired_weights`).
        processing_class: tokenizer for texts.
        verify: compare the student, before any repair, with the masked teacher (`verify_student`), and note it.
        **row_arguments: which rows of the data a repair sees: `num_samples`, `max_length`, `packing`, `batch_size`.

    Returns:
        The student, with the plan and its notes as `student.pruning_plan`.

    Raises:
        MinitronError: see `apply_plan`, `repaired_weights` and `verify_student`.
    """
    student: Any = None
    if verify:
        student = apply_plan(model, replace(plan, repair=None))
        plan = verified_plan(model, student, plan)
    if plan.repair:
        repaired = None
        if data is not None:
            repaired = repaired_weights(model, plan, data, processing_class=processing_class, **row_arguments)
        student = apply_plan(model, plan, repaired=repaired)
    elif student is None:
        student = apply_plan(model, plan)
    student.pruning_plan = plan
    return student


def iterate_importance(
    model: PreTrainedModel,
    config: PrunerConfig,
    data: DataSource | None = None,
    *,
    iterations: int = 1,
    **importance_kwargs: Any,
) -> ImportanceScores:
    """Score, cut a part, score what is left, and so on (P1 §2.2): round i of T cuts i/T of what is to go in the end.

    P1 found 5.43, 5.55 and 5.24 for T = 1, 2 and 4 before retraining, and 1.92 for all of them after it.

    Args:
        model: the teacher; not changed.
        config: the student's sizes. Those of the rounds before the last are rounded as fractions are, and their
            students may be of other stock classes that hold the same model.
        data: see `estimate_importance`; gone through once per round, so no generator.
        iterations: T; 1 is `estimate_importance`.
        **importance_kwargs: passed on to `estimate_importance`. What a `depth_metric` has to measure follows from
            `config`.

    Returns:
        Scores of the teacher's units by the last round, NaN where a unit was cut before, for `make_plan` with the same
        `config`. Blocks without all layers that were cut before are infinite.

    Raises:
        PlanError: if the rounds cannot be followed for this request.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise PlanError(f"iterations={iterations!r}: expected a number of rounds.")
    if iterations > 1 and (config.uneven or config.layers_to_drop is not None):
        raise PlanError(
            f"iterations={iterations} cannot be combined with uneven or layers_to_drop: what goes in each round "
            "follows from sizes. Leave them out, or score once."
        )
    if iterations > 1 and config.head_add_back:
        raise PlanError(
            f"iterations={iterations} cannot be combined with head_add_back: it needs the order of all heads in one "
            "round of scoring. Leave it out, or score once."
        )
    if config.target_parameters is not None:
        if iterations > 1:
            raise PlanError(
                f"iterations={iterations} cannot be combined with target_parameters: what goes in each round follows "
                "from sizes. Give sizes, or score once."
            )
        once = estimate_importance(model, data, **scoring_arguments(model.config, config, importance_kwargs))
        assert isinstance(once, ImportanceScores)
        return once
    spec = spec_for(model.config)
    before = spec.sizes(model.config)
    after = resolve_sizes(spec, model.config, config)[0]
    student, plan, first = model, None, None
    for number in range(1, iterations + 1):
        request = config
        if number < iterations:
            part: dict[str, Any] = {
                FIELD_OF_AXIS[axis]: (before[axis] - number * (before[axis] - after[axis]) / iterations) / before[axis]
                for axis in after
                if axis in FIELD_OF_AXIS and after[axis] < before[axis]
            }
            try:
                request = with_classes(model.config, replace(config, repair=None, **part))
            except PlanError as error:
                raise PlanError(
                    f"iterations={iterations}: the student of round {number} has no stock classes. {error} "
                    "Give other sizes to end with, or another number of rounds."
                ) from error
        left = resolve_sizes(spec, model.config, request)[0]["layers"]
        arguments = scoring_arguments(
            student.config,
            PrunerConfig(
                num_hidden_layers=left,
                contiguous=config.contiguous,
                keep_first_layers=config.keep_first_layers,
                keep_last_layers=config.keep_last_layers,
            ),
            importance_kwargs,
        )
        if iterations > 1 and arguments.get("one_by_one"):
            raise PlanError(
                "contiguous=False with a depth_metric removes layers one after another already. Leave out iterations."
            )
        own = estimate_importance(student, data, **arguments)
        assert isinstance(own, ImportanceScores)
        if plan is None or first is None:
            first = scores = own
        else:
            scores = _in_teacher(own, plan, first, spec, iterations)
        if number < iterations:
            plan = make_plan(model, request, scores)
            student = apply_plan(model, plan)
    return scores


def _in_teacher(
    own: ImportanceScores, plan: PruningPlan, first: ImportanceScores, spec: ArchSpec, iterations: int
) -> ImportanceScores:
    """Scores of a student as scores of its teacher: NaN for units that are gone, so that they come last."""
    axes: dict[str, torch.Tensor] = {}
    for axis, values in own.axes.items():
        table = axes[axis] = torch.full_like(first.axes[axis], torch.nan)
        within = spec.axis[axis].within
        if not spec.axis[axis].per_layer:
            table[torch.from_numpy(plan.kept[axis]) if axis in plan.kept else slice(None)] = values
            continue
        for new, old in enumerate(plan.layers_kept):
            kept = plan.kept_in(old)
            units = torch.from_numpy(kept[axis]) if axis in kept else torch.arange(table.shape[-1])
            if within is None:
                table[old, units] = values[new, : len(units)]
                continue
            outer = kept[within].tolist() if within in kept else range(table.shape[1])
            for row, unit in enumerate(outer):
                chosen = units if units.ndim == 1 else units[row]
                table[old, unit, chosen] = values[new, row, : len(chosen)]
    blocks = torch.full_like(first.blocks, torch.nan)
    kept_layers = list(plan.layers_kept)
    for start in range(len(blocks)):
        for end in range(start, len(blocks)):
            inside = [new for new, old in enumerate(kept_layers) if start <= old <= end]
            gone = set(plan.layers_dropped) <= set(range(start, end + 1))
            blocks[start, end] = own.blocks[inside[0], inside[-1]] if inside and gone else torch.inf
    if not plan.pruner_config["contiguous"]:
        # Single layers: those that are gone already go first.
        for layer in range(len(blocks)):
            position = kept_layers.index(layer) if layer in kept_layers else None
            blocks[layer, layer] = -torch.inf if position is None else own.blocks[position, position]
    settings = {**own.settings, "model": first.settings["model"], "iterations": iterations}
    digests = {**own.digests, "model": first.digests["model"], "architecture": first.digests["architecture"]}
    return replace(own, axes=axes, blocks=blocks, settings=settings, digests=digests)


def _student_class(model: PreTrainedModel, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The teacher's class, or that of other stock classes which hold the same model."""
    if config.model_type == model.config.model_type:
        return type(model)
    return type(empty_model(config))


def _require_architecture(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Refuse a plan for another family or other sizes."""
    fits = model.config.model_type == plan.model_type
    if fits:
        values = config_values(plan.teacher["config"])
        del values["model_type"]
        planned = type(model.config)(**values)
        fits = architecture_digest(planned) == architecture_digest(model.config)
    if not fits:
        raise MismatchError(
            f"The plan was made for a {plan.model_type} model of other sizes "
            f"({plan.teacher['name_or_path'] or 'in memory'}) than this {type(model).__name__}. Plan again."
        )


def student_tensor(
    tensor: torch.Tensor, name: str, spec: ArchSpec, config: PretrainedConfig, plan: PruningPlan
) -> torch.Tensor:
    """What a tensor of the teacher becomes in the student: its kept units, merged and scaled where the plan says so.

    Args:
        tensor: the teacher's tensor.
        name: its name in the teacher.
        spec: the family's table.
        config: the teacher's.
        plan: the plan.

    Returns:
        A copy in the teacher's dtype, or the tensor itself where nothing changes.
    """
    pattern, layer = spec.locate(name) or (name, None)
    sizes = spec.sizes(config, layer)
    dimensions = spec.dimensions.get(pattern, ())
    whole, tensor = tensor, cut_tensor(tensor, dimensions, spec.axis, sizes, plan.kept_in(layer))
    if any(not dimension_axes(dimension).isdisjoint(plan.partners) for dimension in dimensions):
        # Units without a partner stand in its place themselves, and stay what they are: 2x - x is exact.
        partner = cut_tensor(whole, dimensions, spec.axis, sizes, plan.partners_in(layer))
        wide = torch.promote_types(tensor.dtype, torch.float32)
        tensor = (tensor.to(wide) * 2 - partner.to(wide)).to(tensor.dtype)
    factor = plan.scales.get(pattern)
    if factor is None:
        return tensor
    offset = spec.norm_offset if pattern in spec.residual_norms else 0.0
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return ((exact + offset) * factor - offset).to(tensor.dtype)


def cut_tensor(
    tensor: torch.Tensor,
    dimensions: tuple[Dimension, ...],
    axes: Mapping[str, Axis],
    sizes: Mapping[str, int],
    kept: Mapping[str, np.ndarray],
) -> torch.Tensor:
    """The units of a tensor that stay.

    Args:
        tensor: any tensor of a layer, or outside the layers.
        dimensions: its dimensions.
        axes: the family's axes by name.
        sizes: size of every axis before the cut.
        kept: kept units of every cut axis, as seen from its layer (`PruningPlan.kept_in`).

    Returns:
        A copy, or the tensor itself where nothing is cut.
    """
    for position, outer in enumerate(dimensions):
        own = [
            name
            for name, units in kept.items()
            if units.ndim == 2
            and outer == ((axes[name].within,),)
            and any(name in dimension_axes(dimension) for dimension in dimensions)
        ]
        if own:
            # Units chosen inside every unit of another dimension (the neurons of an expert): one slice after another.
            [[axis]] = outer
            units = kept.get(str(axis), np.arange(tensor.shape[position]))
            rest = dimensions[:position] + dimensions[position + 1 :]
            slices = [
                cut_tensor(
                    tensor.select(position, int(unit)),
                    rest,
                    axes,
                    sizes,
                    {**kept, **{name: kept[name][row] for name in own}},
                )
                for row, unit in enumerate(units)
            ]
            return torch.stack(slices, dim=position)
    for position, dimension in enumerate(dimensions):
        index = dimension_index(dimension, sizes, kept)
        if index is not None:
            tensor = tensor.index_select(position, torch.from_numpy(index).to(tensor.device))
    return tensor
