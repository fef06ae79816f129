"""Criteria of other pruners: what they measure of layers, heads and neurons, on the rows that we score with too.

They are written from the papers and from the authors' code, in our own terms; `peer_agreement` says which of them keep
what the authors' code keeps. All tokens of a row count, as in the authors' code.

Legend of shape suffixes: B rows of a batch, T tokens of a row, H hidden width, D inputs of a projection, F neurons,
G groups of heads that share a KV head, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from minitron_hf.data import TokenRows
from minitron_hf.families import ArchSpec, named_tensors, spec_for
from minitron_hf.models import evaluating
from minitron_hf.scoring.hook_points import UnitView
from minitron_hf.scoring.weights import unit_indices

BATCH_SIZE = 8
#: The axes that these methods cut in every layer: neurons, and heads with the KV head that they share.
NEURONS, GROUPS = "ffn", "kv"


def batches(rows: TokenRows, size: int = BATCH_SIZE) -> Iterator[Tensor]:
    """Token ids [B, T] of consecutive rows of one length: no padding, so no method needs a mask."""
    chunk: list[Any] = []
    for row in rows.rows:
        if chunk and (len(chunk) == size or len(row) != len(chunk[0])):
            yield torch.tensor([list(one) for one in chunk])
            chunk = []
        chunk.append(row)
    if chunk:
        yield torch.tensor([list(one) for one in chunk])


def layers_of(model: Any) -> Any:
    """The list of layers."""
    return model.get_submodule(spec_for(model.config).layers_path)


def output_of(result: Any) -> Tensor:
    """The residual stream in what a layer returns."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def run(model: Any, rows: TokenRows, hooks: Callable[[ExitStack], None]) -> None:
    """A forward pass without the head over all rows, with hooks."""
    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        hooks(stack)
        for ids_BT in batches(rows):
            model.base_model(input_ids=ids_BT.to(model.device), use_cache=False)


# ---- Layers ----


def block_influence(model: Any, rows: TokenRows) -> Tensor:
    """ShortGPT (arXiv 2403.03853, eq. 1): 1 − E[cos(input of a layer, its output)] over all tokens, [L]."""
    layers = layers_of(model)
    sums, counts = torch.zeros(len(layers), dtype=torch.float64), torch.zeros(len(layers))

    def observe(index: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, result: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            cosines = torch.cosine_similarity(before.float(), output_of(result).float(), dim=-1)
            sums[index] += (1 - cosines).sum(dtype=torch.float64)
            counts[index] += cosines.numel()

        return hook

    def hooks(stack: ExitStack) -> None:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(observe(index), with_kwargs=True).remove)

    run(model, rows, hooks)
    return sums / counts


