"""Builds the student from a plan: indexes the teacher's tensors into a new stock model. The teacher is not changed."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..compat import build_from_config, no_init_weights, use_same_kernels
from ..errors import MismatchError, PlanError, UnsupportedModelError, checks_kinds
from ..families import VOCABULARY, ArchSpec, named_tensors, spec_for
from ..families.axes import Axis, Dimension, dimension_axes, dimension_index
from ..models import (
    architecture_digest,
    empty_model,
)
from ..scoring.scores import require_weights
from ..vocabulary.ids import renumbered_generation_config
from ..weights import input_device, narrowed, on_meta, put_on_one_device, set_tensor, tensor_values
from .basis import Rotation
from .plan import PruningPlan, config_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)


@checks_kinds
def apply_plan(
    model: PreTrainedModel, plan: PruningPlan, *, repaired: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Build the student: a new stock model with indexed copies of the teacher's tensors.

    The student has the teacher's class, unless the plan names another stock class for the same model.

    Dtypes and device follow the teacher (of one on several devices, the device of its inputs), tied heads stay tied,
    and the plan is attached as `student.pruning_plan`.

    Args:
        model: the teacher; not changed.
        plan: plan for this teacher.
        repaired: name → unpruned tensor to use instead of the teacher's (`repaired_weights`), for a plan with a
            repair.

    Returns:
        The student, in evaluation mode.

    Raises:
        MismatchError: if the plan was made for another architecture or other weights.
        PlanError: if the plan has a repair and `repaired` is missing, or the reverse.
        UnsupportedModelError: if the model differs from its family table.
    """
    _require_repair(plan, repaired)
    spec = spec_for(model.config)
    spec.check(model)
    if on_meta(model):
        raise UnsupportedModelError(
            f"Weights of this {type(model).__name__} have no values (they are on the meta device). "
            "Load them onto a device."
        )
    require_architecture(model.config, plan)
    require_weights(model, plan.teacher.get("digest"), "The plan and its scores")

    config = plan.build_student_config(model.config)
    use_same_kernels(config, model.config)
    config.name_or_path = ""  # stored nowhere: an adapter's checkpoint would name the teacher as its base model
    with no_init_weights(), input_device(model):
        student = build_from_config(student_class(model, config), config, model.dtype)
    tensors = named_tensors(model)
    rotation = None if plan.basis is None else Rotation(model, plan.basis)
    with torch.no_grad():
        for name, source, shape in spec.student_tensors(tensors, student.config, plan.layers_kept):
            values = (repaired or {}).get(source)
            if values is None:
                values = tensor_values(model, source).detach()
                values = values if rotation is None else rotation.tensor(source, values)
            tensor = student_tensor(values, source, spec, model.config, plan)
            if tensor.dtype != tensors[source].dtype:  # a refitted one may be wider
                tensor = narrowed(tensor, tensors[source].dtype, source)
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            set_tensor(student, name, tensor.clone() if tensor.is_set_to(values) else tensor)
    put_on_one_device(student, input_device(model))
    student.tie_weights()
    student.generation_config = _generation_config(model, plan)
    student.pruning_plan = plan
    return student.eval()


def _generation_config(model: PreTrainedModel, plan: PruningPlan) -> Any:
    """The teacher's, with the student's token ids."""
    own = copy.deepcopy(model.generation_config)
    if plan.new_ids is None or own is None:
        return own
    return renumbered_generation_config(own, plan.new_ids, plan.sizes[VOCABULARY]["teacher"])


def _require_repair(plan: PruningPlan, repaired: Mapping[str, torch.Tensor] | None) -> None:
    """Refuse a plan with a repair without repaired tensors, and the reverse."""
    if plan.repair and repaired is None:
        raise PlanError(
            f"This plan has the repair {plan.repair!r}, which needs data. Call prune_with_plan(model, plan, data), "
            "give --data to minitron-hf prune, or plan without repair."
        )
    if repaired and not plan.repair:
        raise PlanError(
            "This plan has no repair, so repaired= would not be recorded. Plan with PrunerConfig(repair=…)."
        )


def student_class(model: PreTrainedModel, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The teacher's class, or another stock class that holds the same model."""
    if config.model_type == model.config.model_type:
        return type(model)
    return type(empty_model(config))


def require_architecture(config: PretrainedConfig, plan: PruningPlan) -> None:
    """Refuse a plan for another family or other sizes.

    Args:
        config: of the model that is to be pruned.
        plan: the plan.

    Raises:
        MismatchError: naming both.
    """
    fits = config.model_type == plan.model_type
    if fits:
        values = config_values(plan.teacher["config"])
        del values["model_type"]
        fits = architecture_digest(type(config)(**values)) == architecture_digest(config)
    if not fits:
        made_for = plan.teacher["name_or_path"] or "in memory"
        raise MismatchError(
            f"The plan was made for a {plan.model_type} model of other sizes ({made_for}) than "
            f"{config.name_or_path or 'this model'} ({config.model_type}). Give that teacher, or plan again."
        )


def student_tensor(
    tensor: torch.Tensor, name: str, spec: ArchSpec, config: PretrainedConfig, plan: PruningPlan
) -> torch.Tensor:
    """Cut a tensor of the teacher to its kept units, merged and scaled where the plan says so.

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
        # A unit without a partner is its own partner, and stays unchanged: 2x - x is exact.
        partner = cut_tensor(whole, dimensions, spec.axis, sizes, plan.partners_in(layer))
        wide = torch.promote_types(tensor.dtype, torch.float32)
        tensor = narrowed(tensor.to(wide) * 2 - partner.to(wide), tensor.dtype, name)
    factor = plan.scales.get(pattern)
    if factor is None:
        return tensor
    offset = spec.norm_offset if pattern in spec.residual_norms else 0.0
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return narrowed((exact + offset) * factor - offset, tensor.dtype, name)


def kept_positions(
    shape: tuple[int, ...], name: str, spec: ArchSpec, config: PretrainedConfig, plan: PruningPlan
) -> torch.Tensor:
    """Where the values of a student's tensor are in the teacher's: flat indices, int64, in the student's shape.

    Args:
        shape: of the teacher's tensor.
        name: its name.
        spec: the family's table.
        config: the teacher's.
        plan: the plan.
    """
    pattern, layer = spec.locate(name) or (name, None)
    positions = torch.arange(math.prod(shape)).view(shape)
    dimensions = spec.dimensions.get(pattern, ())
    return cut_tensor(positions, dimensions, spec.axis, spec.sizes(config, layer), plan.kept_in(layer))


def cut_tensor(
    tensor: torch.Tensor,
    dimensions: tuple[Dimension, ...],
    axes: Mapping[str, Axis],
    sizes: Mapping[str, int],
    kept: Mapping[str, np.ndarray],
) -> torch.Tensor:
    """Cut a tensor to its kept units.

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
