"""Makes students of given sizes or given units: as a plan, or as the teacher with the cut units at zero.

Methods that cut every layer alike, or drop whole layers, give a plan and so a stock checkpoint. Methods that cut some
layers more than others give the teacher's stock class with the cut units at zero: a unit whose tensors are all zero
has zero gradients, so training leaves it there, and the student is the pruned one bit for bit. The stock class has one
size for all layers, so it is no checkpoint of its size, and only what is not cut is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron_hf import ImportanceScores, PrunerConfig, count_parameters, make_plan, prune_with_plan
from minitron_hf.data import TokenRows
from minitron_hf.families import named_tensors, spec_for
from minitron_hf.files import json_values
from minitron_hf.models import architecture_digest, empty_model
from minitron_hf.scoring.weights import below_diagonal_nan, unit_indices
from minitron_hf.weights import model_digest

from .peer_criteria import GROUPS, NEURONS, layers_of

#: Whether each unit stays: axis → one bool tensor per layer.
Kept = Mapping[str, Sequence[Tensor]]


@dataclass
class Start:
    """A student before distillation.

    Attributes:
        student: a model that `benchmarks.real.measure` can measure.
        num_parameters: what the method stores, adapters and biases included, units at zero not.
        is_stock: whether it is a stock checkpoint of that size.
        sizes: what was kept, for the record.
        plan: the plan, where there is one.
    """

    student: Any
    num_parameters: int
    is_stock: bool
    sizes: dict[str, Any] = field(default_factory=dict)
    plan: Any = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the weights."""
        described = {"num_parameters": self.num_parameters, "is_stock": self.is_stock, "sizes": self.sizes}
        return dict(json_values(described))


# ---- Sizes ----


def unit_parameters(config: Any) -> dict[str, int]:
    """Parameters of one unit of a layer, by axis, and of a whole layer under `"layers"`; biases included."""
    spec, model = spec_for(config), empty_model(config)
    sizes, found = spec.sizes(config), {NEURONS: 0, GROUPS: 0, "layers": 0}
    for name, tensor in named_tensors(model).items():
        pattern, layer = spec.locate(name) or (name, None)
        if layer != 0:
            continue
        found["layers"] += tensor.numel()
        for axis in (NEURONS, GROUPS):
            if any(unit_indices(one, axis, spec, sizes) is not None for one in spec.dimensions[pattern]):
                found[axis] += tensor.numel() // sizes[axis]
    return found


def num_layers_within(teacher: Any, limit: int) -> int:
    """The most layers that fit.

    Raises:
        ValueError: if there are none.
    """
    each, depth = unit_parameters(teacher.config)["layers"], len(layers_of(teacher))
    left = depth - -(-(count_parameters(teacher) - limit) // each)
    if left < 1:
        raise ValueError(f"No student of {limit:,} parameters has a layer: {each:,} each.")
    return min(depth, left)


def sizes_within(config: Any, limit: int, num_cut: int | None = None) -> dict[str, int]:
    """Groups of heads and neurons that stay in each of `num_cut` layers (default: all).

    The part r of these layers' parameters that has to go decides the groups, ⌊r·groups⌋ of which go, as in the
    authors' code for one ratio; the neurons are as many as still fit.

    Raises:
        ValueError: if that takes more than these layers hold.
    """
    spec, each = spec_for(config), unit_parameters(config)
    sizes = spec.sizes(config)
    num_cut = sizes["layers"] if num_cut is None else num_cut
    excess = count_parameters(config) - limit
    groups = sizes[GROUPS] - min(sizes[GROUPS] - 1, int(excess / (num_cut * each["layers"]) * sizes[GROUPS]))
    left = excess - num_cut * (sizes[GROUPS] - groups) * each[GROUPS]
    neurons = sizes[NEURONS] - max(0, -(-left // (num_cut * each[NEURONS])))
    if neurons < 1:
        raise ValueError(f"{num_cut} layers cannot be cut so far that {limit:,} parameters are left.")
    return {GROUPS: groups, NEURONS: neurons}


# ---- Students ----


def planned(
    teacher: Any,
    rows: TokenRows,
    name: str,
    request: PrunerConfig,
    units: Mapping[str, Tensor] | None = None,
    blocks: Tensor | None = None,
) -> Start:
    """The student of a request, by scores of units and of blocks of layers: a stock checkpoint."""
    spec, config = spec_for(teacher.config), teacher.config
    sizes = spec.sizes(config)
    depth = sizes["layers"]
    axes = {axis: scores.float() for axis, scores in (units or {}).items()}
    if GROUPS in axes:  # all heads of a kept group stay
        axes["heads"] = torch.zeros(depth, sizes["heads"])
    scores = ImportanceScores(
        axes,
        below_diagonal_nan(torch.zeros(depth, depth)) if blocks is None else blocks.float(),
        {"metric": name},
        {
            "model": model_digest(teacher),
            "architecture": architecture_digest(config),
            "tokenizer": None,
            "data": rows.digest,
        },
    )
    plan = make_plan(teacher, request, scores)
    student = prune_with_plan(teacher, plan)
    described = {axis: one["student"] for axis, one in plan.sizes.items()}
    described["layers_dropped"] = list(plan.layers_dropped)
    return Start(student, count_parameters(student), True, described, plan)


def cut_alike(teacher: Any, rows: TokenRows, name: str, units: Mapping[str, Tensor], limit: int) -> Start:
    """Every layer keeps the same number of groups and of neurons, those of the highest scores."""
    sizes = sizes_within(teacher.config, limit)
    each = spec_for(teacher.config).sizes(teacher.config)
    heads = each["heads"] // each[GROUPS] * sizes[GROUPS]
    request = PrunerConfig(
        intermediate_size=sizes[NEURONS],
        num_key_value_heads=sizes[GROUPS],
        num_attention_heads=heads,
    )
    return planned(teacher, rows, name, request, units)


def zeroed(model: Any, kept: Kept) -> Start:
    """Set the units that do not stay to zero, in place."""
    spec, each = spec_for(model.config), unit_parameters(model.config)
    sizes, count = spec.sizes(model.config), count_parameters(model)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            pattern, layer = spec.locate(name) or (name, None)
            if layer is None:
                continue
            for position, dimension in enumerate(spec.dimensions[pattern]):
                for axis, stays in kept.items():
                    units = unit_indices(dimension, axis, spec, sizes)
                    if units is not None:
                        mask_D = stays[layer][torch.from_numpy(units)].to(tensor)
                        tensor.mul_(mask_D.reshape([-1 if p == position else 1 for p in range(tensor.ndim)]))
    described = {axis: [int(one.sum()) for one in stays] for axis, stays in kept.items()}
    for axis, stays in kept.items():
        count -= each[axis] * sum(int((~one).sum()) for one in stays)
    return Start(model, count, False, described)


def top(scores: Tensor, count: int) -> Tensor:
    """Whether each unit is among the `count` of the highest scores; ties go to the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return kept


def with_biases(model: Any) -> Any:
    """A copy of a Llama in the stock class with biases, all zero.

    Raises:
        ValueError: if the stock class has no such biases.
    """
    config = copy.deepcopy(model.config)
    for flag in ("attention_bias", "mlp_bias"):
        if not hasattr(config, flag):
            raise ValueError(f"{type(config).__name__} has no {flag}: there is no place for the biases.")
        setattr(config, flag, True)
    made: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith(".bias") for name in missing), missing
    with torch.no_grad():
        for name in missing:
            made.get_parameter(name).zero_()
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()