def angular_distances(model: Any, rows: TokenRows, count: int) -> Tensor:
    """PruneMe (arXiv 2403.17887, eq. 7): arccos(cos)/π between input and output of `count` layers, at the last token.

    The output of the last layer is taken behind the final norm, as in PruneMe's code, which reads the hidden states
    that Transformers returns.

    Returns:
        The mean over rows for every first layer of such a block, [L − count + 1].
    """
    layers = layers_of(model)
    norm = model.get_submodule(spec_for(model.config).final_norm)
    states: list[Tensor] = []
    sums = torch.zeros(len(layers) - count + 1, dtype=torch.float64)

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        states[:] = [(args[0] if args else kwargs["hidden_states"])[:, -1].float()]

    def add(_: Any, __: Any, result: Any) -> None:
        last_BH = output_of(result)[:, -1]
        states.append((norm(last_BH) if len(states) == len(layers) else last_BH).float())
        first = len(states) - 1 - count
        if first >= 0:
            cosines = torch.cosine_similarity(states[first], states[-1], dim=-1).clamp(-1, 1)
            sums[first] += (torch.arccos(cosines) / math.pi).sum(dtype=torch.float64)

    def hooks(stack: ExitStack) -> None:
        stack.callback(layers[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(add).remove)

    run(model, rows, hooks)
    return sums / len(rows)


# ---- Heads and neurons ----


def input_units(spec: ArchSpec, axis: str, sizes: Any) -> Tensor:
    """The unit that every input of the projection after an axis belongs to, [D]."""
    module = spec.hook_points[axis]
    dimension = spec.dimensions[f"{module}.weight"][UnitView(spec, axis, module, sizes).position]
    units = unit_indices(dimension, axis, spec, sizes)
    assert units is not None
    return torch.from_numpy(units)


def over_units(values_D: Tensor, units_D: Tensor) -> Tensor:
    """Sum over the inputs of every unit."""
    return values_D.new_zeros(int(units_D.max()) + 1).index_add_(0, units_D, values_D)


def group_taylor(model: Any, rows: TokenRows, *, by_element: bool) -> dict[str, Tensor]:
    """LLM-Pruner (arXiv 2305.11627, eq. 3 and 5): first-order importance of coupled structures, {axis: [L, units]}.

    Args:
        model: gradients are left as they were.
        rows: their mean cross-entropy is differentiated.
        by_element: sum |w·∂L/∂w| over the elements (`--taylor param_first`); otherwise |Σ w·∂L/∂w| over each row or
            column of a structure (`--taylor vectorize`). The tensors of a structure are added (`--grouping_strategy
            sum`).
    """
    spec, gradients = spec_for(model.config), weight_gradients(model, rows)
    sizes = spec.sizes(model.config)
    found = {
        axis: torch.zeros(sizes["layers"], sizes[axis], dtype=torch.float64)
        for axis in (NEURONS, GROUPS)
        if axis in sizes
    }
    tensors = named_tensors(model)
    for name, gradient in gradients.items():
        pattern, layer = spec.locate(name) or (name, None)
        terms = tensors[name].detach().float() * gradient
        for position, dimension in enumerate(spec.dimensions[pattern]):
            for axis, scores in found.items():
                units = unit_indices(dimension, axis, spec, sizes)
                if units is not None:
                    others = [place for place in range(terms.ndim) if place != position]
                    sums = terms.abs() if by_element else terms
                    sums_D = sums.sum(others).abs() if others else sums.abs()
                    scores[layer] += over_units(sums_D.double().cpu(), torch.from_numpy(units))
    return found


def weight_gradients(model: Any, rows: TokenRows) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy with respect to all matrices of layers, float32."""
    spec = spec_for(model.config)
    chosen = {
        name: tensor
        for name, tensor in named_tensors(model).items()
        if tensor.ndim == 2 and (spec.locate(name) or (name, None))[1] is not None
    }
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        num_predicted = sum(len(row) - 1 for row in rows.rows)
        with evaluating([model]), torch.enable_grad():
            for ids_BT in batches(rows, 4):
                logits = model(input_ids=ids_BT.to(model.device), use_cache=False).logits[:, :-1].float()
                targets = ids_BT[:, 1:].to(logits.device)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                (loss / num_predicted).backward()
                for name, tensor in chosen.items():
                    assert tensor.grad is not None
                    found[name] = tensor.grad.float() + found.get(name, 0)
                    tensor.grad = None
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return found


class Fluctuation:
    """FLAP (arXiv 2312.11983, eq. 4): variance and mean of the inputs of a projection, row after row.

    The authors' code updates both by row: with m_j the mean over the first j of N rows, the variance is
    Σ_{j ≥ 2} (j − 1)/j · Σ_t (x_jt − m_j)² / (N − 1), summed over the tokens t of a row. This is what is summed here.
    """

    def __init__(self) -> None:
        self.num_rows, self.mean, self.sums = 0, 0.0, 0.0

    def add(self, x_BTD: Tensor) -> None:
        """Add the rows of a batch."""
        for x_TD in x_BTD.float():
            self.num_rows += 1
            count = self.num_rows
            self.mean = self.mean + (x_TD.mean(0).double() - self.mean) / count
            if count > 1:
                deviation = x_TD.double() - self.mean
                self.sums = self.sums + (count - 1) / count * deviation.square().sum(0)

    @property
    def variance_D(self) -> Any:
        """The variance of every input, [D]."""
        return self.sums / max(1, self.num_rows - 1)


def fluctuations(model: Any, rows: TokenRows) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Axis → for every layer the metric Var(x_d)·‖W_d‖² (`WIFV`) and the mean of every input of its projection."""
    spec, layers = spec_for(model.config), layers_of(model)
    found = {(axis, index): Fluctuation() for axis in (GROUPS, NEURONS) for index in range(len(layers))}

    def hooks(stack: ExitStack) -> None:
        for (axis, index), sums in found.items():
            module = layers[index].get_submodule(spec.hook_points[axis])

            def hook(_: Any, args: Any, sums: Fluctuation = sums) -> None:
                sums.add(args[0])

            stack.callback(module.register_forward_pre_hook(hook).remove)

    run(model, rows, hooks)
    result: dict[str, list[tuple[Tensor, Tensor]]] = {GROUPS: [], NEURONS: []}
    for (axis, index), sums in found.items():
        weight = layers[index].get_submodule(spec.hook_points[axis]).weight.detach()
        result[axis].append((sums.variance_D * weight.double().square().sum(0).cpu(), sums.mean))
    return result


def wanda(weight: Tensor, squares_D: Tensor) -> Tensor:
    """Wanda (arXiv 2306.11695, eq. 1) by structure: the mean over outputs of |W_od|·‖X_d‖, [D]."""
    return (weight.detach().double().abs() * squares_D.double().sqrt()).mean(0)


# ---- Layer by layer ----


class LayerWalk:
    """The layers of a model one after another on all rows: the inputs of the next one, and what it is called with.

    Args:
        model: its layers may be changed while they are walked.
        rows: without padding.
    """

    def __init__(self, model: Any, rows: TokenRows) -> None:
        self.layers = layers_of(model)
        self.states: list[Tensor] = []
        self.arguments: list[dict[str, Any]] = []

        class Caught(Exception):
            pass

        def catch(_: Any, args: Any, kwargs: Any) -> None:
            arguments = dict(kwargs)
            self.states.append(args[0] if args else arguments.pop("hidden_states"))
            self.arguments.append(arguments)
            raise Caught

        with torch.no_grad(), evaluating([model]):
            handle = self.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
            for ids_BT in batches(rows):
                try:
                    model.base_model(input_ids=ids_BT.to(model.device), use_cache=False)
                except Caught:
                    continue
            handle.remove()

    @torch.no_grad()
    def run(self, index: int) -> list[Tensor]:
        """The outputs of a layer, which becomes no step of the walk."""
        return [output_of(self.layers[index](x, **given)) for x, given in zip(self.states, self.arguments)]
