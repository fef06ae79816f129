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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import DataSource
from ..errors import DataError, PlanError, accept_old_names, checks_kinds
from ..families import spec_for
from ..hardware import free_memory
from ..scoring.calibration import Calibration, load_calibration
from ..scoring.scores import require_weights
from ..sizes.request import SEQUENTIAL
from ..weights import input_device, tensor_values
from .basis import rotated_model
from .repair_inputs import CutInputs, cut_inputs
from .repair_passes import Passes
from .repair_solve import best_ridges, has_bias, medians, refit_weights, warn_of_few_tokens
from .repair_sums import require_finite
from .sequential_repair import covered_runs, refit_sequentially, sequential_writers
from .stored_layers import is_stored
from .surgery import apply_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import PruningPlan

logger = logging.getLogger(__name__)

#: Fraction of the free memory that the matrices of a pass may take by default.
SHARE_OF_FREE_MEMORY = 0.5
#: Inputs of a kind, at equal distances, whose held-out rows choose its ridge.
NUM_PROBES = 4


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
        ridge: λ as a fraction of the mean of the diagonal of XᵀX; 0 is taken for 1e-13. By default every fourth row is
            held out to choose one of `RIDGES` for each kind of inputs, with one pass more if there are several; the
            fit uses all rows.
        memory_limit: bytes that the matrices of one pass may take, by default half of the free memory of the model's
            device. A single input may exceed it, and the held-out sums of four inputs of each kind come on top in a
            single pass.
        show_progress: show a progress bar for each choice of ridges and for the fit.

    Returns:
        Name of a teacher's tensor → the tensor with its kept inputs refitted, in its own dtype, or in float32 where
        the plan scales what a sequential repair fitted. Empty without a cut.

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
    given, planned = model, plan
    model, plan = _checked_arguments(model, plan, memory_limit, ridge)
    notes = [] if notes is None else notes
    writers = sequential_writers(model, plan, notes) if plan.repair == SEQUENTIAL else {}
    inputs = cut_inputs(model, plan, notes, covered_runs(plan, writers))
    sequential = {writer.projection.path for own in writers.values() for writer in own}
    inputs = [cut for cut in inputs if not {one.path for one in cut.projections} <= sequential]
    if not inputs and not sequential:
        return
    rows = (num_rows, max_length, packing, batch_size)
    calibration = load_calibration(model, data, processing_class, *rows, test_starts=not is_stored(model))
    device = input_device(model) if device is None else device
    limit = SHARE_OF_FREE_MEMORY * free_memory(device) if memory_limit is None else memory_limit
    at_once = _refit_at_once(model, inputs, calibration, limit, ridge, device, show_progress)
    if not sequential:
        yield from at_once
        return
    refitted = dict(at_once)
    student = apply_plan(given, planned.with_whole_vocabulary(), repaired=refitted)
    found = refit_sequentially(model, student, plan, writers, calibration, ridge, show_progress=show_progress)
    yield from (refitted | found).items()


def _refit_at_once(
    model: PreTrainedModel,
    inputs: Sequence[CutInputs],
    calibration: Calibration,
    limit: float,
    ridge: float | None,
    device: torch.device,
    show_progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Refit projections to the teacher's activations; see `refit`.

    Args:
        model: the teacher.
        inputs: that are fitted.
        calibration: rows.
        limit: bytes that the sums of a pass may take.
        ridge: see `repaired_weights`.
        device: see `refit`.
        show_progress: see `repaired_weights`.
    """
    if not inputs:
        return
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
        require_finite(model, sums)
        ridges = ridges or medians(best_ridges(model, probes, sums))
        for cut in group:
            refit_weights(model, cut, sums.pop(cut.path).all, ridges[cut.kind], repaired)
        del remaining[: len(group)]
        later = {projection.path for cut in remaining for projection in cut.projections}
        for name in [name for name in repaired if name.rpartition(".")[0] not in later]:
            yield name, repaired.pop(name)
    _report(inputs, num_tokens, ridges)


def refitted_bytes(model: PreTrainedModel, plan: PruningPlan) -> int:
    """Bytes of all that `refit` yields: whole tensors of the teacher, in its dtype."""
    whole = rotated_model(model, plan)
    read = {one for cut in cut_inputs(whole, plan.with_whole_vocabulary()) for one in cut.projections}
    names = {one.name for one in read} | {f"{one.path}.bias" for one in read if has_bias(whole, one)}
    return sum(tensor_values(whole, name).nbytes for name in names)


def _checked_arguments(
    model: PreTrainedModel, plan: PruningPlan, memory_limit: float | None, ridge: float | None
) -> tuple[PreTrainedModel, PruningPlan]:
    """The teacher on the plan's axes, with all tokens; refuses another teacher, and numbers without a meaning."""
    if memory_limit is not None and not memory_limit > 0:
        raise DataError(f"memory_limit={memory_limit!r}: expected a number of bytes above 0.")
    if plan.repair == SEQUENTIAL and is_stored(model):
        raise PlanError(
            f"The repair {SEQUENTIAL!r} runs teacher and student side by side, so both have to be in memory. Prune in "
            "memory: prune_with_plan(model, plan, data), minitron-hf prune --in-memory, or a recipe without "
            "stream_weights. Or plan with repair='least_squares'."
        )
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
    """Log what was fitted."""
    logger.info("Repair: %s inputs fitted to %s tokens, ridges %s.", len(inputs), f"{num_tokens:,}", ridges)
    warn_of_few_tokens(max(len(cut.kept_K) for cut in inputs), num_tokens)


def _ridges_in_passes(model: PreTrainedModel, passes: Passes, groups: Sequence[list[CutInputs]]) -> dict[str, float]:
    """The ridges that held-out rows choose, from passes over groups of probes alone; their sums are kept twice."""
    best: list[tuple[str, float | None]] = []
    for probes, sums, _ in passes.in_turn(groups, [cut for group in groups for cut in group]):
        best += best_ridges(model, probes, sums)
        sums.clear()  # before the next pass
    return medians(best)
