"""Finds the projections that can make up for dropped layers: the last ones that write to the stream before them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from ..families import ArchSpec, named_tensors, spec_for
from ..families.axes import CHANNELS
from ..models import evaluating
from ..weights import probe_ids
from .stored_layers import computing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .plan import PruningPlan

#: Largest relative error of a layer's output, where a projection writes to it linearly: the rounding of bfloat16.
LINEAR = 0.03


@dataclass(frozen=True)
class Projection:
    """A projection that is refitted.

    Attributes:
        path: of the module.
        position: the dimension of its weight that holds its inputs.
        expert: index of the expert whose projection it is, in a module of stacked experts.
        tensor: name in the module of the tensor that holds the weight, or those of all experts.
    """

    path: str
    position: int
    expert: int | None = None
    tensor: str = "weight"

    @property
    def name(self) -> str:
        """Name of the tensor in the model."""
        return f"{self.path}.{self.tensor}"

    def own(self, tensor: Tensor) -> Tensor:
        """The weight in that tensor, as a view."""
        return tensor if self.expert is None else tensor[self.expert]


@dataclass(frozen=True)
class Gap:
    """Consecutive dropped layers, whose change of the residual stream a projection before them takes over.

    Attributes:
        first: index of the first of them.
        last: index of the last.
        factor: what the layer before them multiplies the output of the projection by.
        width: channels of the residual stream.
    """

    first: int
    last: int
    factor: float
    width: int


def dropped_runs(plan: PruningPlan) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive dropped layers."""
    dropped = set(plan.layers_dropped)
    for first in sorted(dropped):
        if first - 1 not in dropped:
            last = first
            while last + 1 in dropped:
                last += 1
            yield first, last


def stream_writers(model: PreTrainedModel, layer: int) -> list[Projection]:
    """Plain projections of a layer whose outputs are the channels, in the order in which the layer defines them.

    Args:
        model: any model of the family; its weights need no values.
        layer: index of the layer.
    """
    spec, own = spec_for(model.config), named_tensors(model)
    found = []
    path = f"{spec.layers_path}.{layer}"
    for inner, module in model.get_submodule(path).named_modules():
        name = f"{path}.{inner}"
        located = spec.locate(f"{name}.weight")
        if located is None or not isinstance(module, nn.Linear | Conv1D) or f"{name}.weight" not in own:
            continue
        position = 0 if isinstance(module, Conv1D) else 1
        if spec.dimensions[located[0]][1 - position] == CHANNELS:
            found.append(Projection(name, position))
    return found


@torch.no_grad()
def find_gaps(
    model: PreTrainedModel, plan: PruningPlan, notes: list[str] | None = None, covered: Container[int] = ()
) -> dict[str, tuple[int, Projection, Gap]]:
    """The projections that make up for the dropped layers of a plan.

    It is the last projection of the layer before that the forward pass calls. What the layer does with its output is
    tried on a few tokens: runs of layers are left out where it normalises the output, or where there is no layer
    before them.

    Args:
        model: the teacher.
        plan: made for it.
        notes: gets a note for the plan on every run of layers that nothing makes up for.
        covered: first layers of the runs that another repair makes up for.

    Returns:
        Path of the projection → index of its layer, projection and gap.
    """
    spec = spec_for(model.config)
    runs = {first - 1: (first, last) for first, last in dropped_runs(plan)}
    notes = [] if notes is None else notes

    def note(first: int, last: int, why: str) -> None:
        if first not in covered:
            layers = f"layer {first}" if first == last else f"layers {first} to {last}"
            notes.append(f"Repair: nothing makes up for {layers}: {why}")

    if -1 in runs:
        note(*runs.pop(-1), "no layer that stays is before them.")
    if spec.stream.stacked_states:
        for run in runs.values():
            note(*run, "this family has several residual streams.")
        return {}
    if not runs:
        return {}
    tried = _linear_writers(model, spec, list(runs))
    found = {}
    for layer, (first, last) in runs.items():
        if layer not in tried:
            note(first, last, "the layer before changes what its last projection writes.")
            continue
        projection, factor = tried[layer]
        found[projection.path] = layer, projection, Gap(first, last, factor, spec.sizes(model.config)["hidden"])
    return found


def _linear_writers(model: PreTrainedModel, spec: ArchSpec, layers: list[int]) -> dict[int, tuple[Projection, float]]:
    """Layer → its last projection and the factor on that one's output, where it goes to the residual stream linearly.

    Each layer runs twice: a change of the projection's output by noise has to change the layer's by a multiple of it.
    """
    found: dict[int, tuple[Projection, float]] = {}
    called: list[tuple[Projection, torch.Size]] = []
    change: dict[str, Tensor] = {}

    def on_projection(projection: Projection) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            called.append((projection, output.shape))
            return output + change[projection.path] if projection.path in change else output

        return hook

    def on_layer(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if change or not called:  # this is the second run
                return
            (last, shape), before = called[-1], stream_output(output)
            if before.shape != shape:  # several residual streams
                called.clear()
                return
            change[last.path] = noise = stream_noise(before)
            try:
                after = stream_output(module(*args, **kwargs))
            finally:
                change.clear()
                called.clear()
            factor = linear_factor(before, after, noise)
            if factor is not None:
                found[layer] = last, factor

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        stack.enter_context(computing(model))
        for layer in layers:
            for projection in stream_writers(model, layer):
                stack.callback(modules[projection.path].register_forward_hook(on_projection(projection)).remove)
            handle = modules[f"{spec.layers_path}.{layer}"].register_forward_hook(on_layer(layer), with_kwargs=True)
            stack.callback(handle.remove)
        ids = probe_ids(model)
        model.base_model(input_ids=ids, use_cache=False)
    return found


def stream_noise(state: Tensor) -> Tensor:
    """A change of the residual stream about as large as it is itself, the same for the same state."""
    signs = torch.rand(state.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    return (state.abs() + state.abs().mean()) * signs.to(state)


def linear_factor(before: Tensor, after: Tensor, noise: Tensor) -> float | None:
    """What a layer multiplied a change by that it handed on; None where it did something else with it.

    Args:
        before: the layer's output without the change.
        after: with it.
        noise: the change.
    """
    difference, noise = after.cpu().double() - before.cpu().double(), noise.cpu().double()
    factor = float((difference * noise).sum() / noise.square().sum())
    error = (difference - factor * noise).norm() / noise.norm()
    return factor if factor and bool(error <= LINEAR * abs(factor)) else None


def stream_output(output: Any) -> Tensor:
    """The residual stream in what a layer returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
