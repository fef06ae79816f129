"""Importance metrics: the registry, and the metrics of this package.

A metric is one decorated function. What it reads decides how it is called and when (see `register_metric`).

Legend of shape suffixes: U units of an axis, R dimensions of one unit, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DataError, did_you_mean
from ..families import ArchSpec
from .reductions import accumulation_dtype
from .weights import below_diagonal_nan, sum_by_unit, zero_scores

#: What a metric reads: activations, activations with neurons before their nonlinearity, gradients of the loss with
#: respect to activations, weights, or a seed.
Reads = Literal["activations", "pre_activations", "gradients", "weights", "seed"]

#: Other packages offer metrics under this group of entry points; each names a registered function.
ENTRY_POINTS = "minitron_hf.metrics"

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class ImportanceMetric:
    """A registered metric.

    Attributes:
        name: its name for users.
        reads: kind of input of its function, see `register_metric`.
        function: the function.
    """

    name: str
    reads: Reads
    function: Callable[..., Any]

    @property
    def needs_data(self) -> bool:
        """Whether it is computed on calibration data."""
        return self.reads not in ("weights", "seed")


#: The metrics that are known in this process, by name.
METRICS: dict[str, ImportanceMetric] = {}


def register_metric(name: str, *, reads: Reads = "activations") -> Callable[[_Function], _Function]:
    """Make a function an importance metric: `estimate_importance`, recipes and the command line take it by name.

    It is known in this process. A package that offers the function as an entry point of the group
    `minitron_hf.metrics` makes it known everywhere, also to the command line.

    Input and result of the function, by `reads`:

    - `"activations"`: `UnitActivations` of one axis in one layer → one value per token and unit, `[..., U]`.
    - `"pre_activations"`: the same, but neurons before their nonlinearity.
    - `"gradients"`: activations x and ∂L/∂x of the same shape → one term per element, in that shape.
    - `"weights"`: `ArchSpec` and model → scores of all axes and of blocks, as in `ImportanceScores`.
    - `"seed"`: `ArchSpec`, model and seed → likewise.

    Values of activations are reduced over tokens and rows as `estimate_importance` is told to. Terms of gradients are
    summed over the tokens of a row and the dimensions of a unit, then reduced over rows.

    Args:
        name: its name for users.
        reads: kind of input of the function.

    Returns:
        A decorator that returns the function itself.

    Raises:
        DataError: if the name belongs to another function, or `reads` is unknown.

    Example:
        >>> @register_metric("largest")  # doctest: +SKIP
        ... def largest(units):
        ...     return units.values.abs().amax(-1)
    """
    if reads not in get_args(Reads):
        raise DataError(f"reads={reads!r} is unknown. Expected one of {', '.join(get_args(Reads))}.")

    def register(function: _Function) -> _Function:
        known = METRICS.get(name)
        if known is not None and _origin(known.function) != _origin(function):
            raise DataError(
                f"There is an importance metric {name!r} already ({'.'.join(_origin(known.function))}). "
                "Choose another name."
            )
        METRICS[name] = ImportanceMetric(name, reads, function)
        return function

    return register


def metric_names() -> tuple[str, ...]:
    """Names of all metrics: of this package, of entry points, and registered in this process."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return tuple(METRICS)


def find_metrics(names: Iterable[str]) -> list[ImportanceMetric]:
    """Metrics by name.

    Raises:
        DataError: if a name is unknown; the message lists those that are known.
    """
    known = metric_names()
    if not names:
        raise DataError(f"metric={names!r} names no metric. Expected one or several of {', '.join(known)}.")
    names = list(dict.fromkeys(names))  # each once: the sums of a metric are shared by its name
    for name in names:
        if name not in known:
            raise DataError(
                f"metric={name!r} is unknown.{did_you_mean(str(name), known)} Expected one of {', '.join(known)}. "
                "register_metric adds a metric."
            )
    return [METRICS[name] for name in names]


def require_one_metric(name: Any) -> None:
    """Refuse several metrics where one decides what is pruned.

    Raises:
        DataError: naming what scores by several.
    """
    if not isinstance(name, str | None):
        raise DataError(
            f"metric={name!r}: expected the name of one metric. For several, call estimate_importance(…) and pass "
            "one of its results as scores=…."
        )


