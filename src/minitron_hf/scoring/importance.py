"""`estimate_importance`: calibration data → `ImportanceScores` for every width axis and every layer.

One forward pass without the output head gives all of them (Muralidharan et al. 2024, arXiv 2407.14679 §2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args, overload

from torch import Tensor

from ..data import DataSource
from ..errors import DataError, accept_old_names, checks_kinds
from ..families import spec_for
from ..models import plain_model
from ..names import public_name
from .activations import ActivationPass
from .calibration import load_calibration
from .covariance import CovariancePass
from .depth import DepthFunction, DepthMetric
from .gradients import GradientPass
from .metrics import ImportanceMetric, find_metrics
from .reductions import Reduction
from .removal import DepthRequest, score_layers
from .runs import ScoringRun
from .scores import ImportanceScores, Metric, require_finite
from .weights import unobserved_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def estimate_importance(
    model: PreTrainedModel, data: DataSource | None = None, *, metric: Metric = ..., **kwargs: Any
) -> ImportanceScores: ...


@overload
def estimate_importance(
    model: PreTrainedModel, data: DataSource | None = None, *, metric: Sequence[Metric], **kwargs: Any
) -> dict[str, ImportanceScores]: ...


@accept_old_names(num_samples="num_rows")  # type: ignore[misc] # the overloads leave out what is the same in both
@checks_kinds
def estimate_importance(
    model: PreTrainedModel,
    data: DataSource | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    metric: Metric | Sequence[Metric] = "activation",
    batch_reduction: Reduction = "l2",
    sequence_reduction: Reduction = "mean",
    num_rows: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    depth_metric: DepthMetric | DepthFunction | None = None,
    block_length: int | None = None,
    one_by_one: bool = False,
    keep_first_layers: int = 1,
    keep_last_layers: int = 1,
    hidden_covariance: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> ImportanceScores | dict[str, ImportanceScores]:
    """Score every width axis and every contiguous block of layers in one forward pass over calibration rows.

    Long because all arguments are explained.

    Metrics are functions of `minitron_hf.scoring.metrics`, which defines each; `register_metric` adds one.
    `"activation"`, `"activation_range"`, `"pre_activation"` and `"contribution"` share one forward pass. `"taylor"`
    needs a backward pass, without gradients of weights. `"magnitude"` and `"random"` are controls that need no data;
    show every result beside `"random"`.

    The same pass scores layers, as blocks of every length, by their block importance (arXiv 2407.14679 §2.2). With
    `depth_metric`, layers are scored by the model without them instead.

    Activations are reduced over the tokens of a row, then over rows (arXiv 2407.14679, table 13: L2 over rows and the
    mean over tokens are best or second). Padding tokens never count: scores do not depend on batch size, padding side
    or the order of batches.

    Models that `device_map="auto"` spreads over devices, main memory and disk are scored in place. Under `accelerate
    launch`, every process calls this function with the same arguments, takes its share of the batches, and returns the
    scores that a single process would.

    Args:
        model: teacher; not changed.
        data: calibration texts, token rows, or a dataset (see `token_rows`), or a `DataLoader` of batches, each a
            mapping with `input_ids` and `attention_mask` tensors [B, T], all of which are used. Metrics that read
            weights or a seed need none.
        processing_class: tokenizer, needed for texts.
        metric: name of a metric, or several names.
        batch_reduction: reduction over rows: `"l2"`, `"mean"` (of absolute values) or `"var"`.
        sequence_reduction: reduction over the tokens of a row, likewise. `"taylor"` sums instead.
        num_rows: number of rows; arXiv 2407.14679 and 2408.11796 use 1,024.
        max_length: tokens in a row; default 512, or the model's context where it is shorter.
        packing: join texts into full rows instead of one text a row.
        batch_size: rows at a time. Memory grows with `batch_size × max_length × (layers + 1) × hidden_size`; logits,
            where a metric needs them, exist for one row at a time.
        depth_metric: score of a model without some layers, the lower the better: `"perplexity"`; `"logit_nmse"`,
            Σ(change of the logits)² / Σ(logits)²; or a function `model -> float`, called with stock models. None:
            block importance, or the block scores of the metric itself.
        block_length: with `depth_metric`, number of layers to remove: blocks of that length and single layers are
            measured. None: blocks of all lengths, which takes L/3 times as long for L layers.
        one_by_one: with `depth_metric`, remove `block_length` layers one after another instead of one block: each time
            the layer whose removal leaves the best model (Nemotron Elastic does so by `"logit_nmse"`).
        keep_first_layers: with `one_by_one`, number of first layers to keep.
        keep_last_layers: with `one_by_one`, number of last layers to keep.
        hidden_covariance: also sum up the covariance of the residual stream, in a second pass;
            `PrunerConfig(hidden_basis="principal")` needs it.
        seed: seed of `metric="random"`.
        show_progress: show a progress bar.

    Returns:
        The scores, with digests of model, tokenizer and data; for several metrics a dict of them.

    Raises:
        UnsupportedModelError: if the family is unknown or the model differs from its table.
        DataError: if a metric is unknown, or there is no calibration text, too little of it, or no tokenizer for it.
    """
    metrics = find_metrics([metric] if isinstance(metric, str) else metric)
    reductions = {"batch_reduction": batch_reduction, "sequence_reduction": sequence_reduction}
    require_reductions(reductions)
    model = plain_model(model)
    spec = spec_for(model.config)
    spec.check(model)
    depth = DepthRequest(depth_metric, block_length, one_by_one, keep_first_layers, keep_last_layers)
    depth.require_possible(spec.sizes(model.config)["layers"])
    run = ScoringRun(spec, model, None, show_progress)
    run.add_digests(processing_class)
    if hidden_covariance or depth.needs_data or any(each.needs_data for each in metrics):
        run.calibration = load_calibration(model, data, processing_class, num_rows, max_length, packing, batch_size)
    found = dict(_width_scores(run, metrics, reductions, seed))
    if depth_metric is not None:
        layers = score_layers(run, depth)
        for name, scores in found.items():
            settings = {**scores.settings, **layers.settings}
            found[name] = replace(
                scores, blocks=layers.blocks, removals=layers.removals, settings=settings, digests=dict(run.digests)
            )
    if hidden_covariance:
        covariances = CovariancePass(spec, model)
        run.feed(covariances)
        for name, scores in found.items():
            found[name] = replace(scores, covariance=covariances.covariance, digests=dict(run.digests))
    return found[metric] if isinstance(metric, str) else {name: found[name] for name in metric}


def require_reductions(reductions: Mapping[str, str]) -> None:
    """Refuse unknown reductions.

    Raises:
        DataError: naming the argument.
    """
    for name, value in reductions.items():
        if value not in get_args(Reduction):
            raise DataError(f"{name}={value!r} is unknown. Expected one of {', '.join(get_args(Reduction))}.")


def _width_scores(
    run: ScoringRun, metrics: Sequence[ImportanceMetric], reductions: Mapping[str, Reduction], seed: int
) -> Iterator[tuple[str, ImportanceScores]]:
    """Scores by every metric; those that read activations share one pass."""
    batch_reduction = reductions["batch_reduction"]
    spec, model = run.spec, run.model
    for metric in metrics:
        if metric.reads == "weights":
            yield metric.name, _scores(run, metric, metric.function(spec, model), {})
        elif metric.reads == "seed":
            yield metric.name, _scores(run, metric, metric.function(spec, model, seed), {"seed": seed})
    if watched := [metric for metric in metrics if metric.reads in ("activations", "pre_activations")]:
        activations = ActivationPass(spec, model, reductions["sequence_reduction"], [each.name for each in watched])
        settings = {**reductions, **run.feed(activations)}
        for metric in watched:
            axes = activations.axis_scores(batch_reduction, metric.name)
            yield metric.name, _scores(run, metric, (axes, activations.block_scores()), settings)
    for metric in metrics:
        if metric.reads == "gradients":
            gradients = GradientPass(spec, model, metric)
            settings = {"batch_reduction": batch_reduction, **run.feed(gradients)}
            found = gradients.axis_scores(batch_reduction), gradients.block_scores(batch_reduction)
            yield metric.name, _scores(run, metric, found, settings)


def _scores(
    run: ScoringRun,
    metric: ImportanceMetric,
    found: tuple[Mapping[str, Tensor], Tensor],
    settings: Mapping[str, Any],
) -> ImportanceScores:
    """Check what a metric found, and add how it was made.

    Raises:
        UnsupportedModelError: if it is not finite.
        DataError: if it does not have the shape of the axes.
    """
    own = {**found[0], **unobserved_scores(run.spec, run.model, found[0])}
    axes, blocks = {axis: values.float() for axis, values in own.items()}, found[1].float()
    depth = run.spec.sizes(run.model.config)["layers"]
    for name, values in {**axes, "blocks": blocks}.items():
        expected = (depth, depth) if name == "blocks" else run.spec.units(name, run.model.config)
        if tuple(values.shape) != tuple(expected):
            raise DataError(
                f"metric {metric.name!r} returned scores of {name!r} of shape {tuple(values.shape)}. Expected "
                f"{tuple(expected)}."
            )
    require_finite(run.spec, run.model, axes)
    recorded = {"model": public_name(run.model.config.name_or_path), "metric": metric.name, **settings}
    return ImportanceScores(axes, blocks, recorded, dict(run.digests))
