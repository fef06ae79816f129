"""Architecture search: counts shapes within a budget, distils a few briefly, keeps the best (arXiv 2407.14679 §2.3).

enumerate → count → select diverse shapes → prune each and measure it on calibration text → select again → distil
briefly, drop the worse half, distil longer → rank. One student is in memory at a time, every result is written at
once, and a search that was stopped resumes.

Ranks before distillation can be wrong: that paper found depth and width together best before it, and width alone
after some 200 steps. So the first selection keeps diverse shapes, and distillation decides.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import DataSource, TokenRows, token_rows, tokenize_once
from ..data.context import row_limit
from ..distillation.deciding import deciding_arguments, with_recorded_running
from ..errors import PlanError, accept_old_names, checks_kinds
from ..evaluation.speed import measure_speed
from ..files import digest
from ..formats import without_new_defaults
from ..locks import with_locked_folder
from ..privacy import without_publishing
from ..pruning.candidates import Candidate, Divergence, OwnScore, paired_gap
from ..pruning.plan import PruningPlan
from ..pruning.planning import make_plan
from ..pruning.prune import comparison_rows, counted_tokens, prune_with_plan
from ..scoring.calibration import default_max_length
from ..scoring.scores import ImportanceScores
from ..sizes.request import PrunerConfig
from ..sizes.shapes import COUNTED, TOLERANCE, Enumeration, Shape, Space, enumerate_shapes, select_diverse
from ..vocabulary.counts import TokenCounts
from ..weights import model_digest
from .brief_distillation import BriefDistillation
from .budget import given_budgets, shapes_within_budget
from .record import SearchRecord, stored_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        candidates: the candidates that were measured, best first: more rounds of distillation first, then lower KL.
        num_shapes: number of shapes of the space within the budget.
        refused: reason why shapes were refused → number of shapes.
        path: `search.json`, or None.
    """

    candidates: list[Candidate]
    num_shapes: int
    refused: Mapping[str, int]
    path: Path | None = None

    @property
    def best(self) -> PrunerConfig:
        """The sizes to prune to."""
        return self.candidates[0].request


