"""First-order Taylor scores: the change of the loss without a unit, from a forward and a backward pass.

Removing what a unit writes changes the loss by −Σ x·∂L/∂x over its activations x, to first order. Where x is the input
of a projection that is Σ w·∂L/∂w over the weights that read it, the Taylor importance of P1 (arXiv 2407.14679 §2.2 and
its reference Molchanov et al., arXiv 1906.10771); here it is read off activations, so that no gradient of a weight is
ever formed: what is held are the activations of one batch.

Legend of shape suffixes: B rows of a batch, T tokens of a row, U units of an axis, H hidden, V vocabulary, L layers,
D the units and inner dimensions that a projection reads, n tokens routed to one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..families import ArchSpec
from ..families.tensors import named_tensors
from .batches import Batches, state_of, token_losses
from .experts import Observer, Routed, observed_experts, stored_transposed
from .observers import Tap, first_input
from .reductions import Reduction, reduce_rows, row_terms, wide


class TaylorPass(Batches):
    """Accumulators of one pass, in float64, and the hooks that feed them. Used like `ScoringPass`.

    Per row of a batch, the terms x·∂L/∂x of a unit are summed over its tokens, where L is the row's mean loss; for a
    channel over all norms too, because it is removed everywhere. Then the rows are reduced.
    """

    def __init__(self, spec: ArchSpec, model: PreTrainedModel) -> None:
        super().__init__(spec, model)
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
        logits_BTV = self.model(**self.inputs(batch), use_cache=False).logits
        losses_BT, predicted_BT = token_losses(logits_BTV, batch["input_ids"], self.attended_BT, self.mask_BT)
        (losses_BT.sum(1) / predicted_BT.sum(1).clamp(min=1)).sum().backward()
        if missing := sorted({f"{axis} of layer {layer}" for axis, layer in self.sums.keys() - self.terms.keys()}):
            raise UnsupportedModelError(
                f"The backward pass of this {type(self.model).__name__} never came to {', '.join(missing[:4])}. "
                "Load it with another attention or kernel implementation, or use another metric than 'taylor'."
            )
        counted = self.mask_BT.any(1).cpu()
        for key, terms_BU in self.terms.items():
            self.sums[key] += row_terms(terms_BU.cpu()[counted])
        self.block_sums += row_terms(self.block_terms.flatten(1)[counted])
        self.terms.clear()
        self.states.clear()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe taps, norms and layers for the duration of the context, in which no weight gets a gradient."""
        spec, model = self.spec, self.model
        names = list(named_tensors(model, tied=True))
        modules = dict(model.named_modules(remove_duplicate=False))
        depth = self.sizes["layers"]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UnsupportedModelError(
                "metric='taylor' needs all weights in memory, and some of them are offloaded. Load the model onto a "
                "device, or use another metric."
            )
        with ExitStack() as stack, torch.enable_grad():
            for parameter in trained:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)

            def before(path: str, observe: Callable[[Tensor], None]) -> None:
                hook = modules[path].register_forward_pre_hook(
                    lambda _, args, kwargs: observe(first_input(args, kwargs)), with_kwargs=True
                )
                stack.callback(hook.remove)

            def after(module: nn.Module, observe: Callable[[Tensor], None]) -> None:
                hook = module.register_forward_hook(
                    lambda _, __, output: observe(output[0] if isinstance(output, tuple) else output)
                )
                stack.callback(hook.remove)

            after(model.get_input_embeddings(), _begin_graph)
            stacked: dict[str, list[str]] = {}
            for axis, module in spec.hook_points.items():
                if f"{module}.weight" not in spec.dimensions:
                    stacked.setdefault(module, []).append(axis)
                for layer in spec.layers_with(axis, names):
                    self._expect(axis, layer)
                    if f"{module}.weight" in spec.dimensions:
                        before(spec.layer_parameter(layer, module), self._unit_observer(axis, module, layer))
            for module, axes in stacked.items():
                observers = {
                    modules[spec.layer_parameter(layer, module)]: self._expert_observer(axes, layer)
                    for layer in spec.layers_with(axes[0], names)
                }
                transposed = stored_transposed(spec, module)
                stack.enter_context(observed_experts(observers, transposed, differentiable=True))
            self._expect("hidden", 0)
            norms = [spec.layer_parameter(layer, name) for layer in range(depth) for name in spec.layer_norms]
            for path in (*(path for path in norms if path in modules), spec.final_norm):
                after(modules[path], self._channel_observer)
            for layer in range(depth):
                before(f"{spec.layers_path}.{layer}", self._state_observer)
            after(modules[f"{spec.layers_path}.{depth - 1}"], self._state_observer)
            yield

    def _expect(self, axis: str, layer: int) -> None:
        units = self.spec.own_units(axis, self.layer_sizes[layer] if self.spec.axis[axis].per_layer else self.sizes)
        self.sums[axis, layer] = torch.zeros(3, math.prod(units), dtype=torch.float64)

    def _note(self, axis: str, layer: int, terms_BU: Tensor, start: int = 0) -> None:
        key = axis, layer
        if key not in self.terms:
            self.terms[key] = terms_BU.new_zeros(len(self.mask_BT), self.sums[key].shape[1])
        self.terms[key][:, start : start + terms_BU.shape[1]] += terms_BU.to(self.terms[key].device)

    def _over_tokens(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Σ over the tokens of every row of x·∂L/∂x → [B, D]."""
        terms_BTD = (x.detach().to(wide(x)) * gradient.to(wide(x))).reshape(*self.mask_BT.shape, -1)
        return terms_BTD.masked_fill(~self.mask_BT.to(x.device)[..., None], 0).sum(1)

    def _unit_observer(self, axis: str, module: str, layer: int) -> Callable[[Tensor], None]:
        tap = Tap(self.spec, axis, module, self.layer_sizes[layer])

        def observe(x: Tensor) -> None:
            x.register_hook(lambda g: self._note(axis, layer, tap.split(self._over_tokens(x, g)).sum(-1)))

        return observe

    def _channel_observer(self, x: Tensor) -> None:
        x.register_hook(lambda g: self._note("hidden", 0, self._over_tokens(x, g)))

    def _expert_observer(self, axes: list[str], layer: int) -> Observer:
        def observe(expert: int, routed: Routed) -> None:
            row_n = routed.token_n // self.mask_BT.shape[1]
            seen_n = self.mask_BT.flatten().to(row_n.device)[routed.token_n]

            def watch(axis: str, x_nD: Tensor, whole: bool) -> None:
                def note(gradient: Tensor) -> None:
                    terms_nD = x_nD.detach().to(wide(x_nD)) * gradient.to(wide(x_nD))
                    terms_nD = terms_nD.masked_fill(~seen_n[:, None], 0)
                    terms_nU = terms_nD.sum(-1, keepdim=True) if whole else terms_nD
                    terms_BU = terms_nU.new_zeros(len(self.mask_BT), terms_nU.shape[1])
                    terms_BU.index_add_(0, row_n, terms_nU)
                    self._note(axis, layer, terms_BU, expert * terms_nU.shape[1])

                x_nD.register_hook(note)

            for axis in axes:
                if self.spec.axis[axis].within is None:
                    watch(axis, routed.output_nH, whole=True)
                else:
                    watch(axis, routed.inner_nF, whole=False)

        return observe

    def _state_observer(self, x_BTH: Tensor) -> None:
        """Inputs of all layers and the last output: a block i..j is replaced by nothing if h_j+1 becomes h_i."""
        position = len(self.states)
        self.states.append(x_BTH)
        if position:
            x_BTH.register_hook(lambda g: self._note_blocks(position, g))

    def _note_blocks(self, position: int, gradient: Tensor) -> None:
        for first in range(position):
            written = self.states[position].detach() - self.states[first].detach().to(gradient.device)
            terms_B = self._over_tokens(state_of(self.spec, written), state_of(self.spec, gradient)).sum(-1)
            self.block_terms[:, first, position - 1] = terms_B.double().cpu()

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and put the rows back in their order."""
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
        """First-order change of the loss without layers i..j, float32 [L, L]; NaN below the diagonal."""
        depth = self.sizes["layers"]
        blocks = reduce_rows(self.block_sums, self.num_rows, batch_reduction).float().reshape(depth, depth)
        return blocks.masked_fill(torch.ones_like(blocks, dtype=torch.bool).tril(-1), torch.nan)


def _begin_graph(embedded_BTH: Tensor) -> None:
    embedded_BTH.requires_grad_()
