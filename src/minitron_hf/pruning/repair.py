"""Refits projections by least squares, so that what stays reproduces the teacher's layers.

A projection W [D, H] reads x [K] in the student. What x lacks of the teacher's inputs is y [R]: the cut neurons or
heads; or, after a norm over channels some of which are cut, the difference of the two norms. With X [N, K] and Y
[N, R] over N tokens and W_R the rows of y: min ‖Y W_R − X Δ‖² + λ‖Δ‖², so Δ = (XᵀX + λI)⁻¹ XᵀY W_R, and the student's
weight is W_K + Δ. Where the projection has a bias, X and Y are centred, and the bias gains ȳ W_R − x̄ Δ; with Δ = 0
this is the mean compensation of FLAP (arXiv 2312.11983). Only XᵀX, XᵀY and the sums of X and Y are accumulated.

The down projection of a routed expert is fitted on the tokens that the student's router gives it, with its inputs
times the router weights; G is its share of what dropped experts computed (`repair_experts`).

Where the layers after a projection are dropped, it takes over the best linear part of what they add: with G [N, H] the
teacher's residual stream after them less that before them, the target is Y W_R + G. Only the last projection of the
layer before does so, and only if the layer adds its output (times a number, which divides G) to the residual stream.

One forward pass of the teacher serves as many inputs as a limit of memory allows, 8·K·(K + R + G) bytes each, in the
order of the layers; a pass ends at its last inputs. A batch's product is formed in float32, the sum in float64.

Legend of shape suffixes: N tokens, D inputs of a projection in the teacher, K those of the student, R inputs whose
residual is made up for, H outputs of a projection (G of them, if layers after it are dropped).
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import DataSource
from ..errors import DataError, UnsupportedModelError, accept_old_names, checks_kinds
from ..families import spec_for
from ..hardware import free_memory
from ..scoring.calibration import load_calibration
from ..scoring.scores import require_weights
from ..weights import input_device, narrowed, tensor_values
from .basis import rotated_model
from .repair_inputs import CutInputs, Projection, cut_inputs
from .repair_passes import Passes
from .repair_sums import Moments, Products
from .stored_layers import is_stored, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import PruningPlan

logger = logging.getLogger(__name__)

#: Fraction of the free memory that the matrices of a pass may take by default.
SHARE_OF_FREE_MEMORY = 0.5
#: Ridges among which held-out rows choose, and the one that is taken without held-out rows.
RIDGES, DEFAULT_RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 1e-3
#: Inputs of a kind, at equal distances, whose held-out rows choose its ridge.
NUM_PROBES = 4
#: Outputs of a projection that are solved at a time: an untied head has as many as the vocabulary.
OUTPUTS_AT_A_TIME = 8192
#: Calibration tokens per kept input below which a warning is logged: the fit follows the text more than the model then
#: (SmolLM2-135M: with 8k tokens for 1,080 neurons the student got worse, with 41k it got better).
TOKENS_PER_INPUT = 16


@accept_old_names(num_samples="num_rows")
@checks_kinds
def repaired_weights(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    num_rows: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    ridge: float | None = None,
    memory_limit: float | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Refit projections to what is kept, for `apply_plan(repaired=…)`.

    The formula stands at the top of this module. Long because all arguments are explained.

    Args:
        model: the teacher; not changed.
        plan: made for it.
        data: calibration texts, token rows, a dataset or a `DataLoader`, as for `estimate_importance`.
        processing_class: tokenizer, needed for texts.
        num_rows: rows to use.
        max_length: tokens in a row.
        packing: join texts into full rows.
        batch_size: rows at a time.
        ridge: λ as a fraction of the mean of the diagonal of XᵀX. By default every fourth row is held out to choose
            one of `RIDGES` for each kind of inputs, with one pass more if there are several; the fit uses all rows.
        memory_limit: bytes that the matrices of one pass may take, by default half of the free memory of the model's
            device. A single input may exceed it, and the held-out sums of four inputs of each kind come on top in a
            single pass.
        show_progress: show a progress bar for each choice of ridges and for the fit.

    Returns:
        Name of a teacher's tensor → the tensor with its kept inputs refitted, in its own dtype. Empty without a cut.

    Raises:
        PlanError: if units are cut that other modules than plain projections or stacked experts read.
        MismatchError: if the plan was made for other weights.
        DataError: if `memory_limit` is not positive; see also `estimate_importance`.
        UnsupportedModelError: if the teacher does not call a projection, or gives it values that are not finite.
    """
    notes: list[str] = []
    refitted = refit(
        model,
        plan,
        data,
        processing_class=processing_class,
        num_rows=num_rows,
        max_length=max_length,
        packing=packing,
        batch_size=batch_size,
        ridge=ridge,
        memory_limit=memory_limit,
        show_progress=show_progress,
        notes=notes,
    )
    weights = dict(refitted)
    for note in notes:
        logger.warning(note)
    return weights


