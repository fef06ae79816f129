"""The inputs of projections that a repair fits to: units that are cut, norms whose channels are cut, dropped layers.

Legend of shape suffixes: N tokens, D inputs in the teacher, K those of the student, R inputs whose residual is made up
for, G channels of the residual stream whose change in dropped layers is made up for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from ..errors import UnsupportedModelError
from ..families import ArchSpec, named_tensors, spec_for
from ..families.axes import CHANNELS, Dimension, dimension_index
from ..models import empty_model
from ..scoring.experts import DOWN_PROJECTIONS, is_stored_transposed
from ..scoring.hook_points import UnitView, holds_stacked_experts, norm_paths, stacked_axes
from ..scoring.reductions import accumulation_dtype
from ..sizes.resolve import repaired_axes
from ..weights import set_tensor, tensor_values
from .basis import norm_readers
from .masked_routing import excluded_experts
from .repair_gaps import Gap, Projection, find_gaps
from .stored_layers import read_tensor
from .surgery import student_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .plan import PruningPlan

#: The outputs of a router.
ROUTED: Dimension = (("experts",),)


@dataclass(frozen=True)
class Expert:
    """A routed expert that stays, in a layer whose experts or neurons are cut.

    Attributes:
        index: in the teacher.
        layer: index of the layer.
        width: outputs of an expert, where others are dropped, whose outputs it makes up for with its share; else 0.
        routing: context in which the router chooses among the experts that stay.
    """

    index: int
    layer: int
    width: int
    routing: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class CutInputs:
    """Inputs that some projections read together, and of which the student has fewer.

    Attributes:
        path: the module that is observed: the projection itself, or the norm before it, maybe one with a gate.
        kept_K: teacher indices of the inputs that stay.
        rest_R: teacher indices of the inputs that the student lacks; after a norm all of them, because the student's
            norm divides by another number.
        projections: that read these inputs.
        norm: the student's norm, where a norm is observed.
        gap: dropped layers that the projection makes up for, too.
        expert: whose down projection the projection is; the inputs are those of its tokens, times the router weights.
        layer: index of the layer in which they are observed; the number of layers for what comes after them.
    """

    path: str
    kept_K: Tensor
    rest_R: Tensor
    projections: tuple[Projection, ...]
    norm: nn.Module | None = None
    gap: Gap | None = None
    expert: Expert | None = None
    layer: int = 0

    @property
    def kind(self) -> str:
        """Inputs of a kind share a ridge: of experts, before dropped layers, behind norms, and all others."""
        if self.expert:
            return "experts"
        return "layers" if self.gap else "units" if self.norm is None else "norms"

    @property
    def width(self) -> int:
        """Numbers per token whose products with the student's inputs are summed, K + R + G."""
        added = self.gap.width if self.gap else self.expert.width if self.expert else 0
        return len(self.kept_K) + len(self.rest_R) + added

    @property
    def num_bytes(self) -> int:
        """Bytes of the float64 sums, 8·K·(K + R + G)."""
        return 8 * len(self.kept_K) * self.width

    def observed(self, before: Tensor, after: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """The student's inputs and what they lack, side by side: [N, K + R], in the dtype of sums over a batch.

        Args:
            before: [N, D], input of the observed module in the teacher.
            after: [N, D], its output, if it is a norm.
            gate: [N, D], its second input, if it is a norm with a gate.
        """
        kept_K, num_kept, dtype = self.kept_K.to(before.device), len(self.kept_K), accumulation_dtype(before)
        if self.norm is None:
            return before[:, torch.cat([kept_K, self.rest_R.to(before.device)])].to(dtype)
        assert after is not None
        observed = torch.empty(len(before), num_kept + len(self.rest_R), dtype=dtype, device=before.device)
        norm = self.norm.to(before.device)  # it is built on the CPU where the weights are offloaded
        gates = () if gate is None else (gate[:, kept_K],)
        observed[:, :num_kept] = norm(before[:, kept_K], *gates)
        observed[:, num_kept:] = after
        observed[:, num_kept + kept_K] -= observed[:, :num_kept]
        return observed


def cut_inputs(
    model: PreTrainedModel, plan: PruningPlan, notes: list[str] | None = None, covered: Container[int] = ()
) -> list[CutInputs]:
    """All inputs that are fitted, in the order of the layers: those that a plan cuts and that plain projections read,
    and those of the projections before dropped layers.

    Args:
        model: the teacher.
        plan: made for it.
        notes: gets a note for the plan on every run of layers that nothing makes up for.
        covered: see `find_gaps`.

    Raises:
        PlanError: if units are cut that other modules than plain projections or stacked experts read.
        UnsupportedModelError: if experts are cut whose outputs are normalised.
    """
    spec = spec_for(model.config)
    gaps = find_gaps(model, plan, notes, covered)
    found = []
    for order, cut in _cut_units(model, spec, plan):
        path = cut.projections[0].path
        found.append((order, replace(cut, gap=gaps.pop(path)[2]) if path in gaps else cut))
    for path, (layer, projection, gap) in gaps.items():  # nothing is cut that these projections read
        whole_D = torch.arange(tensor_values(model, f"{path}.weight").shape[projection.position])
        found.append(((layer, path), CutInputs(path, whole_D, whole_D[:0], (projection,), gap=gap)))
    found += _cut_experts(model, spec, plan)
    if plan.repair == "least_squares_all":
        found += _cut_channels(model, spec, plan)
    return [replace(one, layer=layer) for (layer, _), one in sorted(found, key=lambda item: item[0])]


def _cut_units(
    model: PreTrainedModel, spec: ArchSpec, plan: PruningPlan
) -> Iterator[tuple[tuple[int, str], CutInputs]]:
    """Every projection that reads neurons, heads or other units which are cut.

    Where a norm with a gate is before it, whose mean squares the cut changes, what the student's norm gives is fitted.
    """
    before, after = ({axis: sizes[whose] for axis, sizes in plan.sizes.items()} for whose in ("teacher", "student"))
    names, modules, seen = list(named_tensors(model, tied=True)), dict(model.named_modules()), set()
    student = empty_model(plan.build_student_config(model.config)) if spec.gated_norms else None
    axes = repaired_axes(spec, before, after)
    for axis, module in (*spec.hook_points.items(), *spec.readers):
        if axis not in axes or holds_stacked_experts(spec, module):
            continue
        for layer in set(spec.layers_with(axis, names)) & set(plan.layers_kept):
            path = spec.layer_parameter(layer, module)
            sizes = spec.sizes(model.config, layer)
            position = UnitView(spec, axis, module, sizes).position
            located = spec.locate(f"{path}.weight")
            assert located is not None
            kept = dimension_index(spec.dimensions[located[0]][position], sizes, plan.kept_in(layer))
            num_inputs = tensor_values(model, f"{path}.weight").shape[position]
            if kept is None or len(kept) == num_inputs or path in seen:
                continue
            seen.add(path)
            is_cut_D = torch.ones(num_inputs, dtype=torch.bool)
            is_cut_D[kept_K := torch.from_numpy(kept)] = False
            rest_R, own = is_cut_D.nonzero().flatten(), (Projection(path, position),)
            before_it = spec.layer_parameter(layer, _gated_norm(spec, module, spec.dimensions[located[0]][position]))
            if before_it in modules:
                norm = _student_norm(model, student, spec, plan, before_it, layer)
                yield (layer, path), CutInputs(before_it, kept_K, torch.arange(num_inputs), own, norm)
            else:
                yield (layer, path), CutInputs(path, kept_K, rest_R, own)


def _cut_experts(
    model: PreTrainedModel, spec: ArchSpec, plan: PruningPlan
) -> Iterator[tuple[tuple[int, str], CutInputs]]:
    """Every kept expert of the layers in which experts or their neurons are cut."""
    names = list(named_tensors(model, tied=True))
    for module, layer in ((name, layer) for name in stacked_axes(spec) for layer in plan.layers_kept):
        path, kept, sizes = spec.layer_parameter(layer, module), plan.kept_in(layer), spec.sizes(model.config, layer)
        experts, neurons = kept.get("experts"), kept.get("moe_ffn")
        if f"{path}.{DOWN_PROJECTIONS}" not in names or (experts is None and neurons is None):
            continue
        if hasattr(model.get_submodule(path), "post_expert_norm"):
            raise UnsupportedModelError(f"{path} normalises the outputs of experts. Prune without repair.")
        position = 0 if is_stored_transposed(spec, module) else 1
        width = tensor_values(model, f"{path}.{DOWN_PROJECTIONS}").shape[2 - position]
        routing = nullcontext if experts is None else partial(excluded_experts, model, plan, layer)
        for row, index in enumerate(range(sizes["experts"]) if experts is None else experts.tolist()):
            is_kept_F = torch.full((sizes["moe_ffn"],), neurons is None)
            is_kept_F[[] if neurons is None else torch.from_numpy(neurons[row])] = True
            kept_K, rest_R = is_kept_F.nonzero().flatten(), (~is_kept_F).nonzero().flatten()
            own = (Projection(path, position, index, DOWN_PROJECTIONS),)
            expert = Expert(index, layer, 0 if experts is None else width, routing)
            yield (layer, f"{path}.{index:04}"), CutInputs(f"{path}.{index}", kept_K, rest_R, own, expert=expert)


def _gated_norm(spec: ArchSpec, module: str, inputs: Dimension) -> str:
    """The norm with a gate whose output is the input of a projection in a layer; empty for none."""
    parent = module.rpartition(".")[0]
    names = [norm for norm in spec.gated_norms if norm.rpartition(".")[0] == parent]
    return next((norm for norm in names if spec.dimensions[f"{norm}.weight"][0] == inputs), "")


def _cut_channels(
    model: PreTrainedModel, spec: ArchSpec, plan: PruningPlan
) -> Iterator[tuple[tuple[int, str], CutInputs]]:
    """Every norm over channels of which some are cut, with the projections that read its output.

    Other readers (tied heads, what reads the stream without a norm) keep the teacher's weights of the channels that
    stay.
    """
    kept = plan.kept.get("hidden")
    if kept is None:
        return
    kept_K, modules = torch.from_numpy(kept), dict(model.named_modules())
    norms = {
        path: layer
        for path, layer in norm_paths(spec, modules, plan.sizes["layers"]["teacher"])
        if layer is None or layer in plan.layers_kept
    }
    student = empty_model(plan.build_student_config(model.config))
    for path, projections in _readers(model, plan, list(norms)).items():
        layer, sizes = norms[path], {axis: plan.sizes[axis]["teacher"] for axis in ("layers", "hidden")}
        norm = _student_norm(model, student, spec, plan, path, layer)
        position = sizes["layers"] if layer is None else layer
        yield (position, path), CutInputs(path, kept_K, torch.arange(sizes["hidden"]), projections, norm)


def _readers(model: PreTrainedModel, plan: PruningPlan, norms: list[str]) -> dict[str, tuple[Projection, ...]]:
    """Norm → the projections whose input is its output, in the order in which they are called."""
    projections: dict[str, list[Projection]] = {}
    for one in channel_projections(model, plan.layers_kept, plan.scales):
        kept = () if one.expert is None else plan.kept_in(_layer_of(model, one)).get("experts", (one.expert,))
        if one.expert is None or one.expert in kept:
            projections.setdefault(one.path, []).append(one)
    found: dict[str, list[Projection]] = {}
    for path, norm in norm_readers(model, norms).items():
        found.setdefault(norm, []).extend(projections.get(path, ()))
    return {norm: tuple(readers) for norm, readers in found.items() if readers}


def _layer_of(model: PreTrainedModel, projection: Projection) -> int:
    located = spec_for(model.config).locate(projection.name)
    assert located is not None
    assert located[1] is not None
    return located[1]


def channel_projections(
    model: PreTrainedModel, layers_kept: Container[int], scaled: Container[str] = ()
) -> Iterator[Projection]:
    """Plain projections, routers and stacked experts of the kept layers, and an untied head, that read the channels.

    An expert is fitted to all tokens, not to those that it is given.

    Args:
        model: the teacher; its weights need no values.
        layers_kept: indices of the layers that stay.
        scaled: patterns of weights that the plan scales, which are left out.
    """
    spec, own = spec_for(model.config), named_tensors(model)
    for path, module in model.named_modules():
        for tensor, _ in module.named_parameters(recurse=False):
            name = f"{path}.{tensor}"
            located = spec.locate(name)
            if located is None or name not in own:
                continue
            pattern, layer = located
            position = _input_position(module, tensor, spec.dimensions[pattern])
            if position is None or (layer is not None and layer not in layers_kept) or pattern in scaled:
                continue
            if own[name].ndim == 2:
                yield Projection(path, position)
            else:
                yield from (Projection(path, position, expert, tensor) for expert in range(len(own[name])))


def _input_position(module: nn.Module, tensor: str, dimensions: Sequence[Dimension]) -> int | None:
    """The dimension of a weight, or of one expert's, that holds the channels it reads; None if it reads others."""
    if len(dimensions) == 3:  # stacked experts
        positions = [at for at, dimension in enumerate(dimensions[1:]) if dimension == CHANNELS]
        return positions[0] if positions and tensor != DOWN_PROJECTIONS else None
    if tensor != "weight" or len(dimensions) != 2:
        return None
    position = 0 if isinstance(module, Conv1D) else 1
    is_router = dimensions[0] == ROUTED
    if not (isinstance(module, nn.Linear | Conv1D) or is_router) or dimensions[position] != CHANNELS:
        return None
    return position


def _student_norm(
    model: PreTrainedModel, student: Any, spec: ArchSpec, plan: PruningPlan, path: str, layer: int | None
) -> nn.Module:
    """The norm of the student that takes the place of one of the teacher's, with its weights where it has any.

    Args:
        model: the teacher.
        student: a model of the student's config, without values.
        spec: the family's table.
        plan: the plan.
        path: of the teacher's norm.
        layer: index of its layer; None outside the layers.
    """
    name = path
    if layer is not None:
        relative = path.removeprefix(spec.layer_parameter(layer, ""))
        name = spec.layer_parameter(plan.layers_kept.index(layer), relative)
    norm: nn.Module = copy.deepcopy(student.get_submodule(name))
    for part, parameter in list(norm.named_parameters()):
        values = read_tensor(model, f"{path}.{part}")
        values = student_tensor(values, f"{path}.{part}", spec, model.config, plan)
        assert parameter.shape == values.shape
        set_tensor(norm, part, values.clone())
    return norm.eval()
