"""Scores layers by the value of the model without them, in blocks or one after another.

Legend of shape suffixes: L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError, UnsupportedModelError
from ..sizes.layers import protected_layers, reason_against_layers
from ..sizes.request import PrunerConfig
from .depth import DepthFunction, DepthMetric, DepthPass, without_layers
from .runs import ScoringRun
from .scores import index_of_smallest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DepthRequest:
    """How layers are scored; the fields are arguments of `estimate_importance`."""

    depth_metric: DepthMetric | DepthFunction | None
    block_length: int | None
    one_by_one: bool
    keep_first_layers: int
    keep_last_layers: int

    def require_possible(self, depth: int) -> None:
        """Refuse a request that does not fit a number of layers.

        Raises:
            DataError: naming the argument.
        """
        require_depth(depth, self.depth_metric, self.block_length, self.one_by_one)

    @property
    def needs_data(self) -> bool:
        """Whether layers are scored on calibration data."""
        return isinstance(self.depth_metric, str)


def require_depth(
    depth: int, depth_metric: DepthMetric | DepthFunction | None, block_length: int | None, one_by_one: bool
) -> None:
    """Refuse arguments of `estimate_importance` that score layers and do not fit a number of layers.

    Raises:
        DataError: naming the argument.
    """
    if depth_metric is not None and not callable(depth_metric) and depth_metric not in get_args(DepthMetric):
        known = ", ".join(get_args(DepthMetric))
        raise DataError(f"depth_metric={depth_metric!r} is unknown. Expected {known}, or a function of a model.")
    if depth_metric is None and (block_length is not None or one_by_one):
        raise DataError(
            "block_length and one_by_one say what depth_metric measures. Pass it, for example 'perplexity', or leave "
            "them out."
        )
    if block_length is not None and not 0 < block_length < depth:
        raise DataError(f"block_length={block_length}: expected 1 to {depth - 1} of the {depth} layers.")
    if one_by_one and block_length is None:
        raise DataError("one_by_one needs the number of layers to remove. Pass block_length.")


@dataclass
class LayerScores:
    """Scores of layers by a depth metric.

    Attributes:
        blocks: float32 [L, L], see `ImportanceScores`.
        removals: float32 [N, L] where layers were removed one after another, see `ImportanceScores`.
        settings: how they were measured.
    """

    blocks: Tensor
    removals: Tensor | None
    settings: dict[str, Any]


def score_layers(run: ScoringRun, request: DepthRequest) -> LayerScores:
    """Measure the model without blocks of layers, or without layers that are removed one after another.

    Raises:
        DataError: if fewer layers may go than are asked for, or a function gives NaN.
        UnsupportedModelError: if the model computes values that are not finite.
    """
    removal = _Removal(run, request)
    blocks, removals, baseline = removal.one_after_another() if request.one_by_one else removal.every_block()
    settings = {
        **removal.settings,
        "depth_metric": _name_of(request.depth_metric),
        "depth_baseline": baseline,
        "block_length": request.block_length,
        "one_by_one": request.one_by_one,
    }
    return LayerScores(blocks, removals, settings)


class _Removal:
    """Values of one model without some of its layers.

    Attributes:
        settings: of the calibration rows, once they were read.
    """

    def __init__(self, run: ScoringRun, request: DepthRequest) -> None:
        self.run, self.request = run, request
        self.depth = run.spec.sizes(run.model.config)["layers"]
        self.settings: dict[str, Any] = {}

    def values(self, candidates: list[tuple[int, ...]], dropped: Collection[int] = ()) -> list[float]:
        """The value of the model without each candidate and the layers that were dropped before."""
        run, metric = self.run, self.request.depth_metric
        if callable(metric):
            shown = tqdm(candidates, desc="Measuring layers", unit="model", disable=not run.show_progress)
            return [_value(metric, without_layers(run.spec, run.model, (*dropped, *gone))) for gone in shown]
        assert metric is not None
        layers = DepthPass(run.spec, run.model, metric, candidates, tuple(dropped))
        self.settings |= run.feed(layers)
        found = layers.scores()
        if any(map(math.isnan, found)):
            raise UnsupportedModelError(
                f"depth_metric={metric!r} is not finite: the model computes NaN or infinities in "
                f"{str(run.model.dtype).removeprefix('torch.')}. Check its weights, or score it in a wider dtype."
            )
        return found

    def is_possible(self, gone: Collection[int]) -> bool:
        """Whether the stock config can describe the remaining layers."""
        fixed = self._protected(keep_first_layers=0, keep_last_layers=0)
        left = sorted(set(range(self.depth)) - set(gone))
        return fixed.isdisjoint(gone) and not reason_against_layers(self.run.spec, self.run.model.config, left)

    def _protected(self, keep_first_layers: int, keep_last_layers: int) -> frozenset[int]:
        """Layers that may not go."""
        ends = PrunerConfig(keep_first_layers=keep_first_layers, keep_last_layers=keep_last_layers)
        return frozenset(protected_layers(self.run.spec, self.run.model.config, ends))

    def every_block(self) -> tuple[Tensor, None, float]:
        """Values without every contiguous block of the lengths asked for, [L, L], and of the whole model."""
        length = self.request.block_length
        lengths: Iterable[int] = range(1, self.depth) if length is None else sorted({1, length})
        blocks_of = {n: [tuple(range(first, first + n)) for first in range(self.depth - n + 1)] for n in lengths}
        candidates = [gone for tried in blocks_of.values() for gone in tried if self.is_possible(gone)]
        baseline, *values = self.values([(), *candidates])
        blocks = torch.full((self.depth, self.depth), torch.nan)
        for gone, value in zip(candidates, values, strict=True):
            blocks[gone[0], gone[-1]] = value
        return blocks, None, baseline

    def one_after_another(self) -> tuple[Tensor, Tensor, float]:
        """Values of single layers, [L, L]; of each step, [block_length, L]; and of the whole model."""
        count = self.request.block_length
        protected = self._protected(self.request.keep_first_layers, self.request.keep_last_layers)
        assert count is not None
        if self.depth - len(protected) < count:
            raise DataError(
                f"block_length={count}: only {self.depth - len(protected)} of {self.depth} layers can be removed, the "
                "others are protected. Lower it, or keep_first_layers or keep_last_layers."
            )
        removals = torch.full((count, self.depth), torch.nan)
        dropped: list[int] = []
        baseline = math.nan
        for step in range(count):
            left = [layer for layer in range(self.depth) if layer not in {*dropped, *protected}]
            left = [layer for layer in left if self.is_possible((*dropped, layer))]
            if not left:
                raise DataError(f"No other layer can be removed after {dropped}. Pass a smaller block_length.")
            first, *values = self.values([(), *((layer,) for layer in left)], dropped)
            baseline = baseline if step else first
            removals[step, left] = torch.tensor(values)
            dropped.append(index_of_smallest(removals[step].tolist()))
        blocks = removals[0].diag().masked_fill(~torch.eye(self.depth, dtype=torch.bool), torch.nan)
        return blocks, removals, baseline


def _name_of(metric: Any) -> str:
    """The name of a metric, a function, the function in a `functools.partial`, or the class of a callable object."""
    if isinstance(metric, functools.partial):
        return _name_of(metric.func)
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _value(function: DepthFunction, model: PreTrainedModel) -> float:
    value = float(function(model))
    if math.isnan(value):
        raise DataError(f"depth_metric {_name_of(function)!r} gave NaN. Expected a number.")
    return value