@accept_old_names(num_proxied="num_pruned")
@checks_kinds
@with_locked_folder("output_dir")
def search_architectures(
    model: PreTrainedModel,
    scores: ImportanceScores,
    *,
    space: Space,
    calibration_data: DataSource,
    max_parameters: float | None = None,
    max_active_parameters: float | None = None,
    max_memory_bytes: float | None = None,
    max_seconds_per_token: float | None = None,
    tolerance: float = TOLERANCE,
    context_length: int = 4096,
    batch_size: int = 1,
    train_dataset: Any = None,
    eval_data: DataSource | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    num_pruned: int = 32,
    num_candidates: int = 8,
    num_rounds: int = 3,
    num_tokens: int = 1_000_000,
    num_rows: int = 32,
    max_length: int | None = None,
    base: PrunerConfig | None = None,
    distillation: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    score_func: Callable[[PreTrainedModel], float] | None = None,
    score_floor: float | None = None,
    token_counts: TokenCounts | None = None,
) -> SearchResult:
    """Find the best shape within a budget.

    Long because all arguments are explained.

    Args:
        model: the teacher; not changed.
        scores: importance scores of the teacher.
        space: sizes to try, by their names in `PrunerConfig`: units, fractions, or multiples such as
            `"2.5*hidden_size"`.
        calibration_data: texts or token rows on which the KL before distillation is measured.
        max_parameters: budget of parameters, all parts of a vision-language model included. One of the four budgets
            is needed; with several, a shape has to meet all of them.
        max_active_parameters: budget of the parameters that one token uses (`count_active_parameters`).
        max_memory_bytes: budget of bytes, for the weights in the teacher's dtype and the cache of `batch_size`
            sequences of `context_length` tokens.
        max_seconds_per_token: budget of time for decoding a token at batch size 1, measured on the model's device.
        tolerance: fraction of every budget by which a shape may stay below it.
        context_length: see `max_memory_bytes`.
        batch_size: see `max_memory_bytes`.
        train_dataset: corpus to distil on; None ranks by the KL before distillation.
        eval_data: held-out texts or token rows on which the KL after distillation is measured; None takes the
            calibration data.
        processing_class: tokenizer of texts.
        output_dir: folder for results and unfinished students. A search with the same inputs resumes there.
        num_pruned: number of shapes that are pruned and measured; a diverse selection, if there are more.
        num_candidates: number of those that are distilled.
        num_rounds: number of rounds of distillation; each keeps the better half.
        num_tokens: number of tokens of the first round; each round doubles the total.
        num_rows: number of rows on which KL is measured.
        max_length: tokens in a row.
        base: settings of the requests other than sizes (`contiguous`, `norm_compensation`, `repair`, …). With
            `repair`, every candidate is repaired on as many other rows of the calibration data.
        distillation: fields of `DistillationConfig`.
        show_progress: show the table of candidates as it fills.
        score_func: a score of a model, such as a benchmark or a reward. Candidates are ordered by it, highest first,
            instead of by the KL, before distillation and after every round.
        score_floor: the least score of a candidate that is taken; the others are no part of the result.
        token_counts: for `base.vocab_size` (`count_tokens`); default: of the first 10M tokens of the calibration data.
            Candidates are counted with the tokens that stay; they are measured, distilled and timed with all of them.

    Returns:
        The ranking, with standard errors.

    Raises:
        PlanError: if no shape is within the budget, or arguments contradict each other.
        OutputError: if `output_dir` holds another search.
    """
    if base is not None and base.vocab_size is not None:
        calibration_data = tokenize_once(calibration_data, processing_class)
        token_counts = counted_tokens(base, token_counts, calibration_data, processing_class)
    scores.require_model(model)
    budgets = given_budgets(max_parameters, max_active_parameters, max_memory_bytes, max_seconds_per_token)
    score = OwnScore.of(score_func, score_floor)
    _require_distillable(train_dataset, output_dir, distillation or {})
    max_length = max_length or default_max_length(model.config)
    limit, lowered = row_limit(max_length, teacher=model.config)
    if limit is not None and lowered:
        logger.warning(lowered)
        max_length = limit
    rows, repair_rows = comparison_rows(
        calibration_data, processing_class, base, max_length=max_length, num_rows=num_rows
    )
    held_out = rows
    if eval_data is not None:
        held_out = token_rows(eval_data, processing_class, max_length=max_length, num_rows=num_rows)
    found = enumerate_shapes(model.config, space, base)
    settings = {
        "space": {name: list(values) for name, values in space.items()},
        "budget": budgets,
        "tolerance": tolerance,
        "base": None if base is None else base.to_dict(),
        "distillation": deciding_arguments(without_publishing(dict(distillation or {}))),
        "rounds": [num_pruned, num_candidates, num_rounds, num_tokens, max_length],
        "distils": train_dataset is not None,
        "context_length": context_length,
        "batch_size": batch_size,
        **(
            {} if score is None else {"score_func": getattr(score_func, "__qualname__", type(score_func).__qualname__)}
        ),
    }
    stored = stored_settings(output_dir)
    known = with_recorded_running(without_new_defaults(settings, stored, {"base": PrunerConfig}), stored)
    inputs = digest(model_digest(model), scores.digest, known, rows.digest, held_out.digest)
    if repair_rows is not None:
        inputs = digest(inputs, repair_rows.digest)
    if train_dataset is not None:
        from ..distillation.training_inputs import sampled_data  # the trainers of TRL take seconds to import

        inputs = digest(inputs, sampled_data(train_dataset))
    if score is not None:
        inputs = digest(inputs, score.identity)
    if token_counts is not None:
        inputs = digest(inputs, token_counts.counts.tobytes())
    record = SearchRecord(output_dir, inputs, known, show_progress)
    shapes = shapes_within_budget(
        model, found.shapes, budgets, tolerance, context_length=context_length, batch_size=batch_size, record=record
    )
    search = _Search(model, scores, record, repair_rows, score, token_counts)
    with record.live():
        search.measure_pruned(select_diverse(shapes, num_pruned), rows, found, budgets)
        if train_dataset is not None:
            assert record.folder is not None
            training = {**(distillation or {}), "max_length": max_length}
            distil = BriefDistillation(
                model, record.folder, train_dataset, processing_class, training, repair_rows, record.advance
            )
            chosen = search.select(shapes, num_candidates)
            search.distil_rounds(chosen, distil, held_out, [num_tokens << turn for turn in range(num_rounds)])
    record.candidates = _rank(record.candidates, rows, held_out)
    record.save()
    taken = record.candidates if score is None else score.require(record.candidates)
    if len(taken) < len(record.candidates):  # the first in the file is the best that reaches the floor
        names = {one.name for one in taken}
        record.candidates = [*taken, *(one for one in record.candidates if one.name not in names)]
        record.save()
    record.clean()
    return SearchResult(taken, len(shapes), found.refused, record.path)


def _require_distillable(
    train_dataset: Any, output_dir: str | os.PathLike[str] | None, distillation: Mapping[str, Any]
) -> None:
    """Refuse a search that distils without a folder, or that changes the teacher.

    Raises:
        PlanError: naming the argument.
    """
    if train_dataset is not None and output_dir is None:
        raise PlanError("output_dir: a search that distils needs a folder for its students.")
    for name in ("teacher_offload", "teacher_correction"):
        if distillation.get(name):
            raise PlanError(
                f"distillation.{name}: every shape is cut from the same teacher, which must stay in memory and "
                "unchanged. Leave it out of the search."
            )


