"""The students of other pruners, from the same teacher, rows and number of parameters as ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from minitron_hf import PrunerConfig, count_parameters
from minitron_hf.data import TokenRows
from minitron_hf.families import spec_for
from minitron_hf.scoring.weights import below_diagonal_nan

from .peer_criteria import (
    GROUPS,
    NEURONS,
    LayerWalk,
    angular_distances,
    batches,
    block_influence,
    fluctuations,
    group_taylor,
    input_units,
    layers_of,
    over_units,
    wanda,
)
from .peer_students import (
    Kept,
    Start,
    cut_alike,
    num_layers_within,
    planned,
    sizes_within,
    top,
    unit_parameters,
    with_biases,
    zeroed,
)
from .slicegpt import largest_width, sliced

#: Layers at the beginning and the end that LLM-Pruner's scripts leave alone, of 32 (`--block_mlp_layer_start 4
#: --block_mlp_layer_end 30`); in proportion where there are more or fewer.
EXCLUDED, OF_LAYERS = (4, 2), 32


@dataclass(frozen=True)
class Method:
    """A pruner.

    Attributes:
        title: for tables.
        build: teacher, rows and the largest number of parameters → start.
        criterion: name in `agreement.json`, which compares it with the authors' code; None where nothing is compared.
        is_module: whether the student is a module of its own, which cannot be distilled here.
        needs: package that it needs.
    """

    title: str
    build: Callable[[Any, TokenRows, int], Start]
    criterion: str | None = None
    is_module: bool = False
    needs: str | None = None


def build_start(method: str, teacher: Any, rows: TokenRows, target: float) -> Start:
    """The student of a method with at most so many parameters, or such a fraction of the teacher's.

    Raises:
        ValueError: if the method is unknown, or cannot make a student that small.
        ModuleNotFoundError: if the package of the method is missing.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Expected ours, {', '.join(METHODS)}.")
    needs = METHODS[method].needs
    if needs is not None and find_spec(needs) is None:
        raise ModuleNotFoundError(f"method={method!r} needs the package {needs}: pip install {needs}", name=needs)
    limit = math.floor(target * count_parameters(teacher)) if target < 1 else int(target)
    start = METHODS[method].build(teacher, rows, limit)
    if start.num_parameters > limit:
        raise ValueError(f"method={method!r} made {start.num_parameters:,} parameters. Expected at most {limit:,}.")
    return start


# ---- Methods ----


