"""Measures a model without some layers: its perplexity, or the change of its logits.

Without layers i..j a model computes the same states up to layer i. So the inputs of all layers are kept for one batch,
and only the layers after a block run: measuring all single layers costs half as much as that many passes through a
shallower model.

Legend of shape suffixes: B rows of a batch, T tokens of a row, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import build_from_config, no_init_weights, use_same_kernels
from ..families import ArchSpec, named_tensors
from ..families.axes import dimension_index
from ..hardware import sum_dtype
from ..sizes.student import build_student_config
from ..weights import input_device, put_on_one_device, set_tensor, tensor_values
from .batches import Batches, token_losses
from .hooks import first_input, replaced_forwards
from .logits import BackboneOutput, run_backbone

DepthMetric = Literal["perplexity", "logit_nmse"]
#: Any function of a model; the lower, the better the model is.
DepthFunction = Callable[[PreTrainedModel], float]


class DepthPass(Batches):
    """One pass over calibration batches for many candidates: sums over the tokens of each, in float64.

    Attributes:
        candidates: the layers that each candidate lacks, contiguous except for the dropped layers. An empty candidate
            is the model without the dropped layers.
        dropped: layers that were removed before.
    """

    def __init__(
        self,
        spec: ArchSpec,
        model: PreTrainedModel,
        metric: DepthMetric,
        candidates: Sequence[tuple[int, ...]],
        dropped: Sequence[int] = (),
    ) -> None:
        super().__init__(spec, model)
        self.metric = metric
        self.candidates = list(candidates)
        self.dropped = frozenset(dropped)
        # Where layers read states of earlier layers, the earlier layers must run.
        self.reuses = not (spec.layer_rules.reusing_layers or spec.layer_rules.fixed_layers)
        self.layers: Any = model.get_submodule(spec.layers_path)
        self.sums = torch.zeros(len(self.candidates), 2, dtype=torch.float64)

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model, and every candidate, on one batch of `input_ids` and, where padded, `attention_mask`."""
        batch = self.begin(batch)
        inputs = self.inputs(batch)
        whole, states, as_tuple = self._observed_run(inputs)
        dropped = self.dropped
        if dropped:
            start = min(dropped)
            with self._removed_layers(start, states[start], dropped, as_tuple):
                _, shorter, _ = self._observed_run(inputs)
            states[start + 1 :] = shorter[start + 1 :]
        for number, candidate in enumerate(self.candidates):
            gone = dropped | set(candidate)
            found = whole
            if gone:
                # Nothing before the candidate changes; the layers after it run without the dropped ones.
                start = min(candidate) if candidate else min(dropped)
                with self._removed_layers(start, states[start], gone, as_tuple):
                    found = run_backbone(self.model, inputs)
            self._add(number, batch["input_ids"], found, whole)

    def _observed_run(self, inputs: Mapping[str, Tensor]) -> tuple[BackboneOutput, list[Tensor], bool]:
        """Run the backbone.

        Returns:
            Its output, the inputs of all layers, and whether the layers return tuples.
        """
        states: list[Tensor] = []
        tuples: list[bool] = []
        with ExitStack() as stack:
            for layer in self.layers:
                before = layer.register_forward_pre_hook(
                    lambda _, args, kwargs: states.append(first_input(args, kwargs)), with_kwargs=True
                )
                after = layer.register_forward_hook(lambda _, __, output: tuples.append(isinstance(output, tuple)))
                stack.callback(before.remove)
                stack.callback(after.remove)
            output = run_backbone(self.model, inputs)
        return output, states, tuples[0]

    @contextmanager
    def _removed_layers(
        self, start: int, state_BTH: Tensor, gone: frozenset[int] | set[int], as_tuple: bool
    ) -> Iterator[None]:
        """Make missing layers return their input; that of the first is stored, so no earlier layer is computed.

        Args:
            start: the first missing layer.
            state_BTH: its input.
            gone: all missing layers.
            as_tuple: whether the layers of this model return tuples.
        """

        def return_stored(*args: Any, **kwargs: Any) -> Any:
            return (state_BTH, None) if as_tuple else state_BTH

        def return_input(*args: Any, **kwargs: Any) -> Any:
            x_BTH = first_input(args, kwargs)
            return (x_BTH, None) if as_tuple else x_BTH

        replaced = {layer: return_stored if layer == start else return_input for layer in {*range(start + 1), *gone}}
        if not self.reuses:
            replaced = dict.fromkeys(gone, return_input)
        with replaced_forwards([(self.layers[layer], forward) for layer, forward in replaced.items()]):
            yield

    def _add(self, number: int, ids_BT: Tensor, found: BackboneOutput, whole: BackboneOutput) -> None:
        """Add the terms of a candidate, row by row; the whole model's logits of a row are computed again."""
        for row in range(len(ids_BT)):
            own, logits_TV = slice(row, row + 1), found.logits(row)
            if self.metric == "perplexity":
                losses_1T, predicted_1T = token_losses(
                    logits_TV[None], ids_BT[own], self.attended_BT[own], self.predicted_BT[own]
                )
                terms = [losses_1T.sum(dtype=sum_dtype(losses_1T.device)), predicted_1T.sum()]
            else:
                terms = list(_squared_change(logits_TV, whole.logits(row), self.mask_BT[row]))
            del logits_TV  # before the next row's
            self.sums[number] += torch.stack([term.cpu().double() for term in terms])

    def gather(self) -> None:
        """Add up the sums of all processes, which took the batches in turns, and restore the order of the rows."""
        self.sums = self._add_up(self.sums).cpu()
        super().gather()

    def scores(self) -> list[float]:
        """Perplexity of every candidate, or Σ(change of the logits)² / Σ(logits)²."""
        above, below = self.sums.unbind(1)
        ratios = (above / below).tolist()
        return [math.exp(min(ratio, 700.0)) for ratio in ratios] if self.metric == "perplexity" else ratios