def refit(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | None,
    num_rows: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    ridge: float | None = None,
    memory_limit: float | None = None,
    device: torch.device | None = None,
    show_progress: bool = False,
    notes: list[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield what `repaired_weights` returns, each tensor as soon as it is complete.

    The tensors of the teacher may be on disk. It then runs layer by layer, and the sums of one layer are kept at a
    time, or of a part of it where they exceed `memory_limit`. Long because all arguments are listed.

    Args:
        model: see `repaired_weights`.
        plan: see there.
        data: see there.
        processing_class: see there.
        num_rows: see there.
        max_length: see there.
        packing: see there.
        batch_size: see there.
        ridge: see there.
        memory_limit: see there.
        device: on which a teacher computes whose tensors are on disk.
        show_progress: see there.
        notes: gets notes for the plan, on dropped layers that nothing makes up for.
    """
    model, plan = _checked_arguments(model, plan, memory_limit, ridge)
    if not (inputs := cut_inputs(model, plan, notes)):
        return
    rows = (num_rows, max_length, packing, batch_size)
    calibration = load_calibration(model, data, processing_class, *rows, test_starts=not is_stored(model))
    device = input_device(model) if device is None else device
    limit = SHARE_OF_FREE_MEMORY * free_memory(device) if memory_limit is None else memory_limit
    passes = Passes(model, inputs, calibration, device, show_progress=show_progress)
    probes = probed_inputs(inputs) if ridge is None else []
    by_layer = passes.segment_of if is_stored(model) else None
    groups = list(input_groups(inputs, limit, by_layer))
    ridges = {} if ridge is None else {cut.kind: ridge for cut in inputs}
    if ridge is None and len(groups) > 1:
        ridges = _ridges_in_passes(model, passes, list(input_groups(probes, limit / 2, by_layer)))
    repaired: dict[str, Tensor] = {}
    remaining, num_tokens = list(inputs), 0
    for group, sums, count in passes.in_turn(groups, [] if ridges else probes):
        num_tokens = count
        _require_finite(model, sums)
        ridges = ridges or _medians(_best_ridges(model, probes, sums))
        for cut in group:
            _refit_weights(model, cut, sums.pop(cut.path).all, ridges[cut.kind], repaired)
        del remaining[: len(group)]
        later = {projection.path for cut in remaining for projection in cut.projections}
        for name in [name for name in repaired if name.rpartition(".")[0] not in later]:
            yield name, repaired.pop(name)
    _report(inputs, num_tokens, ridges)


def refitted_bytes(model: PreTrainedModel, plan: PruningPlan) -> int:
    """Bytes of all that `refit` yields: whole tensors of the teacher, in its dtype."""
    whole = rotated_model(model, plan)
    read = {one for cut in cut_inputs(whole, plan.with_whole_vocabulary()) for one in cut.projections}
    names = {one.name for one in read} | {f"{one.path}.bias" for one in read if _has_bias(whole, one)}
    return sum(tensor_values(whole, name).nbytes for name in names)


def _checked_arguments(
    model: PreTrainedModel, plan: PruningPlan, memory_limit: float | None, ridge: float | None
) -> tuple[PreTrainedModel, PruningPlan]:
    """The teacher on the plan's axes, with all tokens; refuses another teacher, and numbers without a meaning."""
    if memory_limit is not None and not memory_limit > 0:
        raise DataError(f"memory_limit={memory_limit!r}: expected a number of bytes above 0.")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise DataError(f"ridge={ridge!r}: expected a number of 0 or more, or None to choose it on held-out rows.")
    spec_for(model.config).check(model)
    require_weights(model, plan.teacher.get("digest"), "The plan and its scores")
    return rotated_model(model, plan), plan.with_whole_vocabulary()


def input_groups(
    inputs: Sequence[CutInputs], limit: float, part_of: Callable[[CutInputs], int] | None = None
) -> Iterator[list[CutInputs]]:
    """Consecutive inputs whose sums fit into a number of bytes together, at least one at a time.

    Args:
        inputs: in the order of the layers.
        limit: number of bytes.
        part_of: what inputs of a group have to have in common.
    """
    group: list[CutInputs] = []
    for cut in inputs:
        is_other = bool(group) and part_of is not None and part_of(cut) != part_of(group[-1])
        if group and (is_other or sum(each.num_bytes for each in [*group, cut]) > limit):
            yield group
            group = []
        group.append(cut)
    if group:
        yield group


def probed_inputs(inputs: Sequence[CutInputs]) -> list[CutInputs]:
    """The inputs whose held-out rows choose the ridge of their kind, at equal distances."""
    found: list[CutInputs] = []
    for kind in sorted({cut.kind for cut in inputs}):
        own = [cut for cut in inputs if cut.kind == kind]
        found += own[:: math.ceil(len(own) / NUM_PROBES)]
    return sorted(found, key=lambda cut: cut.layer)


def _report(inputs: Sequence[CutInputs], num_tokens: int, ridges: Mapping[str, float]) -> None:
    """Log what was fitted, and a warning if the widest inputs had few tokens for each of them."""
    logger.info("Repair: %s inputs fitted to %s tokens, ridges %s.", len(inputs), f"{num_tokens:,}", ridges)
    widest = max(len(cut.kept_K) for cut in inputs)
    if num_tokens < TOKENS_PER_INPUT * widest:
        logger.warning(
            "The repair fits %s inputs to %s calibration tokens. Below %s per input the student may become worse on "
            "other text: raise num_rows, or pass more text.", f"{widest:,}", f"{num_tokens:,}", TOKENS_PER_INPUT,
        )  # fmt: skip


def _require_finite(model: PreTrainedModel, sums: Mapping[str, Products]) -> None:
    """Refuse sums that are not finite."""
    wrong = [path for path, products in sums.items() if not bool(products.all.products.isfinite().all())]
    if wrong:
        raise UnsupportedModelError(
            f"The inputs of {wrong[0]} are not finite in {str(model.dtype).removeprefix('torch.')}. Load the model in "
            "a wider dtype (dtype='float32'), or check its weights."
        )


def _ridges_in_passes(model: PreTrainedModel, passes: Passes, groups: Sequence[list[CutInputs]]) -> dict[str, float]:
    """The ridges that held-out rows choose, from passes over groups of probes alone; their sums are kept twice."""
    best: list[tuple[str, float | None]] = []
    for probes, sums, _ in passes.in_turn(groups, [cut for group in groups for cut in group]):
        best += _best_ridges(model, probes, sums)
        sums.clear()  # before the next pass
    return _medians(best)


def _best_ridges(
    model: PreTrainedModel, probes: Sequence[CutInputs], sums: dict[str, Products]
) -> Iterator[tuple[str, float | None]]:
    """Kind of each of some inputs, and the ridge with the smallest error on held-out rows after a fit to the others.

    None where no rows were held out.
    """
    for cut in probes:
        products, projection = sums[cut.path], cut.projections[0]
        held_out, products.held_out = products.held_out, None  # frees their memory in the end
        if held_out is None or not held_out.count:  # too few rows to hold one out
            yield cut.kind, None
            continue
        weight_DH = _inputs_first(projection.own(read_tensor(model, projection.name)), projection)
        weight_RH = weight_DH[cut.rest_R.to(weight_DH.device)].to(products.all.products)
        fitted = products.all.without(held_out)
        if _has_bias(model, projection):  # the bias makes up for the means of the fitted rows
            held_out.centre_(fitted.mean)
            fitted.centre_()
        errors = {ridge: _held_out_error(fitted, held_out, weight_RH, ridge) for ridge in RIDGES}
        yield cut.kind, min(errors, key=errors.__getitem__)


def _medians(best: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Kind → the lower median of its ridges, or the default of none."""
    found: dict[str, list[float]] = {}
    for kind, ridge in best:
        found.setdefault(kind, []).extend([] if ridge is None else [ridge])
    return {kind: statistics.median_low(ridges) if ridges else DEFAULT_RIDGE for kind, ridges in found.items()}


def _held_out_error(fitted: Moments, held_out: Moments, weight_RH: Tensor, ridge: float) -> float:
    """‖T − X Δ‖² − ‖T‖², T = Y W_R + G, over the held-out rows, with Δ fitted to others; both centred or neither."""
    num_kept = len(fitted.products)
    factors = _factors(fitted.products[:, :num_kept], ridge)
    change_KH = torch.linalg.lu_solve(*factors, _wanted(fitted.products[:, num_kept:], weight_RH))
    held_KK, wanted_KH = held_out.products[:, :num_kept], _wanted(held_out.products[:, num_kept:], weight_RH)
    return float(((held_KK @ change_KH - 2 * wanted_KH) * change_KH).sum())


def _wanted(missing: Tensor, weight_RH: Tensor, part: slice = slice(None)) -> Tensor:
    """Y W_R + G, or its product with something, at some outputs.

    Args:
        missing: [..., R + G], products of Y and G side by side, or their means.
        weight_RH: rows of the weight, at these outputs.
        part: these outputs.
    """
    num_rest = len(weight_RH)
    wanted = missing[..., :num_rest] @ weight_RH
    return wanted + missing[..., num_rest:][..., part] if missing.shape[-1] > num_rest else wanted


def _refit_weights(
    model: PreTrainedModel, cut: CutInputs, moments: Moments, ridge: float, repaired: dict[str, Tensor]
) -> None:
    """Refit weights and biases of some projections to the kept inputs, in their dtype and layout.

    Args:
        model: the teacher.
        cut: the inputs.
        moments: sums over the calibration data; overwritten.
        ridge: λ as a fraction of the mean of the diagonal of XᵀX.
        repaired: name → refitted tensor; added to.
    """
    for has_bias in (False, True):
        projections = [one for one in cut.projections if _has_bias(model, one) == has_bias]
        if not projections:
            continue
        if has_bias:
            moments.centre_()
        products_KK = moments.products[:, : len(moments.products)]
        factors = _factors(products_KK, ridge)
        for projection in projections:
            _refit(model, cut, projection, moments, factors, repaired)


def _refit(
    model: PreTrainedModel,
    cut: CutInputs,
    projection: Projection,
    moments: Moments,
    factors: tuple[Tensor, Tensor],
    repaired: dict[str, Tensor],
) -> None:
    """Refit the weight of one projection, and its bias if it has one."""
    num_kept = len(moments.products)
    products, mean = moments.products[:, num_kept:], moments.mean
    names = [projection.name, *([f"{projection.path}.bias"] if _has_bias(model, projection) else [])]
    tensors = [read_tensor(model, name) for name in names]
    for name, tensor in zip(names, tensors):
        if name not in repaired:
            repaired[name] = tensor.clone(memory_format=torch.contiguous_format)
    weight, bias = projection.own(tensors[0]), tensors[1:]
    weight_DH = _inputs_first(weight, projection)
    refitted_DH = _inputs_first(projection.own(repaired[names[0]]), projection)
    kept_K, rest_R = cut.kept_K.to(weight.device), cut.rest_R.to(weight.device)
    for start in range(0, weight_DH.shape[1], OUTPUTS_AT_A_TIME):
        part = slice(start, start + OUTPUTS_AT_A_TIME)
        weight_RH = weight_DH[rest_R, part].to(moments.products)
        change_KH = torch.linalg.lu_solve(*factors, _wanted(products, weight_RH, part))
        found_KH = weight_DH[kept_K, part].to(change_KH) + change_KH
        refitted_DH[kept_K, part] = narrowed(found_KH.to(weight.device), weight.dtype, names[0])
        for before in bias:
            missing_H = _wanted(mean[num_kept:], weight_RH, part) - mean[:num_kept] @ change_KH
            found_H = before[part].to(missing_H) + missing_H
            repaired[names[1]][part] = narrowed(found_H.to(before.device), before.dtype, names[1])


def _has_bias(model: PreTrainedModel, projection: Projection) -> bool:
    return getattr(model.get_submodule(projection.path), "bias", None) is not None


def _inputs_first(weight: Tensor, projection: Projection) -> Tensor:
    """A view [D, H] of a weight."""
    return weight.T if projection.position == 1 else weight


def _factors(products_KK: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """LU factors of XᵀX + λI; λ is `ridge` times the mean of the diagonal. The argument holds λ only meanwhile."""
    diagonal_K = products_KK.diagonal().clone()
    products_KK.diagonal().add_(ridge * diagonal_K.mean().clamp(min=1e-12))
    factors, pivots = torch.linalg.lu_factor(products_KK)
    products_KK.diagonal().copy_(diagonal_K)
    return factors, pivots
