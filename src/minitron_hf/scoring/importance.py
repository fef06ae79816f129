"""`estimate_importance`: calibration data → `ImportanceScores` for every width axis and every layer.

One forward pass without the output head gives all of them (P1 §2.2, arXiv 2407.14679).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, get_args, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import DataSource, TokenRows
from ..errors import DataError
from ..families import ArchSpec, spec_for
from ..families.tensors import named_tensors
from ..files import public_name
from ..models import architecture_digest, evaluating, plain_model
from ..sizes.layers import protected_layers, reason_against_layers
from ..sizes.request import PrunerConfig
from ..weights import input_device, model_digest
from .calibration import Calibration, _processes, calibrate, tokenizer_digest
from .depth import DepthFunction, DepthMetric, DepthPass, without_layers
from .observers import ActivationMetric, ScoringPass
from .reductions import Reduction
from .scores import ImportanceScores, Metric, _smallest, require_finite
from .taylor import TaylorPass
from .weights import weight_magnitudes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def estimate_importance(
    model: PreTrainedModel, data: DataSource | None = None, *, metric: Metric = ..., **kwargs: Any
) -> ImportanceScores: ...


@overload
def estimate_importance(
    model: PreTrainedModel, data: DataSource | None = None, *, metric: Sequence[Metric], **kwargs: Any
) -> dict[Metric, ImportanceScores]: ...


def estimate_importance(  # type: ignore[misc] # the overloads leave out what is the same in both
    model: PreTrainedModel,
    data: DataSource | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    metric: Metric | Sequence[Metric] = "activation",
    batch_reduction: Reduction = "l2",
    sequence_reduction: Reduction = "mean",
    num_samples: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    depth_metric: DepthMetric | DepthFunction | None = None,
    block_length: int | None = None,
    one_by_one: bool = False,
    keep_first_layers: int = 1,
    keep_last_layers: int = 1,
    seed: int = 0,
    show_progress: bool = True,
) -> ImportanceScores | dict[Metric, ImportanceScores]:
    """Score every width axis and every contiguous block of layers in one forward pass over calibration rows.

    Metrics, of which the first three share one pass:

    - `"activation"`: per token, a unit's activation is: for a head ‖its output before the output projection‖₂; for a
      KV group ‖its contribution to the attention output‖₂; for an MLP neuron its value at the input of the down
      projection (NVIDIA Model-Optimizer's choice); for a hidden channel its value in the output of a norm, where the
      reduced scores of all norms are summed. For an expert it is ‖router weight · its output‖₂, as in REAP (arXiv
      2510.13999, eq. 5 before its mean), for a neuron of an expert router weight · its value at the input of the down
      projection, and 0 at tokens that are routed elsewhere: the down projection is linear, so the weighted values are
      what a plain MLP in the expert's place would be given, and a neuron that only fires where the router hardly
      listens does not matter.
    - `"pre_activation"`: the same, but neurons are taken before the nonlinearity, as in P1 §2.2: the output of the
      projection that makes them. Where there are two, gate and up, their reduced scores are summed.
    - `"contribution"`: weight × activation: ‖what the unit adds to the output of the projection that reads it‖₂, for
      heads, groups and neurons alike; for a channel, its value times the norm of what the matrices of the layer (after
      the last norm: the head) hold for it.
    - `"taylor"`: `|Σ x·∂L/∂x|` over the tokens of a row, which is the `|Σ w·∂L/∂w|` of P1 §2.2 over the weights that
      read the unit; blocks of layers likewise. It needs a backward pass, without gradients of weights, and ignores
      `sequence_reduction`.
    - `"magnitude"`: ‖all weights of the unit‖₂. A control, without data.
    - `"random"`: the control that every result should be shown beside.

    Layers are scored by the same pass, as blocks of every length, unless `depth_metric` asks for what it costs to do
    without them: `"perplexity"` of the model without the block; `"logit_nmse"`, Σ(change of the logits)² / Σ(logits)²;
    or any function of a model, the lower the better, which is given a stock model without the block. No ranking was
    best on all small models that were measured (README, "Does it work?").

    Activations are reduced over the tokens of a row, then over rows (P1 Table 13: batch L2 with sequence mean is best
    or second). Padding tokens never count, so the scores do not depend on batch size, padding side or the order of
    batches.

    Models that `device_map="auto"` spreads over devices, main memory and disk are scored as they are. Under
    `accelerate launch` every process calls this function with the same arguments: they take the batches in turns, and
    all return the scores that a single process would.

    Args:
        model: teacher; not changed.
        data: calibration texts, token rows, or a dataset (see `token_rows`), or a `DataLoader` of batches, each a
            mapping with `input_ids` and `attention_mask` tensors [B, T], all of which are used. Not needed by
            `"magnitude"` and `"random"`.
        processing_class: tokenizer, needed for texts.
        metric: one of the metrics above, or several of them.
        batch_reduction: reduction over rows: `"l2"`, `"mean"` (of absolute values) or `"var"`.
        sequence_reduction: reduction over the tokens of a row, likewise.
        num_samples: rows to use (P1, P2: 1,024).
        max_length: tokens in a row; default 512, or the model's positions where they are fewer.
        packing: join texts into full rows instead of one text a row.
        batch_size: rows at a time. Memory grows with `batch_size × max_length × (layers + 1) × hidden_size`.
        depth_metric: `"perplexity"`, `"logit_nmse"` or a function `model -> float`; None: the metric's own.
        block_length: with `depth_metric`, how many layers will go: blocks of that length and single layers are
            measured. None: blocks of all lengths, which takes L/3 times as long for L layers.
        one_by_one: with `depth_metric`, remove `block_length` layers one after another instead of in one block: always
            the one that the model is best without (Nemotron Elastic does so by `"logit_nmse"`).
        keep_first_layers: with `one_by_one`, layers at the beginning that stay.
        keep_last_layers: with `one_by_one`, layers at the end that stay.
        seed: of `metric="random"`.
        show_progress: show a progress bar.

    Returns:
        The scores, with digests of model, tokenizer and data; for several metrics a dict of them.

    Raises:
        UnsupportedModelError: if the family is unknown or the model is not what its table says.
        DataError: if there is no calibration text, too little of it, or no tokenizer for it.
    """
    metrics: list[Metric] = [metric] if isinstance(metric, str) else list(metric)
    for name, values, allowed in (
        ("metric", metrics, Metric),
        ("batch_reduction", [batch_reduction], Reduction),
        ("sequence_reduction", [sequence_reduction], Reduction),
    ):
        if unknown := [value for value in values if value not in get_args(allowed)]:
            raise DataError(f"{name}={unknown[0]!r} is unknown. Expected one of {', '.join(get_args(allowed))}.")
    model = plain_model(model)
    spec = spec_for(model.config)
    spec.check(model)
    require_depth(spec.sizes(model.config)["layers"], depth_metric, block_length, one_by_one)
    named = public_name(model.config._name_or_path)
    digests: dict[str, str | None] = {
        "model": model_digest(model),
        "architecture": architecture_digest(model.config),
        "tokenizer": None if processing_class is None else tokenizer_digest(processing_class),
        "data": None,
    }
    found: dict[Metric, ImportanceScores] = {}

    def note(name: Metric, axes: Mapping[str, Tensor], blocks: Tensor, settings: Mapping[str, Any]) -> None:
        require_finite(spec, model, axes)
        known = {"model": named, "metric": name}
        found[name] = ImportanceScores(axes, blocks, {**known, **settings}, dict(digests))

    if "random" in metrics:
        note("random", *_random_scores(spec, model, seed), {"seed": seed})
    if "magnitude" in metrics:
        note("magnitude", *weight_magnitudes(spec, model), {})
    watched: list[ActivationMetric] = [name for name in get_args(ActivationMetric) if name in metrics]
    needed = isinstance(depth_metric, str)
    if watched or "taylor" in metrics or needed:
        calibration = calibrate(model, data, processing_class, num_samples, max_length, packing, batch_size)
        reductions = {"batch_reduction": batch_reduction, "sequence_reduction": sequence_reduction}
        if watched:
            pass_ = ScoringPass(spec, model, sequence_reduction, watched)
            settings = {**reductions, **_run_pass(pass_, model, calibration, digests, show_progress)}
            for name in watched:
                note(name, pass_.axis_scores(batch_reduction, name), pass_.block_scores(), settings)
        if "taylor" in metrics:
            taylor = TaylorPass(spec, model)
            settings = {
                "batch_reduction": batch_reduction,
                **_run_pass(taylor, model, calibration, digests, show_progress),
            }
            note("taylor", taylor.axis_scores(batch_reduction), taylor.block_scores(batch_reduction), settings)
    if depth_metric is not None:
        depth = spec.sizes(model.config)["layers"]
        ends = PrunerConfig(keep_first_layers=keep_first_layers, keep_last_layers=keep_last_layers)
        protected = protected_layers(spec, model.config, ends)
        fixed = protected_layers(spec, model.config, replace(ends, keep_first_layers=0, keep_last_layers=0))

        def possible(gone: Iterable[int]) -> bool:
            left = sorted(set(range(depth)) - set(gone))
            return fixed.isdisjoint(gone) and not reason_against_layers(spec, model.config, left)

        def without(candidates: list[tuple[int, ...]], dropped: list[int]) -> list[float]:
            if callable(depth_metric):
                return [_worth(depth_metric, without_layers(spec, model, (*dropped, *gone))) for gone in candidates]
            layers = DepthPass(spec, model, depth_metric, candidates, dropped)
            depth_settings.update(_run_pass(layers, model, calibration, digests, show_progress))
            return layers.scores()

        depth_settings: dict[str, Any] = {}
        if one_by_one:
            assert block_length is not None
            blocks, removals, baseline = _one_after_another(depth, block_length, protected, possible, without)
        else:
            lengths = range(1, depth) if block_length is None else {1, block_length}
            blocks, baseline = _every_block(depth, lengths, possible, without)
            removals = None
        depth_settings |= {
            "depth_metric": getattr(depth_metric, "__name__", depth_metric),
            "depth_baseline": baseline,
            "block_length": block_length,
            "one_by_one": one_by_one,
        }
        for name, scores in found.items():
            settings = {**scores.settings, **depth_settings}
            found[name] = replace(scores, blocks=blocks, removals=removals, settings=settings, digests=dict(digests))
    return found[metrics[0]] if isinstance(metric, str) else {name: found[name] for name in metrics}


def require_depth(
    depth: int, depth_metric: DepthMetric | DepthFunction | None, block_length: int | None, one_by_one: bool
) -> None:
    """Refuse a way to score layers that says nothing, or more than there are; see `estimate_importance`.

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
        raise DataError(f"block_length={block_length}: expected 1 to {depth - 1} of the {depth} layers to go.")
    if one_by_one and block_length is None:
        raise DataError("one_by_one needs to know how many layers go. Pass block_length.")


#: Values of candidates, each the layers to go without, where some layers are gone already.
_Without = Callable[[list[tuple[int, ...]], list[int]], list[float]]


def _worth(function: DepthFunction, model: PreTrainedModel) -> float:
    value = float(function(model))
    if math.isnan(value):
        raise DataError(f"depth_metric {getattr(function, '__name__', function)!r} gave NaN. Expected a number.")
    return value


def _every_block(
    depth: int, lengths: Iterable[int], possible: Callable[[Iterable[int]], bool], without: _Without
) -> tuple[Tensor, float]:
    """Values without every contiguous block of some lengths, float32 [L, L], and the value of the whole model."""
    blocks_of = {n: [tuple(range(first, first + n)) for first in range(depth - n + 1)] for n in sorted(lengths)}
    candidates = [gone for tried in blocks_of.values() for gone in tried if possible(gone)]
    baseline, *values = without([(), *candidates], [])
    blocks = torch.full((depth, depth), torch.nan)
    for gone, value in zip(candidates, values, strict=True):
        blocks[gone[0], gone[-1]] = value
    return blocks, baseline


def _one_after_another(
    depth: int,
    count: int,
    protected: Collection[int],
    possible: Callable[[Iterable[int]], bool],
    without: _Without,
) -> tuple[Tensor, Tensor, float]:
    """Values of single layers, float32 [L, L]; of each step, float32 [count, L]; and of the whole model."""
    if depth - len(protected) < count:
        raise DataError(
            f"block_length={count}: only {depth - len(protected)} of {depth} layers may go, the others are protected. "
            "Lower it, or keep_first_layers or keep_last_layers."
        )
    removals = torch.full((count, depth), torch.nan)
    dropped: list[int] = []
    baseline = math.nan
    for step in range(count):
        left = [layer for layer in range(depth) if layer not in {*dropped, *protected}]
        left = [layer for layer in left if possible((*dropped, layer))]
        if not left:
            raise DataError(f"None of the layers can go once {dropped} are gone. Pass a smaller block_length.")
        first, *values = without([(), *((layer,) for layer in left)], dropped)
        baseline = baseline if step else first
        removals[step, left] = torch.tensor(values)
        dropped.append(_smallest(removals[step].tolist()))
    return removals[0].diag().masked_fill(~torch.eye(depth, dtype=torch.bool), torch.nan), removals, baseline


def _run_pass(
    pass_: ScoringPass | TaylorPass | DepthPass,
    model: PreTrainedModel,
    calibration: Calibration,
    digests: dict[str, str | None],
    show_progress: bool,
) -> dict[str, Any]:
    """Feed all batches to a pass, in turns with the other processes; what to record of them."""
    rank, num_processes = _processes()
    device = input_device(model)
    with (
        evaluating([model]),
        torch.no_grad(),
        pass_.hooks(),
        tqdm(
            total=None if calibration.num_batches is None else -(-calibration.num_batches // num_processes),
            desc="Scoring",
            disable=rank > 0 or not show_progress,
        ) as bar,
    ):
        for batch in islice(calibration.batches(), rank, None, num_processes):
            names = ("input_ids", "attention_mask", "scored_mask")
            pass_.run({name: batch[name].to(device) for name in names if name in batch})
            bar.update()
    if num_processes > 1:
        pass_.gather()
    if not pass_.num_tokens:
        raise DataError(
            "The calibration batches hold no tokens. Pass a list of texts, or a DataLoader that is not empty."
        )
    rows = tuple(row for batch_rows in pass_.rows for row in batch_rows)
    digests["data"] = TokenRows(rows, None).digest
    return {
        "num_rows": pass_.num_rows,
        "num_tokens": pass_.num_tokens,
        "max_length": max(map(len, rows)),
        "packing": calibration.packing,
    }


def _random_scores(spec: ArchSpec, model: PreTrainedModel, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = spec.sizes(model.config)
    names = list(named_tensors(model, tied=True))
    axes = {}
    for axis in spec.axes:
        having = spec.layers_with(axis.name, names)
        if axis.prunable and axis.name != "layers" and (having or not axis.per_layer):
            axes[axis.name] = torch.rand(spec.units(axis.name, model.config), generator=generator)
            if axis.per_layer:
                for layer, sizes_in_layer in enumerate(spec.layer_sizes(model.config)):
                    axes[axis.name][layer, ..., sizes_in_layer[axis.name] :] = torch.nan
                lacking = sorted(set(range(sizes["layers"])) - set(having))
                axes[axis.name][lacking] = torch.nan
    blocks = torch.rand(sizes["layers"], sizes["layers"], generator=generator)
    return axes, blocks.masked_fill(torch.ones_like(blocks, dtype=torch.bool).tril(-1), torch.nan)