def _squared_change(logits_TV: Tensor, full_TV: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the unmasked tokens of (change of the logits)² and (logits of the whole model)², in float64."""
    size = max(1, (1 << 22) // full_TV.shape[1])  # logits converted to float64 at a time: 32 MB
    change = full = torch.zeros((), dtype=torch.float64)
    for logits, whole, mask in zip(logits_TV.split(size), full_TV.split(size), mask_T.split(size)):
        whole_nV = whole[mask.to(whole.device)].to(sum_dtype(whole.device))
        change_nV = logits[mask.to(logits.device)].to(sum_dtype(logits.device)) - whole_nV.to(logits.device)
        change = change + change_nV.square().sum().cpu()
        full = full + whole_nV.square().sum().cpu()
    return change, full


def without_layers(spec: ArchSpec, model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
    """A stock model without some layers, which shares all tensors with the original.

    Raises:
        PlanError: if the stock config cannot describe the remaining layers.
    """
    sizes = spec.sizes(model.config)
    kept = tuple(layer for layer in range(sizes["layers"]) if layer not in gone)
    config = build_student_config(spec, model.config, {**sizes, "layers": len(kept)}, kept)
    use_same_kernels(config, model.config)
    with input_device(model), init_empty_weights(include_buffers=False), no_init_weights():
        shallow = build_from_config(type(model), config, model.dtype)
    left = {"layers": np.array(kept)}
    for name, source, shape in spec.student_tensors(named_tensors(model), config, kept):
        tensor = tensor_values(model, source).detach()
        if tuple(tensor.shape) != shape:  # embeddings for every layer, outside the layers
            pattern, _ = spec.locate(source) or (source, None)
            for position, dimension in enumerate(spec.dimensions[pattern]):
                if (index := dimension_index(dimension, sizes, left)) is not None:
                    tensor = tensor.index_select(position, torch.from_numpy(index).to(tensor.device))
        set_tensor(shallow, name, tensor)
    put_on_one_device(shallow, input_device(model))
    shallow.tie_weights()
    shallow.generation_config = model.generation_config
    return shallow.eval()
