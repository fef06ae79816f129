"""Observes one forward pass over calibration batches, and sums the values of activation metrics.

Legend of shape suffixes: B rows of a batch, T tokens of a row, U units of an axis, R dimensions of one unit,
H hidden, L layers, D the units and inner dimensions that a projection reads or writes, F neurons of an expert,
N tokens of a batch, n those routed to one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DataError, UnsupportedModelError
from ..families import ArchSpec, spec_for
from ..families.axes import Dimension
from ..families.tensors import named_tensors
from ..hardware import sum_dtype
from ..models import empty_model
from ..weights import tensor_values
from .batches import Batches, stream_states
from .experts import (
    Observer,
    RoutedActivations,
    expert_down_projections,
    expert_input_dimension,
    is_stored_transposed,
    observed_experts,
)
from .hook_points import (
    UnitView,
    holds_stacked_experts,
    norm_paths,
    producing_projections,
    stacked_axes,
    unit_slices,
    watch_states,
)
from .hooks import Hooks
from .metrics import ImportanceMetric, UnitActivations, find_metrics
from .reductions import Reduction, accumulation_dtype, reduce_routed, reduce_rows, reduce_sequence, row_terms
from .weights import channel_norms, unit_ranges

#: Bytes of the matrices WᵀW of units that are kept from batch to batch. For groups of heads there are as many numbers
#: in all layers as layers × width² / groups. Those that do not fit are computed again for every batch.
KEPT_GRAM_BYTES = 1 << 29


class ActivationPass(Batches):
    """Sums of one pass for several metrics, in float64, and the hooks that add to them.

    Args:
        spec: the family's table.
        model: the model to observe.
        sequence_reduction: reduction over the tokens of a row.
        metrics: names of metrics that read activations or pre-activations.
    """

    def __init__(
        self,
        spec: ArchSpec,
        model: PreTrainedModel,
        sequence_reduction: Reduction,
        metrics: Iterable[str] = ("activation",),
    ) -> None:
        super().__init__(spec, model)
        self.metrics = find_metrics(metrics)
        self.layer_sizes = spec.layer_sizes(model.config)
        self.sequence_reduction = sequence_reduction
        self.layer_inputs: list[Tensor] = []
        self.padded = False
        self.count_B = torch.zeros(0)
        # (metric, axis, source) → sums over rows, [3, U]; source is the number of a norm, or layer + layers * part.
        self.sums: dict[tuple[str, str, int], Tensor] = {}
        # The same keys, until their first value → the module that has to be called.
        self.unseen: dict[tuple[str, str, int], str] = {}
        self.down_projection_norms: dict[tuple[str, int, int], Tensor] = {}
        self.weight_ranges: dict[tuple[str, int], Tensor] = {}
        self.kept_gram_bytes = 0
        self.similarity = torch.zeros(self.sizes["layers"] + 1, self.sizes["layers"] + 1, dtype=torch.float64)

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model, without its head, on one batch of `input_ids` and, where it is padded, `attention_mask`."""
        inputs = self.inputs(self.begin(batch))
        self.padded = not bool(self.mask_BT.all())
        self.count_B = self.mask_BT.sum(1)
        self.layer_inputs.clear()
        self.model.base_model(**inputs, use_cache=False)
        if self.unseen:
            paths = list(dict.fromkeys(self.unseen.values()))
            raise UnsupportedModelError(
                f"The forward pass of this {type(self.model).__name__} did not call {', '.join(paths[:4])}, where "
                "activations are observed. Load it with another attention or kernel implementation; if it has none, "
                "please report it."
            )
        self._add_similarities()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe the modules that the family's table names, for the duration of the context."""
        names = list(named_tensors(self.model, tied=True))
        with Hooks(self.model) as hooks:
            self._watch_units(hooks, names)
            self._watch_experts(hooks, names)
            self._watch_channels(hooks)
            watch_states(
                self.spec, hooks, self.sizes["layers"], lambda x: self.layer_inputs.append(stream_states(self.spec, x))
            )
            yield

    def _watch_units(self, hooks: Hooks, names: Sequence[str]) -> None:
        """Observe the units that plain projections read. A layer without tensors of an axis has no such units."""
        spec = self.spec
        for axis, module in spec.hook_points.items():
            if holds_stacked_experts(spec, module):
                continue
            for layer in spec.layers_with(axis, names):
                path = spec.layer_parameter(layer, module)
                view = UnitView(spec, axis, module, self.layer_sizes[layer])
                read, produced = self._split_metrics(view.is_scalar and spec.axis[axis].within is None)
                if read:
                    self._expect(read, axis, layer, path)
                    hooks.on_input(path, self._unit_observer(axis, path, layer, view, read))
                if produced:
                    self._watch_producers(hooks, axis, layer, produced)

    def _watch_producers(self, hooks: Hooks, axis: str, layer: int, metrics: Sequence[ImportanceMetric]) -> None:
        """Observe neurons before their nonlinearity; gates and neurons are parts with sums of their own."""
        part = 0
        for module, dimension in producing_projections(self.spec, axis, hooks.modules, layer):
            path = self.spec.layer_parameter(layer, module)
            hooks.on_output(path, self._producer_observer(axis, dimension, layer, part, path, metrics))
            part += sum(axis in product for product in dimension)

    def _watch_experts(self, hooks: Hooks, names: Sequence[str]) -> None:
        """Observe stacked experts and their neurons."""
        spec = self.spec
        for module, axes in stacked_axes(spec).items():
            observers = {}
            for layer in spec.layers_with(axes[0], names):
                path = spec.layer_parameter(layer, module)
                for axis in axes:
                    read, _ = self._split_metrics(spec.axis[axis].within is not None)
                    self._expect(read, axis, layer, path)
                observers[hooks.modules[path]] = self._expert_observer(module, axes, layer)
            hooks.enter_context(observed_experts(observers, is_stored_transposed(spec, module)))

    def _watch_channels(self, hooks: Hooks) -> None:
        """Observe the hidden channels in the outputs of all norms."""
        for source, (path, layer) in enumerate(norm_paths(self.spec, hooks.modules, self.sizes["layers"])):
            self._expect(self.metrics, "hidden", source, path)
            hooks.on_output(path, self._channel_observer(source, layer))

    def _split_metrics(self, are_neurons: bool) -> tuple[list[ImportanceMetric], list[ImportanceMetric]]:
        """The metrics that read an axis where it is used, and those that read it before its nonlinearity."""
        produced = [metric for metric in self.metrics if are_neurons and metric.reads == "pre_activations"]
        return [metric for metric in self.metrics if metric not in produced], produced

    def _expect(self, metrics: Sequence[ImportanceMetric], axis: str, source: int, path: str) -> None:
        per_layer = self.spec.axis[axis].per_layer
        units = self.spec.own_units(
            axis, self.layer_sizes[source % len(self.layer_sizes)] if per_layer else self.sizes
        )
        for metric in metrics:
            key = metric.name, axis, source
            self.sums[key] = torch.zeros(3, math.prod(units), dtype=torch.float64)
            self.unseen[key] = path

    def _channel_observer(self, source: int, layer: int | None) -> Callable[[Tensor], None]:
        """Outputs of a norm; a channel contributes through the weights of its layer, or of the head."""
        weight_H: Tensor | None = None

        def observe(x_BTH: Tensor) -> None:
            def weigh() -> Tensor:
                nonlocal weight_H
                if weight_H is None:
                    weight_H = self._head_norms() if layer is None else channel_norms(self.spec, self.model, layer)
                weight_H = weight_H.to(x_BTH.device, accumulation_dtype(x_BTH))
                return x_BTH * weight_H

            units = UnitActivations(x_BTH[..., None], "hidden", layer, is_scalar=True, weigh=weigh)
            self._add(self.metrics, source, units)

        return observe

    def _head_norms(self) -> Tensor:
        """L2 norm of what the head holds for each hidden channel, float64 [H]."""
        head = self.model.get_output_embeddings()
        [name] = [name for name, module in self.model.named_modules() if module is head]
        weight = tensor_values(self.model, f"{name}.weight").detach()
        return weight.to(sum_dtype(weight.device)).norm(dim=0)

    def _unit_observer(
        self, axis: str, path: str, layer: int, view: UnitView, metrics: Sequence[ImportanceMetric]
    ) -> Callable[[Tensor], None]:
        """Activations at the input of a projection → one value per unit and token.

        What a unit contributes to the projection's output has the norm ‖W_u x_u‖² = x_uᵀ(W_uᵀW_u)x_u, which needs no
        [tokens, H] output per unit. For a neuron it is a multiple of its value, and keeps its sign.
        """
        kept_URR: Tensor | None = None

        def gram(x_BTD: Tensor) -> Tensor:
            nonlocal kept_URR
            if kept_URR is not None:
                return kept_URR
            weight = tensor_values(self.model, f"{path}.weight").detach()
            weight = weight.to(x_BTD.device, accumulation_dtype(x_BTD))
            gram_URR = _gram_matrices(weight if view.position == 1 else weight.T, view)
            if self.kept_gram_bytes + gram_URR.nbytes <= KEPT_GRAM_BYTES:
                self.kept_gram_bytes += gram_URR.nbytes
                kept_URR = gram_URR
            return gram_URR

        def observe(x_BTD: Tensor) -> None:
            x_BTUR = view.split(x_BTD)

            def weigh() -> Tensor:
                gram_URR = gram(x_BTD)
                if view.is_scalar:
                    return x_BTUR[..., 0] * gram_URR[:, 0, 0].sqrt()
                wide_BTUR = x_BTUR.to(gram_URR.dtype)
                squared_BTU = (torch.einsum("...ur,urs->...us", wide_BTUR, gram_URR) * wide_BTUR).sum(-1)
                return squared_BTU.clamp(min=0).sqrt()

            ranges = self._ranges_of(axis, layer)
            units = UnitActivations(x_BTUR, axis, layer, view.is_scalar, view.is_group, weigh, ranges)
            self._add(metrics, layer, units)

        return observe

    def _producer_observer(
        self, axis: str, dimension: Dimension, layer: int, part: int, path: str, metrics: Sequence[ImportanceMetric]
    ) -> Callable[[Tensor], None]:
        """Outputs of a projection that computes the units, before the nonlinearity."""
        slices = unit_slices(axis, dimension, self.layer_sizes[layer])
        sources = [layer + self.sizes["layers"] * (part + number) for number in range(len(slices))]
        for source in sources:
            self._expect(metrics, axis, source, path)

        def observe(x_BTD: Tensor) -> None:
            for source, piece in zip(sources, slices):
                self._add(metrics, source, UnitActivations(x_BTD[..., piece, None], axis, layer, is_scalar=True))

        return observe

    def _expert_observer(self, module: str, axes: Sequence[str], layer: int) -> Observer:
        """Activations of one expert for its tokens → one value per token for it and for each of its neurons.

        All values are 0 at tokens that are routed elsewhere.
        """
        spec, sizes = self.spec, self.layer_sizes[layer]
        transposed = is_stored_transposed(spec, module)
        path = spec.layer_parameter(layer, module)
        slices: dict[str, list[slice]] = {}
        for axis in axes:
            _, produced = self._split_metrics(spec.axis[axis].within is not None)
            if produced:
                slices[axis] = unit_slices(axis, expert_input_dimension(spec, module), sizes)
                for part in range(len(slices[axis])):
                    self._expect(produced, axis, layer + sizes["layers"] * part, path)

        def observe(expert: int, routed: RoutedActivations) -> None:
            def add(metrics: Sequence[ImportanceMetric], units: UnitActivations, part: int = 0) -> None:
                self._add_routed(metrics, layer + sizes["layers"] * part, units, expert, routed.token_n)

            for axis in axes:
                if spec.axis[axis].within is None:
                    ranges = self._ranges_of(axis, layer, slice(expert, expert + 1))
                    add(self.metrics, UnitActivations(routed.output_nH[:, None, :], axis, layer, ranges=ranges))
                    continue
                read, produced = self._split_metrics(are_neurons=True)
                x_nF = routed.inner_nF * routed.weight_n1

                def weigh(x_nF: Tensor = x_nF) -> Tensor:
                    return x_nF * self._down_projection_norms(path, layer, expert, transposed).to(x_nF)

                ranges = self._ranges_of(axis, layer, expert)
                add(read, UnitActivations(x_nF[..., None], axis, layer, is_scalar=True, weigh=weigh, ranges=ranges))
                for part, piece in enumerate(slices.get(axis, ())):
                    x_nF1 = (routed.before_nD[:, piece] * routed.weight_n1)[..., None]
                    add(produced, UnitActivations(x_nF1, axis, layer, is_scalar=True), part)

        return observe

    def _ranges_of(self, axis: str, layer: int, own: slice | int = slice(None)) -> Callable[[], Tensor]:
        """Computes the ranges of some units' weights, [U], once per layer."""

        def ranges() -> Tensor:
            key = axis, layer
            if key not in self.weight_ranges:
                self.weight_ranges[key] = unit_ranges(self.spec, self.model, axis, layer)
            return self.weight_ranges[key][own].flatten()

        return ranges

    def _down_projection_norms(self, path: str, layer: int, expert: int, transposed: bool) -> Tensor:
        """L2 norm of what the down projection of an expert holds for each of its neurons, [F]."""
        key = path, layer, expert
        if key not in self.down_projection_norms:
            weight = expert_down_projections(self.model, path)[expert].detach()
            dtype = accumulation_dtype(weight)
            self.down_projection_norms[key] = torch.linalg.vector_norm(weight, dim=int(transposed), dtype=dtype)
        return self.down_projection_norms[key]

    def _add(self, metrics: Sequence[ImportanceMetric], source: int, units: UnitActivations) -> None:
        mask_BT = self.mask_BT if self.padded else None
        for names, x_BTU in metric_values(metrics, units):
            x_BTU = x_BTU.reshape(*self.shape_BT, -1)  # OPT flattens rows and tokens before its MLP
            reduced_BU = reduce_sequence(x_BTU, mask_BT, self.sequence_reduction)
            self._accumulate(names, units.axis, source, reduced_BU)

    def _add_routed(
        self,
        metrics: Sequence[ImportanceMetric],
        source: int,
        units: UnitActivations,
        expert: int,
        token_n: Tensor,
    ) -> None:
        """Add the values of one expert at the tokens that are routed to it."""
        row_n = token_n // self.shape_BT[1]
        seen_n: Tensor | slice = slice(None)
        if self.padded:
            seen_n = self.mask_BT.flatten().to(token_n.device)[token_n]
        count_B = self.count_B.to(row_n.device)
        for names, x_nU in metric_values(metrics, units):
            reduced_BU = reduce_routed(x_nU[seen_n], row_n[seen_n], count_B, self.sequence_reduction)
            self._accumulate(names, units.axis, source, reduced_BU, expert * x_nU.shape[1])

    def _accumulate(self, names: Sequence[str], axis: str, source: int, reduced_BU: Tensor, start: int = 0) -> None:
        if reduced_BU.device.type == "mps":  # has no float64
            reduced_BU = reduced_BU.cpu()
        terms_3U = row_terms(reduced_BU)
        for name in names:
            key = name, axis, source
            sums_3U = self.sums[key] = self.sums[key].to(terms_3U.device)
            sums_3U[:, start : start + terms_3U.shape[1]] += terms_3U
            self.unseen.pop(key, None)

    def _add_similarities(self) -> None:
        """Add the cosines between the inputs of all layers (and the last output), summed over unmasked tokens.

        Every pair of layers is compared, so the states of a batch are held until its last layer; only a smaller batch
        holds fewer. One product compares all pairs for a few tokens at a time.
        """
        # A residual stream may be several streams side by side, [B, T, streams, H].
        states = [x_BTH.flatten(0, 1).flatten(1) for x_BTH in self.layer_inputs]
        self.layer_inputs.clear()
        device = states[0].device
        # Chunks that fit into a CPU's cache; larger ones elsewhere, where starting a kernel takes long.
        elements = 2**20 if device.type == "cpu" else 2**25
        size = max(1, elements // (len(states) * states[0].shape[1]))
        tokens_N = self.mask_BT.cpu().flatten()
        for mask_N, *chunk in zip(*(each.split(size) for each in (tokens_N, *states))):
            x_NLH = torch.stack([x_NH.to(device) for x_NH in chunk], dim=1)
            if self.padded:
                x_NLH = x_NLH[mask_N.to(device)]
            x_NLH = x_NLH.to(accumulation_dtype(x_NLH))
            products_NLL = x_NLH @ x_NLH.transpose(1, 2)
            scale_NL = products_NLL.diagonal(dim1=1, dim2=2).clamp(min=1e-24).rsqrt()
            cosines_NLL = products_NLL * scale_NL[:, :, None] * scale_NL[:, None, :]
            self.similarity += cosines_NLL.sum(0).cpu().double()

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and restore the order of the rows."""
        for key, sums_3U in self.sums.items():
            self.sums[key] = self._add_up(sums_3U)
        self.similarity = self._add_up(self.similarity).cpu()
        super().gather()

    def axis_scores(self, batch_reduction: Reduction, metric: str = "activation") -> dict[str, Tensor]:
        """Scores of every observed axis, float32 in the shape of its units; NaN where a layer has none."""
        scores: dict[str, Tensor] = {}
        for axis in {**dict.fromkeys(self.spec.hook_points), "hidden": None}:
            reduced = {
                source: reduce_rows(sums.cpu(), self.num_rows, batch_reduction)
                for (name, summed_axis, source), sums in self.sums.items()
                if (name, summed_axis) == (metric, axis)
            }
            if self.spec.axis[axis].per_layer:
                scores[axis] = torch.full(self.spec.units(axis, self.model.config), torch.nan, dtype=torch.float32)
                for layer, sizes in enumerate(self.layer_sizes):
                    parts = [reduced[s] for s in sorted(reduced) if s % len(self.layer_sizes) == layer]
                    if parts:
                        units = self.spec.own_units(axis, sizes)
                        own = torch.stack(parts).sum(0).float().unflatten(0, units)
                        scores[axis][layer][tuple(map(slice, units))] = own
            else:
                scores[axis] = torch.stack([reduced[source] for source in sorted(reduced)]).sum(0).float()
        return scores

    def block_scores(self) -> Tensor:
        """Block importance of layers i..j, float32 [L, L]; NaN below the diagonal."""
        # similarity[i, j] compares the input of layer i with the input of layer j, so a block i..j ends at j + 1.
        blocks = (1 - self.similarity / self.num_tokens)[:-1, 1:].float()
        return blocks.masked_fill(torch.ones_like(blocks, dtype=torch.bool).tril(-1), torch.nan)


def head_groups(config: PretrainedConfig) -> Iterator[tuple[int, int]]:
    """For every layer with heads in groups: their number U, and the inner dimensions of each, D / U."""
    spec = spec_for(config)
    names = list(named_tensors(empty_model(config), tied=True))
    for _, axis in spec.groups:
        module = spec.hook_points.get(axis)
        if module is None or holds_stacked_experts(spec, module):
            continue
        for layer in spec.layers_with(axis, names):
            view = UnitView(spec, axis, module, spec.sizes(config, layer))
            yield view.num_units, (view.slice.stop - view.slice.start) // view.num_units


def _gram_matrices(weight_HD: Tensor, view: UnitView) -> Tensor:
    """WᵀW of the weights of every unit, [U, R, R]."""
    if view.is_scalar:
        return view.split(weight_HD.square().sum(0))[..., None]
    weight_HUR = view.split(weight_HD)
    return torch.stack([weight_HUR[:, unit].T @ weight_HUR[:, unit] for unit in range(view.num_units)])


def metric_values(metrics: Sequence[ImportanceMetric], units: UnitActivations) -> Iterator[tuple[list[str], Tensor]]:
    """Values of metrics, [..., U]; metrics that return the same tensor are named together.

    Raises:
        DataError: if a metric returns something else than one value per token and unit.
    """
    names_of: dict[int, list[str]] = {}
    values: dict[int, Tensor] = {}
    expected = units.values.shape[:-1]
    for metric in metrics:
        x = metric.function(units)
        if not isinstance(x, Tensor) or x.shape != expected:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"metric {metric.name!r} returned {found} for the axis {units.axis!r}. Expected one value per token "
                f"and unit, a tensor of shape {tuple(expected)}."
            )
        names_of.setdefault(id(x), []).append(metric.name)
        values[id(x)] = x
    for key, x in values.items():
        yield names_of[key], x