class _Search:
    """Prunes, measures and distils candidates; every result goes into the record at once.

    Args:
        model: the teacher.
        scores: importance of its units.
        record: of the search.
        repair_rows: rows to repair candidates on, or None.
        score: a user's score, or None.
        token_counts: counts of tokens, where the vocabulary is cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scores: ImportanceScores,
        record: SearchRecord,
        repair_rows: TokenRows | None,
        score: OwnScore | None,
        token_counts: TokenCounts | None,
    ) -> None:
        self.model, self.scores, self.record = model, scores, record
        self.token_counts = token_counts
        self.repair_rows, self.score = repair_rows, score

    def plan(self, candidate: Candidate) -> PruningPlan:
        """The plan of a candidate."""
        return make_plan(self.model, candidate.request, self.scores, token_counts=self.token_counts)

    def measure_pruned(
        self, shapes: Sequence[Shape], rows: TokenRows, found: Enumeration, budgets: Mapping[str, float]
    ) -> None:
        """Prune every shape, and measure its KL before distillation.

        Raises:
            PlanError: if all shapes hold more parameters than the budget once layers are chosen.
        """
        measure = Divergence(self.model, rows, score=self.score)
        for shape in self.record.counted(shapes, "Comparing shapes", "shape"):
            candidate = self.record.candidate(shape)
            if candidate.pruned_kl is not None:
                continue
            plan = self.plan(candidate)
            # Where layers are not alike, the number of parameters depends on which of them the scores keep.
            candidate.num_parameters = plan.student["num_parameters"]
            candidate.num_active_parameters = plan.student["num_active_parameters"]
            if any(getattr(candidate, COUNTED[name]) > limit for name, limit in budgets.items() if name in COUNTED):
                self.record.candidates.remove(candidate)
                found.refused[TOO_LARGE] = found.refused.get(TOO_LARGE, 0) + 1
                continue
            student = prune_with_plan(self.model, plan.with_whole_vocabulary(), self.repair_rows)
            candidate.pruned_kl = measure(student, candidate)
            del student
            gc.collect()
            self.record.save()
        if not self.record.candidates:
            raise PlanError(f"max_parameters: {TOO_LARGE} Choose a larger budget, or layers_to_drop.")

    def select(self, shapes: Sequence[Shape], number: int) -> list[Candidate]:
        """A diverse selection of the candidates with a low KL."""
        by_shape = {shape.name: shape for shape in shapes}
        by_name = {one.name: one for one in sorted(self.record.candidates, key=lambda one: one.sort_key(0))}
        chosen = select_diverse(
            [by_shape[name] for name in by_name],
            number,
            cost=lambda shape: by_name[shape.name].sort_key(0),
        )
        return [by_name[shape.name] for shape in chosen]

    def distil_rounds(
        self, alive: Sequence[Candidate], distil: BriefDistillation, rows: TokenRows, token_counts: Sequence[int]
    ) -> None:
        """Distil candidates in rounds, and keep the better half after each.

        Args:
            alive: the candidates of the first round.
            distil: distils a student.
            rows: held-out rows that decide.
            token_counts: tokens that a student has seen after each round.
        """
        measure = Divergence(self.model, rows, score=self.score)
        for turn, num_tokens in enumerate(token_counts):
            waiting = [candidate for candidate in alive if len(candidate.rounds) <= turn]
            new_tokens = num_tokens - (token_counts[turn - 1] if turn else 0)
            self.record.begin(f"Distilling, round {turn + 1}", "token", len(waiting) * new_tokens)
            for candidate in waiting:
                student = distil(candidate.name, self.plan(candidate).with_whole_vocabulary(), num_tokens)
                kl = measure(student, candidate)
                candidate.rounds.append({"num_tokens": num_tokens, "kl": kl["value"], "stderr": kl["stderr"]})
                _measure_speed(student, candidate, rows)
                del student
                gc.collect()
                self.record.save()
            if len(alive) == 1:
                break
            alive = _better_half(alive, turn)


#: Why a shape whose layers are not alike is refused after planning.
TOO_LARGE = "The layers that the scores keep hold more parameters than the budget."


def _better_half(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    """The better half after a round; the larger half of an odd number."""
    return sorted(candidates, key=lambda candidate: candidate.sort_key(turn + 1))[: -(-len(candidates) // 2)]


def _rank(candidates: Sequence[Candidate], rows: TokenRows, held_out: TokenRows) -> list[Candidate]:
    """Candidates, best first, each with its gap to the best on the same rows."""
    ranked = sorted(candidates, key=lambda candidate: (-len(candidate.rounds), candidate.sort_key()))
    for candidate in ranked:
        measured_on = held_out if candidate.rounds else rows
        candidate.kl_above_best = None if candidate is ranked[0] else paired_gap(candidate, ranked[0], measured_on)
    return ranked


def _measure_speed(student: PreTrainedModel, candidate: Candidate, rows: TokenRows) -> None:
    speed = measure_speed(
        {"student": student}, rows, prefill_length=64, decode_tokens=16, rounds=3, show_progress=False
    )["student"]
    candidate.prefill_tokens_per_second = speed["prefill_tokens_per_second"]["median"]
    candidate.decode_tokens_per_second = speed["decode_tokens_per_second"]["median"]
