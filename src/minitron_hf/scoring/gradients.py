"""Scores from activations and their gradients, by a forward and a backward pass: first-order Taylor and the like.

Removing what a unit writes changes the loss by −Σ x·∂L/∂x over its activations x, to first order. Where x is the input
of a projection, that is Σ w·∂L/∂w over the weights that read it, the Taylor importance of arXiv 2407.14679 §2.2.
It is read off activations, so no gradient of a weight is ever formed; memory holds the activations of one batch, and
the logits of one row.

Legend of shape suffixes: B rows of a batch, T tokens of a row, U units of an axis, H hidden, V vocabulary, L layers,
D the units and inner dimensions that a projection reads, n tokens routed to one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DataError, UnsupportedModelError
from ..families import ArchSpec
from ..families.tensors import named_tensors
from .batches import Batches, stream_states, token_losses
from .experts import Observer, RoutedActivations, is_stored_transposed, observed_experts
from .hook_points import UnitView, holds_stacked_experts, norm_paths, stacked_axes, watch_states
from .hooks import Hooks
from .logits import run_backbone
from .metrics import ImportanceMetric
from .reductions import Reduction, accumulation_dtype, reduce_rows, row_terms
from .weights import below_diagonal_nan


class GradientPass(Batches):
    """Sums of one pass for one metric, in float64, and the hooks that add to them. Used like `ActivationPass`.

    Per row of a batch, the metric's terms of a unit are summed over its tokens; for a channel over all norms too,
    because it is removed everywhere. The loss is the row's mean. Then the rows are reduced.

    Args:
        spec: the family's table.
        model: the model to observe.
        metric: a metric that reads gradients.
    """

    def __init__(self, spec: ArchSpec, model: PreTrainedModel, metric: ImportanceMetric) -> None:
        super().__init__(spec, model)
        self.metric = metric
        self.layer_sizes = spec.layer_sizes(model.config)
        # (axis, layer; 0 for hidden) → sums over rows, [3, U].
        self.sums: dict[tuple[str, int], Tensor] = {}
        # The same for the rows of this batch, [B, U].
        self.terms: dict[tuple[str, int], Tensor] = {}
        depth = self.sizes["layers"]
        self.block_sums = torch.zeros(3, depth * depth, dtype=torch.float64)
        self.block_terms = torch.zeros(0)
        self.states: list[Tensor] = []

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model forwards and backwards on one batch of `input_ids` and, where padded, `attention_mask`."""
        batch = self.begin(batch)
        self.terms.clear()
        self.states.clear()
        depth = self.sizes["layers"]
        self.block_terms = torch.zeros(len(self.mask_BT), depth, depth, dtype=torch.float64)
        self._run_backwards(batch)
        if missing := sorted({f"{axis} of layer {layer}" for axis, layer in self.sums.keys() - self.terms.keys()}):
            raise UnsupportedModelError(
                f"The backward pass of this {type(self.model).__name__} did not reach {', '.join(missing[:4])}. "
                "Load it with another attention or kernel implementation, or use a metric that reads no gradients, "
                "such as 'activation'."
            )
        counted = self.mask_BT.any(1).cpu()
        for key, terms_BU in self.terms.items():
            self.sums[key] += row_terms(terms_BU.cpu()[counted])
        self.block_sums += row_terms(self.block_terms.flatten(1)[counted])
        self.terms.clear()
        self.states.clear()

    def _run_backwards(self, batch: Mapping[str, Tensor]) -> None:
        """Backward pass of the mean losses of all rows; the logits of one row exist at a time, like their gradient."""
        backbone = run_backbone(self.model, self.inputs(batch))
        states_BTH = backbone.states_BTH.detach().requires_grad_()
        for row in range(len(states_BTH)):
            own = slice(row, row + 1)
            logits_TV = backbone.logits(row, states_BTH=states_BTH)
            masks = self.attended_BT[own], self.predicted_BT[own]
            losses_1T, predicted_1T = token_losses(logits_TV[None], batch["input_ids"][own], *masks)
            (losses_1T.sum() / predicted_1T.sum().clamp(min=1)).backward()
            del logits_TV, losses_1T  # before the next row's
        backbone.states_BTH.backward(states_BTH.grad)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe units, norms and layers for the duration of the context, in which no weight gets a gradient."""
        spec, model = self.spec, self.model
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UnsupportedModelError(
                f"metric={self.metric.name!r} needs all weights in memory, and some of them are offloaded. Load the "
                "model onto a device, or use another metric."
            )
        names = list(named_tensors(model, tied=True))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with Hooks(model) as hooks, torch.enable_grad():
            for parameter in trained:
                parameter.requires_grad_(False)
                hooks.callback(parameter.requires_grad_, True)
            hook = model.get_input_embeddings().register_forward_hook(lambda _, __, x_BTH: _begin_graph(x_BTH))
            hooks.callback(hook.remove)
            self._watch_units(hooks, names)
            self._watch_experts(hooks, names)
            self._expect("hidden", 0)
            for path, _ in norm_paths(spec, hooks.modules, self.sizes["layers"]):
                hooks.on_output(path, self._channel_observer)
            watch_states(spec, hooks, self.sizes["layers"], self._state_observer)
            yield

    def _watch_units(self, hooks: Hooks, names: Sequence[str]) -> None:
        """Observe the units that plain projections read."""
        for axis, module in self.spec.hook_points.items():
            if holds_stacked_experts(self.spec, module):
                continue
            for layer in self.spec.layers_with(axis, names):
                self._expect(axis, layer)
                hooks.on_input(self.spec.layer_parameter(layer, module), self._unit_observer(axis, module, layer))

    def _watch_experts(self, hooks: Hooks, names: Sequence[str]) -> None:
        """Observe stacked experts and their neurons."""
        spec = self.spec
        for module, axes in stacked_axes(spec).items():
            observers = {}
            for layer in spec.layers_with(axes[0], names):
                for axis in axes:
                    self._expect(axis, layer)
                observers[hooks.modules[spec.layer_parameter(layer, module)]] = self._expert_observer(axes, layer)
            hooks.enter_context(observed_experts(observers, is_stored_transposed(spec, module), differentiable=True))

    def _expect(self, axis: str, layer: int) -> None:
        units = self.spec.own_units(axis, self.layer_sizes[layer] if self.spec.axis[axis].per_layer else self.sizes)
        self.sums[axis, layer] = torch.zeros(3, math.prod(units), dtype=torch.float64)

    def _add(self, axis: str, layer: int, terms_BU: Tensor, start: int = 0) -> None:
        key = axis, layer
        if key not in self.terms:
            self.terms[key] = terms_BU.new_zeros(len(self.mask_BT), self.sums[key].shape[1])
        self.terms[key][:, start : start + terms_BU.shape[1]] += terms_BU.to(self.terms[key].device)

    def _term(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The metric's terms, in the shape of the activations.

        Raises:
            DataError: if the metric returns something else.
        """
        terms = self.metric.function(x.to(accumulation_dtype(x)), gradient.to(accumulation_dtype(x)))
        if not isinstance(terms, Tensor) or terms.shape != x.shape:
            found = tuple(terms.shape) if isinstance(terms, Tensor) else type(terms).__name__
            raise DataError(
                f"metric {self.metric.name!r} returned {found} for activations of shape {tuple(x.shape)}. Expected "
                "one term per element."
            )
        return terms

    def _over_tokens(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Terms summed over the tokens of every row → [B, D]."""
        terms_BTD = self._term(x, gradient).reshape(*self.mask_BT.shape, -1)
        return terms_BTD.masked_fill(~self.mask_BT.to(x.device)[..., None], 0).sum(1)

    def _unit_observer(self, axis: str, module: str, layer: int) -> Callable[[Tensor], None]:
        view = UnitView(self.spec, axis, module, self.layer_sizes[layer])

        def observe(x: Tensor) -> None:
            values = _values(x)
            x.register_hook(lambda g: self._add(axis, layer, view.split(self._over_tokens(values, g)).sum(-1)))

        return observe

    def _channel_observer(self, x: Tensor) -> None:
        values = _values(x)
        x.register_hook(lambda g: self._add("hidden", 0, self._over_tokens(values, g)))

    def _expert_observer(self, axes: list[str], layer: int) -> Observer:
        def observe(expert: int, routed: RoutedActivations) -> None:
            row_n = routed.token_n // self.mask_BT.shape[1]
            seen_n = self.mask_BT.flatten().to(row_n.device)[routed.token_n]

            def watch(axis: str, x_nD: Tensor, whole: bool) -> None:
                values_nD = _values(x_nD)

                def add(gradient: Tensor) -> None:
                    terms_nD = self._term(values_nD, gradient).masked_fill(~seen_n[:, None], 0)
                    terms_nU = terms_nD.sum(-1, keepdim=True) if whole else terms_nD
                    terms_BU = terms_nU.new_zeros(len(self.mask_BT), terms_nU.shape[1])
                    terms_BU.index_add_(0, row_n, terms_nU)
                    self._add(axis, layer, terms_BU, expert * terms_nU.shape[1])

                x_nD.register_hook(add)

            for axis in axes:
                if self.spec.axis[axis].within is None:
                    watch(axis, routed.output_nH, whole=True)
                else:
                    watch(axis, routed.inner_nF, whole=False)

        return observe

    def _state_observer(self, x_BTH: Tensor) -> None:
        """Inputs of all layers and the last output: without a block i..j, the input of j + 1 is the input of i."""
        position = len(self.states)
        self.states.append(_values(x_BTH))
        if position:
            x_BTH.register_hook(lambda g: self._add_blocks(position, g))

    def _add_blocks(self, position: int, gradient: Tensor) -> None:
        for first in range(position):
            written = self.states[position] - self.states[first].to(gradient.device)
            terms_B = self._over_tokens(stream_states(self.spec, written), stream_states(self.spec, gradient)).sum(-1)
            self.block_terms[:, first, position - 1] = terms_B.cpu().double()

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and restore the order of the rows."""
        for key, sums_3U in self.sums.items():
            self.sums[key] = self._add_up(sums_3U).cpu()
        self.block_sums = self._add_up(self.block_sums).cpu()
        super().gather()

    def axis_scores(self, batch_reduction: Reduction) -> dict[str, Tensor]:
        """Scores of every observed axis, float32 in the shape of its units; NaN where a layer has none."""
        scores: dict[str, Tensor] = {}
        for axis in {**dict.fromkeys(self.spec.hook_points), "hidden": None}:
            units = self.spec.units(axis, self.model.config)
            scores[axis] = torch.full(units, torch.nan, dtype=torch.float32)
            for (name, layer), sums in self.sums.items():
                if name == axis:
                    place = scores[axis]
                    if self.spec.axis[axis].per_layer:
                        place = place[layer][tuple(map(slice, self.spec.own_units(axis, self.layer_sizes[layer])))]
                    place.copy_(reduce_rows(sums, self.num_rows, batch_reduction).float().reshape(place.shape))
        return scores

    def block_scores(self, batch_reduction: Reduction) -> Tensor:
        """Scores of blocks of layers i..j, float32 [L, L]; NaN below the diagonal."""
        depth = self.sizes["layers"]
        blocks = reduce_rows(self.block_sums, self.num_rows, batch_reduction).float().reshape(depth, depth)
        return below_diagonal_nan(blocks)


def _values(x: Tensor) -> Tensor:
    """Values of a tensor for its own gradient hook.

    A hook that held the tensor itself would be part of a cycle through the graph, which Python never frees.
    """
    return x.detach()


def _begin_graph(embedded_BTH: Tensor) -> None:
    embedded_BTH.requires_grad_()
