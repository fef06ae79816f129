"""Observes one forward pass over calibration batches: the sums from which importance scores are made.

Legend of shape suffixes: B rows of a batch, T tokens of a row, U units of an axis, R dimensions of one unit,
H hidden, L layers, D the units and inner dimensions that a projection reads or writes, F neurons of an expert,
N tokens of a batch, n those routed to one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from ..errors import UnsupportedModelError
from ..families import ArchSpec
from ..families.axes import Dimension, dimension_axes, dimension_size, product_shape
from ..families.tensors import named_tensors
from ..weights import tensor_values
from .batches import Batches, state_of
from .experts import Observer, Routed, expert_inputs, expert_writer, observed_experts, stored_transposed
from .reductions import Reduction, reduce_routed, reduce_rows, reduce_sequence, row_terms, wide
from .weights import channel_norms

ActivationMetric = Literal["activation", "pre_activation", "contribution"]
#: Where an axis is observed: at the input of a projection, at the outputs of those that make it, or at the input of a
#: projection weighted with what it does to it.
Kind = Literal["input", "made", "weighted"]


class Tap:
    """Where the units of an axis are read: a piece of the last dimension, arranged as units and their dimensions.

    Attributes:
        position: which dimension of the projection's weight they are in.
        num_units: how many units the piece holds.
        group: whether they are groups of what the piece holds: the outer axis of `ArchSpec.groups`.
        single: whether every unit is one number: a neuron.
    """

    def __init__(self, spec: ArchSpec, axis: str, module: str, sizes: Mapping[str, int]) -> None:
        dimensions = spec.dimensions[f"{module}.weight"]
        tapped = {outer: inner for inner, outer in spec.groups}.get(axis, axis)
        [self.position] = [i for i, dim in enumerate(dimensions) if tapped in dimension_axes(dim)]
        dimension = dimensions[self.position]
        [index] = [i for i, product in enumerate(dimension) if tapped in product]
        product = dimension[index]
        self.group = axis not in product
        start = dimension_size(dimension[:index], sizes)
        self.piece = slice(start, start + math.prod(product_shape(product, sizes)))
        if self.group:
            self.shape: tuple[int, ...] = (sizes[axis], -1)
            units = [0]
        else:
            self.shape = product_shape(product, sizes)
            own = (axis, spec.axis[axis].within)
            units = [i for i, factor in enumerate(product) if factor in own]
        self.order = [*units, *(i for i in range(len(self.shape)) if i not in units)]
        self.num_units = math.prod(self.shape[i] for i in units)
        self.single = not self.group and len(units) == len(self.shape)

    def split(self, x: Tensor) -> Tensor:
        """[..., D] → [..., U, R]."""
        lead = x.shape[:-1]
        x = x[..., self.piece].unflatten(-1, self.shape)
        x = x.permute(*range(len(lead)), *(len(lead) + i for i in self.order))
        return x.reshape(*lead, self.num_units, -1)


class ScoringPass(Batches):
    """Accumulators of one pass, in float64, and the hooks that feed them."""

    def __init__(
        self,
        spec: ArchSpec,
        model: PreTrainedModel,
        sequence_reduction: Reduction,
        metrics: Iterable[ActivationMetric] = ("activation",),
    ) -> None:
        super().__init__(spec, model)
        self.metrics = tuple(metrics)
        self.layer_sizes = spec.layer_sizes(model.config)
        self.sequence_reduction = sequence_reduction
        self.layer_inputs: list[Tensor] = []
        self.padded = False
        self.count_B = torch.zeros(0)
        # (kind, axis, source) → sums over rows, [3, U]; source is a norm, or layer + layers * part.
        self.sums: dict[tuple[Kind, str, int], Tensor] = {}
        self.unseen: dict[tuple[Kind, str, int], str] = {}
        self.writer_norms: dict[tuple[int, int], Tensor] = {}
        self.similarity = torch.zeros(self.sizes["layers"] + 1, self.sizes["layers"] + 1, dtype=torch.float64)

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model, without its head, on one batch of `input_ids` and, where it is padded, `attention_mask`."""
        inputs = self.inputs(self.begin(batch))
        self.padded = not bool(self.mask_BT.all())
        self.count_B = self.mask_BT.sum(1)
        self.layer_inputs.clear()
        self.model.base_model(**inputs, use_cache=False)
        if self.unseen:
            raise UnsupportedModelError(
                f"The forward pass of this {type(self.model).__name__} never came to "
                f"{', '.join(list(self.unseen.values())[:4])}, which should be observed there. Load it with another "
                "attention or kernel implementation; if it has none, please report it."
            )
        self._add_similarities()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe the taps, norms and layers that the family's table names, for the duration of the context.

        A layer without tensors of an axis has no such units; a norm may be missing in some layers.
        """
        spec, model = self.spec, self.model
        num_layers = self.sizes["layers"]
        names = list(named_tensors(model, tied=True))
        modules = dict(model.named_modules(remove_duplicate=False))
        with ExitStack() as stack:

            def before(path: str, observe: Callable[[Tensor], None]) -> None:
                hook = modules[path].register_forward_pre_hook(
                    lambda _, args, kwargs: observe(first_input(args, kwargs)), with_kwargs=True
                )
                stack.callback(hook.remove)

            def after(path: str, observe: Callable[[Tensor], None]) -> None:
                hook = modules[path].register_forward_hook(
                    lambda _, __, output: observe(output[0] if isinstance(output, tuple) else output)
                )
                stack.callback(hook.remove)

            def after_norm(path: str, source: int, layer: int | None) -> None:
                kinds = self._kinds("hidden")
                for kind in kinds:
                    self._expect(kind, "hidden", source, path)
                after(path, self._channel_observer(kinds, source, layer))

            experts: dict[str, list[str]] = {}
            for axis, module in spec.hook_points.items():
                stacked = f"{module}.weight" not in spec.dimensions
                if stacked:
                    experts.setdefault(module, []).append(axis)
                for layer in spec.layers_with(axis, names):
                    path = spec.layer_parameter(layer, module)
                    kinds = self._kinds(axis)
                    if stacked:
                        for kind in kinds:
                            self._expect(kind, axis, layer, path)
                        continue
                    if inputs := kinds - {"made"}:
                        for kind in inputs:
                            self._expect(kind, axis, layer, path)
                        before(path, self._unit_observer(axis, module, layer, inputs))
                    if "made" in kinds:
                        part = 0
                        for maker, dimension in makers(spec, axis, modules, layer):
                            made = spec.layer_parameter(layer, maker)
                            after(made, self._maker_observer(axis, dimension, layer, part, made))
                            part += sum(axis in product for product in dimension)
            for module, axes in experts.items():
                observers = {
                    modules[spec.layer_parameter(layer, module)]: self._expert_observer(module, axes, layer)
                    for layer in spec.layers_with(axes[0], names)
                }
                stack.enter_context(observed_experts(observers, stored_transposed(spec, module)))
            for layer in range(num_layers):
                for index, module in enumerate(spec.layer_norms):
                    if (path := spec.layer_parameter(layer, module)) in modules:
                        after_norm(path, layer * len(spec.layer_norms) + index, layer)
                before(f"{spec.layers_path}.{layer}", lambda x: self.layer_inputs.append(state_of(spec, x)))
            after_norm(spec.final_norm, num_layers * len(spec.layer_norms), None)
            after(f"{spec.layers_path}.{num_layers - 1}", lambda x: self.layer_inputs.append(state_of(spec, x)))
            yield

    def _kind(self, axis: str, metric: ActivationMetric) -> Kind:
        """Where a metric observes an axis."""
        spec = self.spec
        if axis == "hidden":
            return "weighted" if metric == "contribution" else "input"
        module = spec.hook_points[axis]
        if f"{module}.weight" not in spec.dimensions:
            neurons = spec.axis[axis].within is not None
            weighted = neurons and metric == "contribution"
        else:
            tap = Tap(spec, axis, module, self.sizes)
            neurons = tap.single and spec.axis[axis].within is None
            weighted = metric == "contribution" or tap.group
        return "made" if neurons and metric == "pre_activation" else "weighted" if weighted else "input"

    def _kinds(self, axis: str) -> set[Kind]:
        return {self._kind(axis, metric) for metric in self.metrics}

    def _expect(self, kind: Kind, axis: str, source: int, path: str) -> None:
        per_layer = self.spec.axis[axis].per_layer
        units = self.spec.own_units(
            axis, self.layer_sizes[source % len(self.layer_sizes)] if per_layer else self.sizes
        )
        self.sums[kind, axis, source] = torch.zeros(3, math.prod(units), dtype=torch.float64)
        self.unseen[kind, axis, source] = path

    def _channel_observer(self, kinds: set[Kind], source: int, layer: int | None) -> Callable[[Tensor], None]:
        """Outputs of a norm; weighted: times what its layer, or the head after the last norm, holds for a channel."""
        weight_H: Tensor | None = None

        def observe(x_BTH: Tensor) -> None:
            nonlocal weight_H
            if "input" in kinds:
                self._add("input", "hidden", source, x_BTH)
            if "weighted" in kinds:
                if weight_H is None and layer is not None:
                    weight_H = channel_norms(self.spec, self.model, layer)
                elif weight_H is None:
                    head = self.model.get_output_embeddings()
                    [name] = [name for name, module in self.model.named_modules() if module is head]
                    weight_H = tensor_values(self.model, f"{name}.weight").detach().double().norm(dim=0)
                weight_H = weight_H.to(x_BTH.device, wide(x_BTH))
                self._add("weighted", "hidden", source, x_BTH * weight_H)

        return observe

    def _unit_observer(self, axis: str, module: str, layer: int, kinds: set[Kind]) -> Callable[[Tensor], None]:
        """Activations at the input of a projection → one value per unit and token.

        Weighted, the norm of what a unit contributes to the projection's output: ‖W_u x_u‖² = x_uᵀ(W_uᵀW_u)x_u, which
        needs no [tokens, H] output per unit. A neuron is one number, and keeps its sign.
        """
        tap = Tap(self.spec, axis, module, self.layer_sizes[layer])
        gram_URR: Tensor | None = None

        def observe(x_BTD: Tensor) -> None:
            nonlocal gram_URR
            x_BTUR = tap.split(x_BTD)
            if "input" in kinds:
                dtype = wide(x_BTUR)
                x_BTU = x_BTUR[..., 0] if tap.single else torch.linalg.vector_norm(x_BTUR, dim=-1, dtype=dtype)
                self._add("input", axis, layer, x_BTU)
            if "weighted" not in kinds:
                return
            if gram_URR is None:
                weight = tensor_values(self.model, self.spec.layer_parameter(layer, f"{module}.weight")).detach()
                weight = weight.to(x_BTD.device, wide(x_BTD))
                weight_HUR = tap.split(weight if tap.position == 1 else weight.T)
                gram_URR = torch.einsum("hur,hus->urs", weight_HUR, weight_HUR)
            if tap.single:
                self._add("weighted", axis, layer, x_BTUR[..., 0] * gram_URR[:, 0, 0].sqrt())
                return
            x_BTUR = x_BTUR.to(gram_URR.dtype)
            squared_BTU = (torch.einsum("...ur,urs->...us", x_BTUR, gram_URR) * x_BTUR).sum(-1)
            self._add("weighted", axis, layer, squared_BTU.clamp(min=0).sqrt())

        return observe

    def _maker_observer(
        self, axis: str, dimension: Dimension, layer: int, part: int, path: str
    ) -> Callable[[Tensor], None]:
        """Outputs of a projection that makes the units: gates and neurons are parts of their own."""
        pieces = _pieces(axis, dimension, self.layer_sizes[layer])
        sources = [layer + self.sizes["layers"] * (part + number) for number in range(len(pieces))]
        for source in sources:
            self._expect("made", axis, source, path)

        def observe(x_BTD: Tensor) -> None:
            for source, piece in zip(sources, pieces):
                self._add("made", axis, source, x_BTD[..., piece])

        return observe

    def _expert_observer(self, module: str, axes: list[str], layer: int) -> Observer:
        """What one expert does with its tokens → one value for it, or for each of its neurons, and token.

        All values at tokens that are routed elsewhere are 0.
        """
        spec, sizes = self.spec, self.layer_sizes[layer]
        observed = [(axis, kind) for axis in axes for kind in self._kinds(axis)]
        transposed = stored_transposed(spec, module)
        parts: list[slice] = []
        for axis, kind in observed:
            if kind == "made":
                parts = _pieces(axis, expert_inputs(spec, module), sizes)
                for number in range(1, len(parts)):
                    self._expect(kind, axis, layer + sizes["layers"] * number, module)

        def observe(expert: int, routed: Routed) -> None:
            token_n = routed.token_n
            row_n = token_n // self.shape_BT[1]
            seen_n: Tensor | slice = slice(None)
            if self.padded:
                seen_n = self.mask_BT.flatten().to(token_n.device)[token_n]
            row_n = row_n[seen_n]
            count_B = self.count_B.to(row_n.device)

            def add(axis: str, kind: Kind, x_nU: Tensor, part: int = 0) -> None:
                reduced_BU = reduce_routed(x_nU[seen_n], row_n, count_B, self.sequence_reduction)
                self._accumulate(kind, axis, layer + sizes["layers"] * part, reduced_BU, expert * x_nU.shape[1])

            for axis, kind in observed:
                if spec.axis[axis].within is None:
                    output_nH = routed.output_nH
                    norm_n1 = torch.linalg.vector_norm(output_nH, dim=-1, keepdim=True, dtype=wide(output_nH))
                    add(axis, kind, norm_n1)
                elif kind == "made":
                    for part, piece in enumerate(parts):
                        add(axis, kind, routed.before_nD[:, piece] * routed.weight_n1, part)
                else:
                    x_nF = routed.inner_nF * routed.weight_n1
                    if kind == "weighted":
                        x_nF = x_nF * self._writer_norms(module, layer, expert, transposed).to(x_nF)
                    add(axis, kind, x_nF)

        return observe

    def _writer_norms(self, module: str, layer: int, expert: int, transposed: bool) -> Tensor:
        """Norm of what the down projection of an expert holds for each of its neurons, [F]."""
        if (layer, expert) not in self.writer_norms:
            path = self.spec.layer_parameter(layer, module)
            weight = expert_writer(self.model, path)[expert].detach()
            dtype = wide(weight)
            self.writer_norms[layer, expert] = torch.linalg.vector_norm(weight, dim=int(transposed), dtype=dtype)
        return self.writer_norms[layer, expert]

    def _add(self, kind: Kind, axis: str, source: int, x_BTU: Tensor) -> None:
        x_BTU = x_BTU.reshape(*self.shape_BT, -1)  # OPT flattens rows and tokens before its MLP
        mask_BT = self.mask_BT if self.padded else None
        self._accumulate(kind, axis, source, reduce_sequence(x_BTU, mask_BT, self.sequence_reduction))

    def _accumulate(self, kind: Kind, axis: str, source: int, reduced_BU: Tensor, start: int = 0) -> None:
        if reduced_BU.device.type == "mps":  # has no float64
            reduced_BU = reduced_BU.cpu()
        key = kind, axis, source
        sums_3U = self.sums[key] = self.sums[key].to(reduced_BU.device)
        sums_3U[:, start : start + reduced_BU.shape[1]] += row_terms(reduced_BU)
        self.unseen.pop(key, None)

    def _add_similarities(self) -> None:
        """Cosines between the inputs of all layers (and the last output), summed over unmasked tokens.

        Every pair of layers is compared, so the states of a batch are held until its last layer: a smaller batch is
        the only way to hold fewer. They are compared a few tokens at a time, by one product for all pairs.
        """
        # A residual stream may be several streams side by side, [B, T, streams, H].
        states = [x_BTH.flatten(0, 1).flatten(1) for x_BTH in self.layer_inputs]
        self.layer_inputs.clear()
        device = states[0].device
        # Chunks that stay in a CPU's cache; elsewhere larger ones, so that starting kernels takes no time.
        elements = 2**20 if device.type == "cpu" else 2**25
        size = max(1, elements // (len(states) * states[0].shape[1]))
        tokens_N = self.mask_BT.cpu().flatten()
        for mask_N, *chunk in zip(*(each.split(size) for each in (tokens_N, *states))):
            x_NLH = torch.stack([x_NH.to(device) for x_NH in chunk], dim=1)
            if self.padded:
                x_NLH = x_NLH[mask_N.to(device)]
            x_NLH = x_NLH.to(wide(x_NLH))
            products_NLL = x_NLH @ x_NLH.transpose(1, 2)
            scale_NL = products_NLL.diagonal(dim1=1, dim2=2).clamp(min=1e-24).rsqrt()
            cosines_NLL = products_NLL * scale_NL[:, :, None] * scale_NL[:, None, :]
            self.similarity += cosines_NLL.sum(0).cpu().double()

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and put the rows back in their order."""
        for key, sums_3U in self.sums.items():
            self.sums[key] = self._add_up(sums_3U)
        self.similarity = self._add_up(self.similarity).cpu()
        super().gather()

    def axis_scores(self, batch_reduction: Reduction, metric: ActivationMetric = "activation") -> dict[str, Tensor]:
        """Scores of every observed axis, float32 in the shape of its units; NaN where a layer has none."""
        scores: dict[str, Tensor] = {}
        for axis in {**dict.fromkeys(self.spec.hook_points), "hidden": None}:
            reduced = {
                source: reduce_rows(sums.cpu(), self.num_rows, batch_reduction)
                for (kind, name, source), sums in self.sums.items()
                if name == axis and kind == self._kind(axis, metric)
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


def makers(spec: ArchSpec, axis: str, modules: Mapping[str, nn.Module], layer: int) -> Iterator[tuple[str, Dimension]]:
    """The projections of a layer whose outputs the units of an axis are made of: (module, dimension of its output).

    They are the matrices that hold the axis in the dimension that they write.
    """
    for pattern, dimensions in spec.dimensions.items():
        name, _, leaf = pattern.rpartition(".")
        module = modules.get(spec.layer_parameter(layer, name))
        if leaf == "weight" and len(dimensions) == 2 and module is not None and name != spec.hook_points[axis]:
            written = dimensions[1 if isinstance(module, Conv1D) else 0]
            if axis in dimension_axes(written):
                yield name, written


def _pieces(axis: str, dimension: Dimension, sizes: Mapping[str, int]) -> list[slice]:
    """Where a dimension holds one value for every unit of an axis, as often as it does so."""
    pieces, start = [], 0
    for product in dimension:
        shape = product_shape(product, sizes)
        if axis in product:
            times = math.prod(shape) // sizes[axis]  # interleaved halves: `axis*2`
            assert product[0] == axis, product
            pieces += [slice(start + number, start + math.prod(shape), times) for number in range(times)]
        start += math.prod(shape)
    return pieces


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module is called on: its first argument, however it is passed."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
