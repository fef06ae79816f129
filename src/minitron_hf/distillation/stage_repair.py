"""The inputs that a repair fits to, from configs alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..families import named_tensors, spec_for
from ..families.axes import dimension_size
from ..models import empty_model
from ..pruning.repair_gaps import Gap, Projection, stream_writers
from ..pruning.repair_inputs import CutInputs, Expert, channel_projections
from ..scoring.experts import DOWN_PROJECTIONS, is_stored_transposed
from ..scoring.hook_points import UnitView, holds_stacked_experts, norm_paths

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def expected_cut_inputs(
    teacher: PretrainedConfig, student: PretrainedConfig, repair: str, num_gaps: int = 1
) -> list[CutInputs]:
    """The inputs that a repair will fit, in the order of the layers, from configs alone.

    The layers that stay are taken to be the first ones, the last of which precede dropped ones; their last projection
    in the order of the modules to make up for these. Of the projections that read the channels, all are taken to read
    a norm.

    Args:
        teacher: its config.
        student: its config.
        repair: as in `PrunerConfig`.
        num_gaps: runs of consecutive dropped layers, at most.
    """
    spec = spec_for(teacher)
    names = list(named_tensors(empty_model(student), tied=True))
    found: dict[str, tuple[int, CutInputs]] = {}
    for axis, module in spec.hook_points.items():
        if holds_stacked_experts(spec, module):
            found |= dict(_cut_experts(teacher, student, module))
            continue
        for layer in spec.layers_with(axis, names):
            before, after = spec.sizes(teacher, layer), spec.sizes(student, layer)
            position = UnitView(spec, axis, module, before).position
            dimension = spec.dimensions[f"{module}.weight"][position]
            inputs, kept = dimension_size(dimension, before), dimension_size(dimension, after)
            path = spec.layer_parameter(layer, module)
            if kept < inputs:
                own = (Projection(path, position),)
                found[path] = layer, CutInputs(path, torch.arange(kept), torch.arange(kept, inputs), own)
    for layer, projection, inputs in _before_gaps(teacher, student, num_gaps):
        whole = CutInputs(projection.path, torch.arange(inputs), torch.arange(0), (projection,))
        _, cut = found.get(projection.path, (layer, whole))
        is_last = layer + 1 == _num_layers(student)
        last = _num_layers(teacher) - 1 if is_last else layer + 1
        gap = Gap(layer + 1, last, 1.0, spec.sizes(teacher)["hidden"])
        found[projection.path] = layer, replace(cut, gap=gap)
    channels = _cut_norms(teacher, student) if repair == "least_squares_all" else ()
    ordered = sorted([*found.values(), *channels], key=lambda item: (item[0], item[1].path))
    return [replace(cut, layer=layer) for layer, cut in ordered]


def expected_writers(student: PretrainedConfig) -> list[CutInputs]:
    """The projections that a sequential repair refits at most, each as inputs of which none is cut."""
    spec, model = spec_for(student), empty_model(student)
    tensors, width = named_tensors(model), spec.sizes(student)["hidden"]
    if spec.stream.stacked_states:
        return []
    found = []
    for layer in range(_num_layers(student)):
        for projection in stream_writers(model, layer):
            whole = torch.arange(tensors[projection.name].shape[projection.position])
            gap = Gap(layer, layer, 1.0, width)
            found.append(CutInputs(projection.path, whole, whole[:0], (projection,), gap=gap, layer=layer))
    return found


def not_sequential(cuts: Sequence[CutInputs], writers: Sequence[CutInputs]) -> list[CutInputs]:
    """The inputs that a sequential repair leaves to least squares: those of other projections than its writers."""
    paths = {cut.path for cut in writers}
    return [cut for cut in cuts if cut.path not in paths]


def _cut_experts(
    teacher: PretrainedConfig, student: PretrainedConfig, module: str
) -> Iterator[tuple[str, tuple[int, CutInputs]]]:
    """The experts of the student, where there are fewer of them or of their neurons, by the names of their inputs."""
    spec, theirs = spec_for(teacher), named_tensors(empty_model(teacher))
    position = 0 if is_stored_transposed(spec, module) else 1
    for layer in range(_num_layers(student)):
        before, after = spec.sizes(teacher, layer), spec.sizes(student, layer)
        path = spec.layer_parameter(layer, module)
        name, num_kept, num_neurons = f"{path}.{DOWN_PROJECTIONS}", after["moe_ffn"], before["moe_ffn"]
        if name not in theirs or (before["experts"], num_neurons) == (after["experts"], num_kept):
            continue
        width = theirs[name].shape[2 - position] if after["experts"] < before["experts"] else 0
        for index in range(after["experts"]):
            units, own = torch.arange(num_neurons), (Projection(path, position, index, DOWN_PROJECTIONS),)
            expert, key = Expert(index, layer, width, nullcontext), f"{path}.{index}"
            yield key, (layer, CutInputs(key, units[:num_kept], units[num_kept:], own, expert=expert))


def _before_gaps(
    teacher: PretrainedConfig, student: PretrainedConfig, num_gaps: int
) -> Iterator[tuple[int, Projection, int]]:
    """The projections before dropped layers, with their layers and the number of their inputs."""
    model, depth = empty_model(teacher), _num_layers(student)
    tensors, num_gaps = named_tensors(model), min(num_gaps, _num_layers(teacher) - depth)
    if spec_for(teacher).stream.stacked_states:
        return
    for layer in range(max(0, depth - num_gaps), depth):
        for projection in stream_writers(model, layer)[-1:]:
            yield layer, projection, tensors[f"{projection.path}.weight"].shape[projection.position]


def _cut_norms(teacher: PretrainedConfig, student: PretrainedConfig) -> Iterator[tuple[int, CutInputs]]:
    """The norms over channels that the student has fewer of, each with its share of the projections of its layer.

    With every norm comes its layer; behind the last one where it belongs to none.
    """
    spec, model = spec_for(teacher), empty_model(teacher)
    kept, width = (spec.sizes(one)["hidden"] for one in (student, teacher))
    if kept == width:
        return
    layers, depth = range(_num_layers(student)), _num_layers(teacher)
    readers: dict[int | None, list[Projection]] = {}
    for projection in channel_projections(model, layers):
        located = spec.locate(projection.name)
        readers.setdefault(located[1] if located else None, []).append(projection)
    norms: dict[int | None, list[str]] = {}
    for path, layer in norm_paths(spec, dict(model.named_modules()), depth):
        norms.setdefault(layer, []).append(path)
    for layer, paths in norms.items():
        projections = readers.get(layer, [])
        share = math.ceil(len(projections) / len(paths))
        for number, path in enumerate(paths):
            if own := tuple(projections[number * share : (number + 1) * share]):
                cut = CutInputs(path, torch.arange(kept), torch.arange(width), own)
                yield depth if layer is None else layer, cut


def num_outputs(teacher: PretrainedConfig, cut: CutInputs) -> int:
    """Outputs of the widest projection that reads some inputs."""
    theirs = named_tensors(empty_model(teacher))
    return max(theirs[one.name].shape[-2:][1 - one.position] for one in cut.projections)


def num_refitted(cuts: Sequence[CutInputs], teacher: PretrainedConfig) -> int:
    """Numbers in the weights that a repair replaces."""
    theirs = named_tensors(empty_model(teacher))
    names = {projection.name for cut in cuts for projection in cut.projections}
    return sum(theirs[name].numel() for name in names)


def layer_bytes(config: PretrainedConfig, itemsize: int) -> dict[int | None, int]:
    """Bytes of the tensors of every layer; under None those outside the layers, without an untied head."""
    spec, model = spec_for(config), empty_model(config)
    found = dict[int | None, int].fromkeys([None, *range(_num_layers(config))], 0)
    body = {name for name, _ in model.base_model.named_parameters(prefix=model.base_model_prefix)}
    for name, tensor in named_tensors(model).items():
        located = spec.locate(name)
        layer = None if located is None else located[1]
        if layer is not None or name in body:
            found[layer] += tensor.numel() * itemsize
    return found


def _num_layers(config: PretrainedConfig) -> int:
    """Layers of a model."""
    return spec_for(config).sizes(config)["layers"]
