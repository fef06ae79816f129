"""`prune_model`: scores, plan, surgery and repair of a model in one call."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import DataSource, TokenRows, token_rows, tokenize_once
from ..data.tokens import tokenizer_digest
from ..errors import DataError, MismatchError, PlanError, accept_old_names, checks_kinds
from ..evaluation.loading import load_reader
from ..evaluation.means import with_error
from ..files import digest
from ..locks import with_locked_folder
from ..models import load_config, load_for_compute, stored_dtype
from ..saving import in_stored_dtype
from ..scoring.batches import require_vocabulary
from ..scoring.calibration import default_max_length
from ..scoring.metrics import needs_no_data, require_one_metric
from ..scoring.scores import ImportanceScores
from ..sizes.request import PrunerConfig
from ..sizes.shapes import COUNTED, Shape, select_diverse
from ..sizes.student import require_some_size, student_config
from ..sizes.targets import shapes_near_target, target_limits
from ..vocabulary.counts import TokenCounts, count_tokens
from ..weights import model_digest
from .basis import require_in_memory
from .candidates import Candidate, Divergence, MeasuredShapes, OwnScore, paired_gap
from .iterations import CALIBRATION_ARGUMENTS, iterate_importance, require_known_arguments
from .plan import PruningPlan
from .planning import make_plan
from .repair import refit
from .surgery import apply_plan
from .verification import note_verification

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Tokens of the calibration data that are counted for a cut of the vocabulary.
COUNTED_TOKENS = 10_000_000


@accept_old_names(num_samples="num_rows")
@checks_kinds
def prune_model(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    config: PrunerConfig,
    *,
    calibration_data: DataSource | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    scores: ImportanceScores | None = None,
    token_counts: TokenCounts | None = None,
    verify: bool = False,
    iterations: int = 1,
    score_func: Callable[[PreTrainedModel], float] | None = None,
    score_floor: float | None = None,
    **importance_kwargs: Any,
) -> PreTrainedModel:
    """Score, plan and prune in one call. The plan's notes are logged as warnings.

    Long because all arguments are explained.

    Args:
        model_or_path: the teacher: a model, which is not changed; or a folder or a Hub id, loaded onto an accelerator
            if there is one, and computed in float32 if the hardware is slow in the stored dtype.
        config: the student's sizes, or a target for them (`plan_for_target`).
        calibration_data: texts, token rows or a dataset to score the teacher on, unless `scores` are given. They
            are tokenised once.
        processing_class: tokenizer for the texts; default: the one in the teacher's folder.
        scores: earlier results of `estimate_importance`.
        token_counts: for `vocab_size` (`count_tokens`); default: of the first 10M tokens of the calibration data.
        verify: compare the student's logits with those of the teacher with the same units masked, on a few tokens
            (`verify_student`), and note the gap in the plan.
        iterations: number of rounds of scoring and cutting (`iterate_importance`).
        score_func: a score of a model that chooses the shape for a target (`plan_for_target`).
        score_floor: its least value.
        **importance_kwargs: passed on to `estimate_importance` (`metric`, `depth_metric`, `num_rows`, …). Which
            layers a `depth_metric` measures follows from `config`.

    Returns:
        The student, a new stock model on the teacher's device and in its stored dtype, with its `pruning_plan`. In
        float32, with a warning, if its values exceed the range of float16.

    Raises:
        MinitronError: see `estimate_importance`, `make_plan`, `apply_plan` and `verify_student`. Impossible sizes are
            refused before any computation.

    Example:
        >>> student = prune_model("meta-llama/Llama-3.1-8B", PrunerConfig(hidden_size=0.75, intermediate_size=0.65),
        ...                       calibration_data=texts)  # doctest: +SKIP
    """
    of_scoring = importance_kwargs if iterations == 1 else {"iterations": iterations, **importance_kwargs}
    scored = _check_sources(config, calibration_data, scores, of_scoring, token_counts)
    if not config.targets and (score_func is not None or score_floor is not None):
        raise PlanError("score_func chooses among shapes for a target. Give target_parameters, or leave it out.")
    teacher_config = model_or_path.config if isinstance(model_or_path, nn.Module) else load_config(model_or_path)
    _check_sizes(teacher_config, config)
    model = load_for_compute(model_or_path)
    if config.hidden_basis is not None:
        require_in_memory(model)
    if scored:
        if processing_class is None and not isinstance(model_or_path, nn.Module):
            processing_class = load_reader(model_or_path, calibration_data)
        importance_kwargs["processing_class"] = processing_class
        calibration_data = tokenize_once(calibration_data, processing_class)
        token_counts = counted_tokens(config, token_counts, calibration_data, processing_class)
        scores = iterate_importance(model, config, calibration_data, iterations=iterations, **importance_kwargs)
    arguments = {name: value for name, value in importance_kwargs.items() if name in CALIBRATION_ARGUMENTS}
    if config.targets and scores is not None and calibration_data is not None:
        plan = plan_for_target(
            model,
            config,
            scores,
            calibration_data,
            processing_class=processing_class,
            token_counts=token_counts,
            max_length=arguments.get("max_length"),
            show_progress=importance_kwargs.get("show_progress", True),
            score_func=score_func,
            score_floor=score_floor,
        )
    else:
        plan = make_plan(model, config, scores, token_counts=token_counts)
    _log_notes(plan.notes)
    arguments |= {"processing_class": processing_class, "show_progress": importance_kwargs.get("show_progress", True)}
    student: Any = prune_with_plan(model, plan, calibration_data, verify=verify, **arguments)
    _log_notes(student.pruning_plan.notes[len(plan.notes) + verify :])
    stored = None if isinstance(model_or_path, nn.Module) else stored_dtype(teacher_config)
    return student if stored is None else in_stored_dtype(student, stored)


def _log_notes(notes: Sequence[str]) -> None:
    for note in notes:
        logger.warning(note)


def counted_tokens(
    config: PrunerConfig, counts: TokenCounts | None, data: DataSource | None, processing_class: Any
) -> TokenCounts | None:
    """The given counts of tokens, or those of the calibration data where the vocabulary is cut."""
    given = None if counts is None or processing_class is None else tokenizer_digest(processing_class)
    if counts is not None and given not in (None, tokenizer_digest(counts.tokenizer)):
        raise MismatchError(
            "token_counts were made with another tokenizer than the teacher's. Count again: "
            "count_tokens(corpus, tokenizer)."
        )
    if config.vocab_size is None or counts is not None or data is None:
        return counts
    return count_tokens(data, processing_class, max_tokens=COUNTED_TOKENS)


def _check_sources(
    config: PrunerConfig,
    data: DataSource | None,
    scores: ImportanceScores | None,
    importance_kwargs: Mapping[str, Any],
    token_counts: TokenCounts | None,
) -> bool:
    """Refuse two sources of scores, or a request that needs data without them.

    Returns:
        Whether the teacher has to be scored.
    """
    require_known_arguments(importance_kwargs, prune_model)
    require_one_metric(importance_kwargs.get("metric"))
    scored = data is not None or needs_no_data(importance_kwargs.get("metric"))
    if scores is not None and scored:
        raise PlanError("Pass either scores or calibration_data, not both.")
    if config.repair and data is None:
        raise PlanError(
            f"repair={config.repair!r} needs calibration_data. Pass it instead of scores, or call make_plan and "
            "prune_with_plan(model, plan, data)."
        )
    if config.targets and data is None:
        raise PlanError(
            f"{next(iter(config.targets))} needs calibration_data: shapes are measured on it after the scoring. With "
            "scores made before, call plan_for_target(model, config, scores, data) and apply_plan(model, plan)."
        )
    if config.targets and isinstance(data, DataLoader):
        raise DataError(
            f"{next(iter(config.targets))} with a DataLoader: shapes are measured on rows. Pass texts or token rows."
        )
    if config.vocab_size is not None and token_counts is None and data is None:
        raise PlanError(
            f"vocab_size={config.vocab_size} needs a corpus, whose tokens are counted. Pass calibration_data, or "
            "token_counts=count_tokens(corpus, tokenizer)."
        )
    if importance_kwargs and not scored:
        raise PlanError(
            f"{', '.join(importance_kwargs)}: only used to score calibration_data. Pass it, or leave them out."
        )
    return scored


def _check_sizes(teacher: PretrainedConfig, config: PrunerConfig) -> None:
    """Refuse impossible sizes, and a request without any."""
    require_some_size(teacher, config)
    if not config.targets:
        student_config(teacher, config)
    else:
        shapes_near_target(teacher, config)


@checks_kinds
@with_locked_folder("output_dir")
def plan_for_target(
    model: PreTrainedModel,
    request: PrunerConfig,
    scores: ImportanceScores,
    data: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    token_counts: TokenCounts | None = None,
    tolerance: float | None = None,
    num_shapes: int = 16,
    num_rows: int = 32,
    max_length: int | None = None,
    score_func: Callable[[PreTrainedModel], float] | None = None,
    score_floor: float | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> PruningPlan:
    """Choose the sizes for a target of parameters by the KL before retraining, and plan them.

    Shapes that meet the target (`shapes_near_target`) are pruned one after another and compared with the teacher
    before any retraining, on the same tokens. With `request.repair`, they are repaired first, on other rows. The shape
    with the lowest KL is chosen. The order can change in retraining: `search_architectures` retrains the best shapes.
    Long because all arguments are explained.

    Args:
        model: the teacher; not changed.
        request: a request with `target_parameters`, `target_active_parameters`, or both. Its sizes are kept.
        scores: importance of the teacher's units.
        data: texts or token rows to measure on.
        processing_class: tokenizer of texts.
        token_counts: for `vocab_size`. Shapes are measured with the whole vocabulary, and counted with what stays.
        tolerance: fraction of the target by which the student may be smaller; None: that of the request.
        num_shapes: number of shapes to measure; if there are more, a diverse selection.
        num_rows: rows to measure on.
        max_length: tokens of a row.
        score_func: a score of a model, such as a benchmark; the shape with the highest one is chosen instead.
        score_floor: the least score of the shape that is chosen.
        output_dir: folder that keeps what is measured until all shapes are: the same call goes on after an
            interruption. None: it begins again.
        show_progress: show a progress bar.

    Returns:
        The plan of the best shape. All measured shapes are its `candidates`; the KL ± standard error is in its notes.

    Raises:
        PlanError: if the target is out of reach, no size is left to choose, none of the shapes can be planned, or none
            reaches the floor.
        DataError: if the score is no finite number.
        MismatchError: if the scores belong to another model.
    """
    if not request.targets:
        raise PlanError(
            "plan_for_target needs target_parameters or target_active_parameters. With sizes, call "
            "make_plan(model, request, scores)."
        )
    scores.require_model(model)
    score = OwnScore.of(score_func, score_floor)
    shapes = select_diverse(shapes_near_target(model.config, request, tolerance=tolerance), num_shapes)
    max_length = max_length or default_max_length(model.config)
    rows, repair_rows = comparison_rows(data, processing_class, request, max_length=max_length, num_rows=num_rows)
    require_vocabulary(max(max(row) for row in rows.rows), model.config)
    limits = target_limits(model.config, request)
    used = (
        rows.digest,
        repair_rows and repair_rows.digest,
        request.to_dict(),
        score and score.identity,
        None if token_counts is None else digest(token_counts.counts.tobytes()),
    )
    inputs = "" if output_dir is None else digest(model_digest(model), scores.digest, *used)
    measured = MeasuredShapes(output_dir, inputs)
    divergence = Divergence(model, rows, score=score)
    candidates, refusals = measure_shapes(
        model, shapes, scores, divergence, limits, repair_rows, token_counts, measured, show_progress
    )
    wanted = request.targets_in_words()
    if not candidates:
        raise PlanError(f"{wanted}: none of {len(shapes)} shapes can be cut: {refusals[0]}")
    if score is not None:
        candidates = score.require(candidates)
    best, *others = sorted(candidates, key=Candidate.sort_key)
    for other in others:
        other.kl_above_best = paired_gap(other, best, rows)
    plan = make_plan(model, best.request, scores, token_counts=token_counts)
    notes = (*plan.notes, _choice_note(wanted, best, others))
    measured.end()
    return replace(plan, candidates=tuple(one.pruned_dict() for one in (best, *others)), notes=notes)


def comparison_rows(
    data: DataSource,
    processing_class: PreTrainedTokenizerBase | None,
    request: PrunerConfig | None,
    *,
    max_length: int,
    num_rows: int,
) -> tuple[TokenRows, TokenRows | None]:
    """Rows to compare shapes on and, where the request repairs them, as many other rows to repair them on.

    Raises:
        PlanError: if there is a single row for both.
    """
    repairs = request is not None and request.repair is not None
    rows = token_rows(data, processing_class, max_length=max_length, num_rows=2 * num_rows if repairs else num_rows)
    if not repairs:
        return rows, None
    if len(rows) < 2:
        raise PlanError(
            "repair: shapes are repaired on some rows of the calibration data and compared on the others, and there "
            "is one row. Pass more text."
        )
    return rows.select(list(range(0, len(rows), 2))), rows.select(list(range(1, len(rows), 2)))


def measure_shapes(
    model: PreTrainedModel,
    shapes: Sequence[Shape],
    scores: ImportanceScores,
    divergence: Divergence,
    limits: Mapping[str, float],
    repair_rows: TokenRows | None = None,
    token_counts: TokenCounts | None = None,
    measured: MeasuredShapes | None = None,
    show_progress: bool = False,
) -> tuple[list[Candidate], list[str]]:
    """Prune a model to each of some shapes, and measure the students before retraining.

    Args:
        model: the teacher.
        shapes: to measure.
        scores: importance of the teacher's units.
        divergence: from the teacher.
        limits: name of a target (`COUNTED`) → the most that a student may have.
        repair_rows: rows for the repairs that the shapes ask for; None measures them without.
        token_counts: counts of the tokens of a corpus, where the shapes have a smaller vocabulary.
        measured: what is measured already.
        show_progress: show a progress bar.

    Returns:
        The measured candidates, and why other shapes cannot be cut.
    """
    candidates: list[Candidate] = []
    refusals: list[str] = []
    measured = measured or MeasuredShapes(None, "")
    for shape in tqdm(shapes, desc="Comparing shapes", unit="shape", disable=not show_progress):
        try:
            request = shape.request if repair_rows is not None else replace(shape.request, repair=None)
            plan = make_plan(model, request, scores, token_counts=token_counts)
        except PlanError as error:
            refusals.append(str(error))
            continue
        counts = {name: plan.student[name] for name in ("num_parameters", "num_active_parameters")}
        candidate = Candidate(shape.request, **counts)
        # Where layers are not alike, it depends on which of them go.
        if over := [COUNTED[name] for name, limit in limits.items() if counts[COUNTED[name]] > limit]:
            refusals.append(f"{candidate.name} has {over[0]} {counts[over[0]]:,} with the layers that stay.")
            continue
        measured.measure(candidate, functools.partial(_measure, model, plan, divergence, repair_rows))
        candidates.append(candidate)
    return candidates, refusals


def _measure(
    model: PreTrainedModel,
    plan: PruningPlan,
    divergence: Divergence,
    repair_rows: TokenRows | None,
    candidate: Candidate,
) -> None:
    student = prune_with_plan(model, plan.with_whole_vocabulary(), repair_rows)
    candidate.pruned_kl = divergence(student, candidate)


def _choice_note(wanted: str, best: Candidate, others: Sequence[Candidate]) -> str:
    assert best.pruned_kl is not None
    place = f"score {best.scores[-1]:.4g}, the highest" if best.scores else "the lowest"
    note = (
        f"Sizes for {wanted}: {best.name} ({best.num_parameters:,} parameters), KL "
        f"{with_error(**best.pruned_kl)} before retraining, {place} of "
        f"{len(others) + 1} measured"
    )
    if not others or others[0].kl_above_best is None:
        return f"{note}."
    if best.scores:
        return f"{note}; next {others[0].name}, {best.scores[-1] - others[0].scores[-1]:.4g} behind."
    gap = others[0].kl_above_best
    return f"{note}; next {others[0].name}, {with_error(**gap)} behind."


@accept_old_names(num_samples="num_rows")
@checks_kinds
def prune_with_plan(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: DataSource | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    verify: bool = False,
    show_progress: bool = False,
    **row_arguments: Any,
) -> PreTrainedModel:
    """Build the student of a plan: `apply_plan`, the plan's repair, and an optional verification.

    Args:
        model: the teacher; not changed.
        plan: plan for this teacher.
        data: calibration data for a repair (`repaired_weights`).
        processing_class: tokenizer for texts.
        verify: compare the student, before any repair, with the masked teacher (`verify_student`), and note it.
        show_progress: show a progress bar of the repair.
        **row_arguments: settings of the rows for a repair: `num_rows`, `max_length`, `packing`, `batch_size`.

    Returns:
        The student, with the plan and its notes as `student.pruning_plan`.

    Raises:
        MinitronError: see `apply_plan`, `repaired_weights` and `verify_student`.
    """
    student: Any = None
    if verify:
        student = apply_plan(model, replace(plan, repair=None))
        plan = note_verification(model, student, plan)
    if plan.repair:
        repaired = None
        notes: list[str] = []
        if data is not None:
            rows = {"processing_class": processing_class, "show_progress": show_progress, **row_arguments}
            repaired = dict(refit(model, plan, data, notes=notes, **rows))
        student = apply_plan(model, plan, repaired=repaired)
        plan = plan.with_notes(*notes)
    elif student is None:
        student = apply_plan(model, plan)
    student.pruning_plan = plan
    return student
