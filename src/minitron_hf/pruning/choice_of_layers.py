"""Chooses the layers to keep, by their importance scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..families import ArchSpec
from ..scoring.scores import ImportanceScores
from ..sizes.layers import protected_layers, reason_against_layers
from ..sizes.request import PrunerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: From so many layers on, a block was worse than single layers of SmolLM2-135M: with 8 and 12 of 30 layers. With 4 and
#: 6 it was better (`benchmarks/results/real/starts-before`).
LARGE_BLOCK = 8


def choose_layers(
    spec: ArchSpec, teacher: PretrainedConfig, left: int, request: PrunerConfig, scores: ImportanceScores | None
) -> tuple[int, ...]:
    """Teacher indices of the layers to keep: those with the lowest scores go, as far as the model stays possible."""
    depth = spec.sizes(teacher)["layers"]
    num_drop = depth - left

    def without(drop: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(set(range(depth)) - set(drop)))

    if request.layers_to_drop is not None or num_drop == 0:
        return without(request.layers_to_drop or ())
    assert scores is not None
    protected = protected_layers(spec, teacher, request)
    if request.contiguous:
        starts = [start for start in range(left + 1) if protected.isdisjoint(range(start, start + num_drop))]
        if not starts:
            raise PlanError(
                f"num_hidden_layers={left}: there are no {num_drop} contiguous layers to drop between the protected "
                f"ones, {sorted(protected)}. Keep more layers, or set contiguous to false."
            )
        blocks = [range(start, start + num_drop) for start in starts]
        possible = [block for block in blocks if not reason_against_layers(spec, teacher, without(block))]
        importance = scores.blocks.diagonal(num_drop - 1)
        measured = [float(importance[block.start]) for block in possible]
        _require_measured(measured, scores, f"blocks of {num_drop} layers")
        least = min(possible or blocks, key=lambda block: float(importance[block.start]))
        if importance[least.start] == math.inf:
            raise PlanError(
                f"num_hidden_layers={left}: no {num_drop} contiguous layers hold those that were dropped in earlier "
                "rounds of scoring. Score again, for the sizes of this plan."
            )
        return without(least)
    drop: list[int] = []
    movable = sorted(set(range(depth)) - protected)
    if scores.removals is not None:
        drop = scores.removed_layers[:num_drop]
        lacking = reason_against_layers(spec, teacher, without(drop))
        if len(drop) < num_drop or not protected.isdisjoint(drop) or lacking:
            raise PlanError(
                f"The scores removed layers {scores.removed_layers} one after another, and {num_drop} of the layers "
                f"{movable} are to go{f' ({lacking})' if lacking else ''}. Score again with block_length={num_drop}, "
                f"keep_first_layers={request.keep_first_layers} and keep_last_layers={request.keep_last_layers}, "
                "or set contiguous."
            )
        return without(drop)
    _require_measured([float(scores.layers[layer]) for layer in movable], scores, "single layers")
    ranked = sorted(movable, key=lambda layer: float(scores.layers[layer]))
    while len(drop) < num_drop:
        # A layer that others need may go once they are gone.
        free = [layer for layer in ranked if not reason_against_layers(spec, teacher, without([*drop, layer]))]
        if not free:
            why = reason_against_layers(spec, teacher, without([*drop, ranked[0]]))
            raise PlanError(f"num_hidden_layers={left}, of them the last {request.keep_last_layers}: {why}")
        drop.append(free[0])
        ranked.remove(free[0])
    return without(drop)


def tried_layer_sets(scores: ImportanceScores) -> list[dict[str, Any]]:
    """The score of the model without each set of layers that was tried, best first."""
    tried: dict[tuple[int, ...], float] = {}
    for first, last in (~scores.blocks.isnan()).nonzero().tolist():
        tried[tuple(range(first, last + 1))] = float(scores.blocks[first, last])
    if scores.removals is not None:
        for step, row in enumerate(scores.removals.tolist()):
            gone = scores.removed_layers[:step]
            for layer, value in enumerate(row):
                if not math.isnan(value):
                    tried[tuple(sorted([*gone, layer]))] = value
    return [
        {"dropped": list(layers), "score": value}
        for layers, value in sorted(tried.items(), key=lambda item: (len(item[0]), item[1]))
    ]


def _require_measured(values: Sequence[float], scores: ImportanceScores, what: str) -> None:
    if any(math.isnan(value) for value in values):
        raise PlanError(
            f"The scores by {scores.settings.get('depth_metric')} do not hold all {what}: they were made with "
            f"block_length={scores.settings.get('block_length')}, one_by_one={scores.settings.get('one_by_one')}. "
            "Score again with block_length the number of layers that go, or set contiguous to match."
        )