def shortgpt(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """The single layers with the least influence go."""
    influence, left = block_influence(teacher, rows), num_layers_within(teacher, limit)
    blocks = below_diagonal_nan(torch.zeros(len(influence), len(influence))) + torch.diag(influence)
    request = PrunerConfig(num_hidden_layers=left, contiguous=False, keep_first_layers=0, keep_last_layers=0)
    return planned(teacher, rows, "shortgpt", request, blocks=blocks)


def pruneme(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """The block with the least angular distance goes; never the first layer, as in PruneMe's code."""
    left, depth = num_layers_within(teacher, limit), len(layers_of(teacher))
    distances = angular_distances(teacher, rows, depth - left)
    blocks = torch.full((depth, depth), torch.nan)
    for first, distance in enumerate(distances.tolist()):
        blocks[first, first + depth - left - 1] = distance
    request = PrunerConfig(num_hidden_layers=left, contiguous=True, keep_first_layers=1, keep_last_layers=0)
    return planned(teacher, rows, "pruneme", request, blocks=blocks)


def llm_pruner(teacher: Any, rows: TokenRows, limit: int, *, by_element: bool, excludes: bool = True) -> Start:
    """Coupled heads and neurons with the least first-order importance go, in every layer but the excluded ones."""
    scores = group_taylor(teacher, rows, by_element=by_element)
    if not excludes:
        return cut_alike(teacher, rows, "llm-pruner", scores, limit)
    depth = len(layers_of(teacher))
    first, last = (round(part * depth / OF_LAYERS) for part in EXCLUDED)
    cut = range(first, depth - last)
    sizes = sizes_within(teacher.config, limit, len(cut))
    kept = {
        axis: [top(one, sizes[axis] if layer in cut else len(one)) for layer, one in enumerate(scores[axis])]
        for axis in (GROUPS, NEURONS)
    }
    return zeroed(copy.deepcopy(teacher), kept)


def flap_scores(teacher: Any, rows: TokenRows) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """FLAP's metric and the mean of every input, by axis and layer, [D]; squared for heads, as in their code."""
    found = fluctuations(teacher, rows)
    metrics = {
        axis: [metric.square() if axis == GROUPS else metric for metric, _ in layers] for axis, layers in found.items()
    }
    return metrics, {axis: [mean for _, mean in layers] for axis, layers in found.items()}


def flap(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """FLAP as its script runs it (`AL-AM`): one threshold for all standardised metrics, and biases that make up."""
    metrics, means = flap_scores(teacher, rows)
    scores = standardised(teacher, metrics)
    model = with_biases(teacher)
    each, excess = unit_parameters(model.config), count_parameters(model) - limit
    kept = flap_choice(scores, each, excess)
    add_means(model, kept, means)
    return zeroed(model, kept)


def standardised(teacher: Any, metrics: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Metrics with mean 0 and deviation 1 in every layer, {axis: [L, units]}; of a group, the mean over its inputs."""
    spec = spec_for(teacher.config)
    sizes, found = spec.sizes(teacher.config), {}
    for axis, layers in metrics.items():
        units_D = input_units(spec, axis, sizes)
        each = torch.bincount(units_D).double()
        found[axis] = torch.stack([over_units((one - one.mean()) / one.std(), units_D) / each for one in layers])
    return found


def flap_choice(scores: Mapping[str, Tensor], each: Mapping[str, int], excess: int) -> dict[str, list[Tensor]]:
    """Units above one threshold: the lowest go, whatever they are, until `excess` parameters are gone.

    Args:
        scores: axis → [L, units].
        each: parameters of a unit.
        excess: parameters that have to go.
    """
    values = torch.cat([scores[axis].flatten() for axis in scores])
    weights = torch.cat([torch.full((scores[axis].numel(),), each[axis]) for axis in scores])
    order = torch.argsort(values, stable=True)
    gone = int((weights[order].cumsum(0) < excess).sum()) + 1 if excess > 0 else 0
    stays = torch.ones(len(values), dtype=torch.bool)
    stays[order[:gone]] = False
    parts = stays.split([one.numel() for one in scores.values()])
    return {axis: list(part.reshape(one.shape)) for (axis, one), part in zip(scores.items(), parts, strict=True)}


def add_means(model: Any, kept: Kept, means: Mapping[str, Sequence[Tensor]]) -> None:
    """Biases that add what the cut inputs add on average (FLAP, eq. 7), before they are cut."""
    spec, layers = spec_for(model.config), layers_of(model)
    sizes = spec.sizes(model.config)
    with torch.no_grad():
        for axis, stays in kept.items():
            units_D = input_units(spec, axis, sizes)
            for layer, own, mean_D in zip(layers, stays, means[axis], strict=True):
                module = layer.get_submodule(spec.hook_points[axis])
                gone_D = torch.where(own[units_D], torch.zeros_like(mean_D), mean_D).to(module.weight.device)
                module.bias.copy_(module.bias.double() + module.weight.double() @ gone_D)


def flap_alike(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """FLAP with one ratio in all layers (`UL-UM`), and the biases: a stock checkpoint."""
    metrics, means = flap_scores(teacher, rows)
    model, spec = with_biases(teacher), spec_for(teacher.config)
    sizes = spec.sizes(teacher.config)
    units = {
        axis: torch.stack([over_units(one, input_units(spec, axis, sizes)) for one in layers])
        for axis, layers in metrics.items()
    }
    chosen = sizes_within(model.config, limit)
    add_means(model, {axis: [top(one, chosen[axis]) for one in scores] for axis, scores in units.items()}, means)
    return cut_alike(model, rows, "flap", units, limit)


def wanda_sp(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """Wanda's structured form in FLAP's code: layer by layer, each scored on the outputs of pruned layers."""
    sizes = sizes_within(teacher.config, limit)
    return cut_alike(teacher, rows, "wanda-sp", wanda_scores(teacher, rows, sizes), limit)


def wanda_scores(teacher: Any, rows: TokenRows, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Scores of groups and neurons, {axis: [L, units]}, where each layer keeps `sizes` of them before the next."""
    model = copy.deepcopy(teacher)
    spec = spec_for(model.config)
    all_sizes, found = spec.sizes(model.config), {GROUPS: [], NEURONS: []}
    walk = LayerWalk(model, rows)
    for index, layer in enumerate(walk.layers):
        squares: dict[str, Any] = {}
        handles = []
        for axis in found:

            def add(_: Any, args: Any, axis: str = axis, squares: dict[str, Any] = squares) -> None:
                squares[axis] = args[0].float().square().sum((0, 1)).double() + squares.get(axis, 0)

            handles.append(layer.get_submodule(spec.hook_points[axis]).register_forward_pre_hook(add))
        walk.run(index)
        for handle in handles:
            handle.remove()
        kept: dict[str, list[Tensor]] = {}
        for axis, scores in found.items():
            metric_D = wanda(layer.get_submodule(spec.hook_points[axis]).weight, squares[axis]).cpu()
            scores.append(over_units(metric_D, input_units(spec, axis, all_sizes)))
            everything = torch.ones(all_sizes[axis], dtype=torch.bool)
            kept[axis] = [everything] * len(walk.layers)
            kept[axis][index] = top(scores[-1], sizes[axis])
        zeroed(model, kept)
        walk.states = walk.run(index)
    return {axis: torch.stack(scores) for axis, scores in found.items()}


def slicegpt(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """SliceGPT: every block in its own principal axes, with adapters in the residual path."""
    width = largest_width(teacher, limit)
    model = sliced(teacher, rows, width)
    return Start(model, sum(one.numel() for one in model.parameters()), False, {"width": width})


def optipfair(teacher: Any, rows: TokenRows, limit: int) -> Start:
    """The package of that name, with its data-driven choice of neurons (peak-to-peak weights × activations)."""
    from optipfair import prune_model

    each = unit_parameters(teacher.config)
    size, depth = teacher.config.intermediate_size, len(layers_of(teacher))
    gone = -(-(count_parameters(teacher) - limit) // (depth * each[NEURONS]))
    data = [{"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)} for ids_BT in batches(rows)]
    student = prune_model(
        copy.deepcopy(teacher),
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * gone / size + 1e-9,  # it rounds down
        dataloader=data,
        show_progress=False,
    )
    return Start(student.eval(), count_parameters(student), True, {NEURONS: student.config.intermediate_size})


METHODS: dict[str, Method] = {
    "shortgpt": Method("ShortGPT: layers by block influence", shortgpt, "block_influence"),
    "pruneme": Method("PruneMe: a block of layers by angular distance", pruneme, "angular_distance"),
    "llm-pruner": Method(
        "LLM-Pruner: first-order Taylor by element, first and last layers whole",
        lambda *given: llm_pruner(*given, by_element=True),
        "taylor_element",
    ),
    "llm-pruner-vector": Method(
        "LLM-Pruner: first-order Taylor by vector, first and last layers whole",
        lambda *given: llm_pruner(*given, by_element=False),
        "taylor_vector",
    ),
    "llm-pruner-alike": Method(
        "LLM-Pruner: first-order Taylor by element, all layers alike",
        lambda *given: llm_pruner(*given, by_element=True, excludes=False),
        "taylor_element",
    ),
    "flap": Method("FLAP: fluctuation over all layers, with biases", flap, "flap_all_layers"),
    "flap-alike": Method("FLAP: fluctuation, all layers alike, with biases", flap_alike, "flap_alike"),
    "wanda-sp": Method("Wanda, structured", wanda_sp, "wanda_sp"),
    "slicegpt": Method("SliceGPT: rotation by block, adapters counted", slicegpt, "slicegpt", is_module=True),
    "optipfair": Method("optipfair: neurons by weights and activations", optipfair, needs="optipfair"),
}
