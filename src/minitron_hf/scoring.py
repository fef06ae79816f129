"""One forward pass over calibration batches, watched: the sums from which importance scores are made.

Legend of shape suffixes: B rows of a batch, T tokens of a row, U units of an axis, H hidden, L layers, D the units
and inner dimensions that a projection reads, g groups, N tokens of a batch, n those routed to one expert.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .axes import dimension_axes, dimension_size, product_shape
from .data import position_ids
from .errors import DataError, UnsupportedModelError
from .experts import Observer, observed_experts, stored_transposed
from .families import ArchSpec
from .families.base import named_tensors
from .models import input_device, tensor_values
from .reductions import Reduction, reduce_routed, reduce_rows, reduce_sequence, row_terms, wide


def require_vocabulary(largest: int, config: PretrainedConfig) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        DataError: if there are some.
    """
    if largest >= config.vocab_size:
        raise DataError(
            f"The calibration rows hold token id {largest}, but the model's vocabulary has {config.vocab_size} "
            "entries. Use the tokenizer that belongs to this model."
        )


class ScoringPass:
    """Accumulators of one pass, in float64, and the hooks that feed them.

    Attributes:
        rows: the rows of every batch that was seen, without padding; rows without tokens are left out.
    """

    def __init__(self, spec: ArchSpec, model: PreTrainedModel, sequence_reduction: Reduction) -> None:
        self.spec = spec
        self.model = model
        self.sizes = spec.sizes(model.config)
        self.sequence_reduction = sequence_reduction
        self.rows: list[list[tuple[int, ...]]] = []
        self.layer_inputs: list[Tensor] = []
        self.mask_BT: Tensor | None = None
        self.count_B = torch.zeros(0)
        self.shape_BT: tuple[int, ...] = ()
        # (axis, source) → sums over rows, [3, U]; source is a layer or a norm.
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.unseen: dict[tuple[str, int], str] = {}
        self.similarity = torch.zeros(self.sizes["layers"] + 1, self.sizes["layers"] + 1, dtype=torch.float64)
        # The signature, not __code__: Transformers wraps `forward` in decorators.
        self.takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model, without its head, on one batch of `input_ids` and, where it is padded, `attention_mask`."""
        mask_BT = batch.get("attention_mask")
        if mask_BT is None:
            mask_BT = torch.ones_like(batch["input_ids"])
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch["input_ids"], mask_BT)]
        require_vocabulary(max(map(max, filter(None, rows)), default=0), self.model.config)
        padded = not bool(mask_BT.all())
        self.mask_BT = mask_BT.bool() if padded else None
        self.count_B = mask_BT.sum(1)
        self.shape_BT = mask_BT.shape
        inputs = {"input_ids": batch["input_ids"]}
        if padded:
            # A padding token added to the tokenizer alone lies beyond the model's vocabulary.
            inputs["input_ids"] = batch["input_ids"].masked_fill(~mask_BT.bool(), 0)
            # Causal attention never looks right, so padding there needs no mask; and with one, padding tokens that a
            # sliding window leaves with nothing to see turn NaN and spoil the keys of the others.
            if bool((mask_BT.diff(dim=1) > 0).any()):
                inputs["attention_mask"] = mask_BT
                if self.takes_positions:
                    inputs["position_ids"] = position_ids(mask_BT)
        self.layer_inputs.clear()
        self.model.base_model(**inputs, use_cache=False)
        if self.unseen:
            raise UnsupportedModelError(
                f"The forward pass of this {type(self.model).__name__} never came to "
                f"{', '.join(list(self.unseen.values())[:4])}, which should be observed there. Load it with another "
                "attention or kernel implementation; if it has none, please report it."
            )
        self._add_similarities()
        self.rows.append([row for row in rows if row])

    @property
    def num_rows(self) -> int:
        """Rows with at least one token."""
        return sum(map(len, self.rows))

    @property
    def num_tokens(self) -> int:
        """Tokens seen, without padding."""
        return sum(len(row) for rows in self.rows for row in rows)

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
                    lambda _, args, kwargs: observe(_first(args, kwargs)), with_kwargs=True
                )
                stack.callback(hook.remove)

            def after(path: str, observe: Callable[[Tensor], None]) -> None:
                hook = modules[path].register_forward_hook(
                    lambda _, __, output: observe(output[0] if isinstance(output, tuple) else output)
                )
                stack.callback(hook.remove)

            def after_norm(path: str, source: int) -> None:
                self._expect("hidden", source, path)
                after(path, lambda x_BTH: self._add("hidden", source, x_BTH))

            experts: dict[str, list[str]] = {}
            for axis, module in spec.taps.items():
                if f"{module}.weight" not in spec.dimensions:
                    experts.setdefault(module, []).append(axis)
                for layer in spec.layers_with(axis, names):
                    path = spec.layer_parameter(layer, module)
                    self._expect(axis, layer, path)
                    if f"{module}.weight" in spec.dimensions:
                        before(path, self._unit_observer(axis, module, layer))
            for module, axes in experts.items():
                observers = {
                    modules[spec.layer_parameter(layer, module)]: self._expert_observer(axes, layer)
                    for layer in spec.layers_with(axes[0], names)
                }
                stack.enter_context(observed_experts(observers, stored_transposed(spec, module)))
            for layer in range(num_layers):
                for index, module in enumerate(spec.layer_norms):
                    if (path := spec.layer_parameter(layer, module)) in modules:
                        after_norm(path, layer * len(spec.layer_norms) + index)
                before(f"{spec.layers_path}.{layer}", self.layer_inputs.append)
            after_norm(spec.final_norm, num_layers * len(spec.layer_norms))
            after(f"{spec.layers_path}.{num_layers - 1}", self.layer_inputs.append)
            yield

    def _expect(self, axis: str, source: int, path: str) -> None:
        units = self.spec.units(axis, self.sizes)[1 if self.spec.axis[axis].per_layer else 0 :]
        self.sums[axis, source] = torch.zeros(3, math.prod(units), dtype=torch.float64)
        self.unseen[axis, source] = path

    def _unit_observer(self, axis: str, module: str, layer: int) -> Callable[[Tensor], None]:
        """Activations at the input of a projection → one value per unit and token."""
        spec, pattern = self.spec, f"{module}.weight"
        tapped = {outer: inner for inner, outer in spec.groups}.get(axis, axis)
        [position] = [i for i, dim in enumerate(spec.dimensions[pattern]) if tapped in dimension_axes(dim)]
        dimension = spec.dimensions[pattern][position]
        [index] = [i for i, product in enumerate(dimension) if tapped in product]
        product = dimension[index]
        shape = product_shape(product, self.sizes)
        start = dimension_size(dimension[:index], self.sizes)
        piece = slice(start, start + math.prod(shape))
        if axis in product:
            units = (axis, spec.axis[axis].within)
            dims = tuple(-len(shape) + i for i, factor in enumerate(product) if factor not in units)

            def observe(x_BTD: Tensor) -> None:
                x = x_BTD[..., piece]
                if dims:
                    x = torch.linalg.vector_norm(x.unflatten(-1, shape), dim=dims, dtype=wide(x))
                self._add(axis, layer, x)

            return observe
        # The outer axis of a group (KV heads over query heads): the norm of what the whole group contributes to the
        # module's output, ‖W_g x_g‖² = x_gᵀ(W_gᵀW_g)x_g, which needs no [tokens, H] output per group.
        num_groups = self.sizes[axis]
        gram: Tensor | None = None

        def observe_group(x_BTD: Tensor) -> None:
            nonlocal gram
            if gram is None:
                weight = tensor_values(self.model, spec.layer_parameter(layer, pattern))
                weight = weight.to(x_BTD.device, wide(x_BTD))
                weight_gDH = (weight.T if position == 1 else weight)[piece].unflatten(0, (num_groups, -1))
                gram = weight_gDH @ weight_gDH.transpose(1, 2)
            x_BTgD = x_BTD[..., piece].to(gram.dtype).unflatten(-1, (num_groups, -1))
            squared_BTg = (torch.einsum("...gd,gde->...ge", x_BTgD, gram) * x_BTgD).sum(-1)
            self._add(axis, layer, squared_BTg.clamp(min=0).sqrt())

        return observe_group

    def _within(self, axis: str) -> bool:
        return self.spec.axis[axis].within is not None

    def _expert_observer(self, axes: list[str], layer: int) -> Observer:
        """What one expert does with its tokens → one value for it, or for each of its neurons, and token.

        All values at tokens that are routed elsewhere are 0.
        """

        def observe(expert: int, token_n: Tensor, inner_nF: Tensor, output_nH: Tensor) -> None:
            row_n = token_n // self.shape_BT[1]
            if self.mask_BT is not None:
                seen_n = self.mask_BT.flatten().to(token_n.device)[token_n]
                row_n, inner_nF, output_nH = row_n[seen_n], inner_nF[seen_n], output_nH[seen_n]
            for axis in axes:
                if self._within(axis):
                    x_nU = inner_nF
                else:
                    x_nU = torch.linalg.vector_norm(output_nH, dim=-1, keepdim=True, dtype=wide(output_nH))
                reduced_BU = reduce_routed(x_nU, row_n, self.count_B.to(row_n.device), self.sequence_reduction)
                self._accumulate(axis, layer, reduced_BU, expert * x_nU.shape[1])

        return observe

    def _add(self, axis: str, source: int, x_BTU: Tensor) -> None:
        x_BTU = x_BTU.reshape(*self.shape_BT, -1)  # OPT flattens rows and tokens before its MLP
        self._accumulate(axis, source, reduce_sequence(x_BTU, self.mask_BT, self.sequence_reduction))

    def _accumulate(self, axis: str, source: int, reduced_BU: Tensor, start: int = 0) -> None:
        if reduced_BU.device.type == "mps":  # has no float64
            reduced_BU = reduced_BU.cpu()
        sums_3U = self.sums[axis, source] = self.sums[axis, source].to(reduced_BU.device)
        sums_3U[:, start : start + reduced_BU.shape[1]] += row_terms(reduced_BU)
        self.unseen.pop((axis, source), None)

    def _add_similarities(self) -> None:
        """Cosines between the inputs of all layers (and the last output), summed over unmasked tokens.

        Every pair of layers is compared, so the states of a batch are held until its last layer: a smaller batch is
        the only way to hold fewer. They are compared a few tokens at a time, by one product for all pairs.
        """
        states = [x_BTH.flatten(0, 1) for x_BTH in self.layer_inputs]
        self.layer_inputs.clear()
        device = states[0].device
        # Chunks that stay in a CPU's cache; elsewhere larger ones, so that starting kernels takes no time.
        elements = 2**21 if device.type == "cpu" else 2**25
        tokens = torch.arange(len(states[0])) if self.mask_BT is None else self.mask_BT.cpu().flatten().nonzero()[:, 0]
        for chunk in tokens.split(max(1, elements // (len(states) * states[0].shape[1]))):
            x_NLH = torch.stack([x_NH[chunk.to(x_NH.device)].to(device) for x_NH in states], dim=1)
            x_NLH = x_NLH.to(wide(x_NLH))
            products_NLL = x_NLH @ x_NLH.transpose(1, 2)
            scale_NL = products_NLL.diagonal(dim1=1, dim2=2).clamp(min=1e-24).rsqrt()
            cosines_NLL = products_NLL * scale_NL[:, :, None] * scale_NL[:, None, :]
            self.similarity += cosines_NLL.sum(0).cpu().double()

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and put the rows back in their order."""
        device = input_device(self.model)
        for key, sums_3U in self.sums.items():
            self.sums[key] = sums_3U.to(device)
            torch.distributed.all_reduce(self.sums[key])
        similarity = self.similarity.to(device)
        torch.distributed.all_reduce(similarity)
        self.similarity = similarity.cpu()
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, self.rows)
        self.rows = [rows for turn in zip_longest(*everyones) for rows in turn if rows is not None]

    def axis_scores(self, batch_reduction: Reduction) -> dict[str, Tensor]:
        """Scores of every observed axis, float32 in the shape of its units; NaN where a layer has none."""
        scores: dict[str, Tensor] = {}
        for axis in {**dict.fromkeys(self.spec.taps), "hidden": None}:
            reduced = {
                source: reduce_rows(sums.cpu(), self.num_rows, batch_reduction)
                for (name, source), sums in self.sums.items()
                if name == axis
            }
            units = self.spec.units(axis, self.sizes)
            if self.spec.axis[axis].per_layer:
                scores[axis] = torch.full(units, torch.nan, dtype=torch.float32)
                for layer, values in reduced.items():
                    scores[axis][layer] = values.float().unflatten(0, units[1:])
            else:
                scores[axis] = torch.stack([reduced[source] for source in sorted(reduced)]).sum(0).float()
        return scores

    def block_scores(self) -> Tensor:
        """Block importance of layers i..j, float32 [L, L]; NaN below the diagonal."""
        # similarity[i, j] compares the input of layer i with the input of layer j, so a block i..j ends at j + 1.
        blocks = (1 - self.similarity / self.num_tokens)[:-1, 1:].float()
        return blocks.masked_fill(torch.ones_like(blocks, dtype=torch.bool).tril(-1), torch.nan)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module is called on: its first argument, however it is passed."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