def needs_no_data(name: str | None) -> bool:
    """Whether a metric is computed without calibration data; None is the default metric, which needs some."""
    return name is not None and all(not metric.needs_data for metric in find_metrics([name]))


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and name of a function; a notebook cell that is run again defines the same."""
    return function.__module__, function.__qualname__


@dataclass
class UnitActivations:
    """Activations of all units of one axis in one layer, for the tokens of a batch.

    Attributes:
        values: [..., U, R], the input of the projection that reads the units; for a hidden channel its value in the
            output of a norm, for an expert its output times its router weight, for a neuron of an expert its value
            times that weight, and 0 at tokens that are routed elsewhere. R = 1 for neurons and channels.
        axis: name of the axis: `"ffn"`, `"heads"`, `"kv"`, `"hidden"`, …
        layer: index of the layer; None for the last norm.
        is_scalar: whether each unit is one number with a sign: a neuron or a channel.
        is_group: whether each unit is a group of others: a KV group with its query heads.
        weigh: computes `contribution`; None where that is `norm`.
        ranges: computes `weight_range`.
    """

    values: Tensor
    axis: str
    layer: int | None
    is_scalar: bool = False
    is_group: bool = False
    weigh: Callable[[], Tensor] | None = None
    ranges: Callable[[], Tensor] | None = None

    @cached_property
    def norm(self) -> Tensor:
        """[..., U], the L2 norm of each unit; a scalar unit keeps its sign."""
        if self.is_scalar:
            return self.values[..., 0]
        return torch.linalg.vector_norm(self.values, dim=-1, dtype=accumulation_dtype(self.values))

    @cached_property
    def contribution(self) -> Tensor:
        """[..., U], the L2 norm of what each unit adds to the output of the projection that reads it.

        For a channel: its value times the norm of the weights of its layer (after the last norm: of the head) that
        belong to it.
        """
        return self.norm if self.weigh is None else self.weigh()

    @cached_property
    def weight_range(self) -> Tensor:
        """[U], largest minus smallest weight of each unit, as a share of the layer's largest, summed over matrices.

        1 for channels, whose weights are in all layers.
        """
        like = self.values[..., 0]
        return torch.ones_like(like[0]) if self.ranges is None else self.ranges().to(like.device, like.dtype)


@register_metric("activation")
def activation(units: UnitActivations) -> Tensor:
    """Norm of a unit's activation; of a group, the norm of its contribution (arXiv 2407.14679 §2.2).

    For an expert that is ‖router weight · its output‖₂, as in REAP (arXiv 2510.13999, eq. 5 before its mean).
    """
    return units.contribution if units.is_group else units.norm


@register_metric("pre_activation", reads="pre_activations")
def pre_activation(units: UnitActivations) -> Tensor:
    """`activation`, but neurons before their nonlinearity (arXiv 2407.14679 §2.2); scores of gate and up are added."""
    return activation(units)


@register_metric("contribution")
def contribution(units: UnitActivations) -> Tensor:
    """Weight times activation: the norm of what a unit adds to the output of the projection that reads it."""
    return units.contribution


@register_metric("activation_range")
def activation_range(units: UnitActivations) -> Tensor:
    """`activation` times the range of the unit's weights, which is large where a weight lies far out.

    For neurons as in Martra (arXiv 2512.22671) with activations: gate, up and down projection count alike.
    """
    return activation(units) * units.weight_range


@register_metric("taylor", reads="gradients")
def taylor(x: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss L without the activation x: x · ∂L/∂x.

    Summed over tokens that is Σ w · ∂L/∂w over the weights that read x: the Taylor importance of arXiv
    2407.14679 §2.2 and Molchanov et al. (arXiv 1906.10771).
    """
    return x * gradient


@register_metric("magnitude", reads="weights")
def magnitude(spec: ArchSpec, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """L2 norm of all weights of a unit. A control that needs no data."""
    axes, blocks_LL = sum_by_unit(spec, model, torch.square)
    return {axis: squares.sqrt() for axis, squares in axes.items()}, blocks_LL.sqrt()


@register_metric("random", reads="seed")
def random(spec: ArchSpec, model: PreTrainedModel, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random numbers: the control that every result should be shown beside."""
    generator = torch.Generator().manual_seed(seed)
    axes = {
        axis: torch.rand(zeros.shape, generator=generator) + zeros.float()
        for axis, zeros in zero_scores(spec, model).items()
        if not zeros.isnan().all()
    }
    depth = spec.sizes(model.config)["layers"]
    return axes, below_diagonal_nan(torch.rand(depth, depth, generator=generator))
