"""Finds what a layer does with the outputs of its projections, by changing them on a few tokens."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..families import spec_for
from ..models import evaluating
from ..scoring.hooks import first_input, with_first_input
from ..weights import probe_ids
from .repair_gaps import Projection, linear_factor, stream_noise, stream_output, stream_writers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Writer:
    """A projection whose output a layer adds to the residual stream.

    Attributes:
        projection: the projection.
        factor: what its output is multiplied by.
        is_last: whether nothing else that the layer computes depends on it, so that a change of its output changes the
            layer's by `factor` times as much.
    """

    projection: Projection
    factor: float
    is_last: bool = False


@dataclass
class _LayerProbe:
    """One layer, which runs once as it is and then with changes.

    Attributes:
        layer: the module.
        projections: name in the layer → projection.
        calls: names of the projections in the order of the first run's calls, and shapes of their outputs.
        outputs: name of a child → what it returned in the first run, call by call.
        is_done: whether the first run is over.
        changed: path of the projection whose output is changed now.
        noise: what is added to it.
        is_frozen: whether children that are called after the change return what they returned at first.
        begun: whether the change was made in this run.
        counts: name of a child → how often it was called in this run.
    """

    layer: nn.Module
    projections: dict[str, Projection]
    calls: list[tuple[str, torch.Size]] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    is_done: bool = False
    changed: str | None = None
    noise: Tensor | None = None
    is_frozen: bool = False
    begun: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def on_child(self, name: str) -> Any:
        """A hook that records what a child returns, or repeats it after the change."""

        def hook(_: Any, __: Any, output: Any) -> Any:
            if not self.is_done:
                self.outputs.setdefault(name, []).append(output)
                return output
            index = self.counts.get(name, 0)
            self.counts[name] = index + 1
            own = (self.changed or "").partition(".")[0]
            return self.outputs[name][index] if self.is_frozen and self.begun and name != own else output

        return hook

    def on_projection(self, inner: str) -> Any:
        """A hook that records the call of a projection, or changes its output."""

        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            if not self.is_done:
                self.calls.append((inner, output.shape))
            elif inner == self.changed:
                self.begun = True
                assert self.noise is not None
                return output + self.noise.view(output.shape)
            return output

        return hook

    def run(self, args: Any, kwargs: Any, *, changed: str | None, noise: Tensor | None, is_frozen: bool) -> Tensor:
        """The layer's output with a change; with none, all children return what they returned at first."""
        self.changed, self.noise, self.is_frozen = changed, noise, is_frozen
        self.begun, self.counts = changed is None, {}
        return stream_output(self.layer(*args, **kwargs))


@torch.no_grad()
def layer_writers(model: PreTrainedModel, layers: list[int]) -> dict[int, list[Writer]]:
    """The projections of some layers that add to the residual stream, in the order in which they are called.

    A layer is left out whose input does not go through unchanged beside its children, and so is a projection that is
    called more than once, or whose output is normalised or weighted before it is added.

    Args:
        model: any model of a supported family, with its weights in memory.
        layers: indices of layers.

    Returns:
        Index of a layer → its projections, maybe none.
    """
    spec, modules = spec_for(model.config), dict(model.named_modules())
    found: dict[int, list[Writer]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        for layer in layers:
            path = f"{spec.layers_path}.{layer}"
            inner = {one.path.removeprefix(f"{path}."): one for one in stream_writers(model, layer)}
            probe = _LayerProbe(modules[path], inner)
            for name in inner:
                hook = probe.on_projection(name)
                stack.callback(modules[f"{path}.{name}"].register_forward_hook(hook).remove)
            for name, child in modules[path].named_children():
                if isinstance(child, nn.Dropout | nn.Identity):  # hands on what it gets
                    continue
                stack.callback(child.register_forward_hook(probe.on_child(name)).remove)

            def on_layer(_: Any, args: Any, kwargs: Any, output: Any, layer: int = layer, probe: Any = probe) -> None:
                if not probe.is_done:
                    probe.is_done = True
                    found[layer] = _writers(probe, args, kwargs, stream_output(output))

            stack.callback(modules[path].register_forward_hook(on_layer, with_kwargs=True).remove)
        ids = probe_ids(model)
        model.base_model(input_ids=ids, use_cache=False)
    return found


def _writers(probe: _LayerProbe, args: Any, kwargs: Any, before: Tensor) -> list[Writer]:
    """What the runs of a layer with changes say of its projections."""
    noise = stream_noise(before)
    state = first_input(args, kwargs)
    if state.shape != before.shape or not probe.calls:  # several residual streams, or nothing to fit
        return []
    moved_args, moved_kwargs = with_first_input(args, kwargs, state + noise)
    moved = probe.run(moved_args, moved_kwargs, changed=None, noise=None, is_frozen=True)
    factor = linear_factor(before, moved, noise)
    if factor is None or abs(factor - 1) > 0.01:
        return []
    called = [name for name, _ in probe.calls]
    found = []
    for name, shape in probe.calls:
        if called.count(name) > 1 or shape.numel() != before.numel():
            continue
        alone = probe.run(args, kwargs, changed=name, noise=noise, is_frozen=True)
        factor = linear_factor(before, alone, noise)
        if factor is None:
            continue
        is_last = False
        if name == called[-1]:
            free = probe.run(args, kwargs, changed=name, noise=noise, is_frozen=False)
            is_last = linear_factor(before, free, noise) is not None
        found.append(Writer(probe.projections[name], factor, is_last))
    return found
