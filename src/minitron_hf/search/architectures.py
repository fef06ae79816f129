"""Architecture search: counts shapes within a budget, retrains a few briefly, keeps the best (P1 §2.3).

enumerate → count → choose some that differ → prune each and measure it on calibration text (the proxy) → choose again
→ distil the survivors briefly, drop the worse half, distil longer → rank. One student is in memory at a time, every
result is written when it is there, and a search that was stopped goes on where it was.

Ranks before retraining are not to be trusted: P1 found depth and width together best before, width alone after some
200 steps. Hence the proxy chooses candidates that differ, and distillation decides.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..compat import build_from_config
from ..data import DataSource, TokenRows, token_rows
from ..distillation.checkpoints import last_checkpoint
from ..distillation.config import DistillationConfig
from ..distillation.trainer import DistillationTrainer
from ..errors import OutputError, PlanError
from ..evaluation.speed import measure_cost
from ..files import digest, require_writable
from ..formats import read_artefact, write_artefact
from ..locks import holding
from ..models import plain_model, stored_dtype
from ..privacy import public_settings
from ..pruning.candidates import SEARCH_NAME, Candidate, Divergence, paired_gap
from ..pruning.plan import PruningPlan
from ..pruning.planning import make_plan
from ..pruning.surgery import apply_plan
from ..scoring.calibration import default_max_length
from ..scoring.scores import ImportanceScores
from ..sizes.request import PrunerConfig
from ..sizes.shapes import TOLERANCE, Shape, Space, enumerate_shapes, memory_bytes, require_budget, select_diverse
from ..sizes.student import student_config
from ..weights import input_device, model_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CANDIDATES_DIR = "candidates"


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        candidates: those that were measured, best first: the longer retrained, then the lower KL.
        num_shapes: shapes of the space within the budget.
        refused: why others could not be cut → how many.
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


@holding("output_dir")
def search_architectures(
    model: PreTrainedModel,
    scores: ImportanceScores,
    *,
    space: Space,
    calibration_data: DataSource,
    max_parameters: float | None = None,
    max_memory_bytes: float | None = None,
    max_seconds_per_token: float | None = None,
    tolerance: float = TOLERANCE,
    context_length: int = 4096,
    train_dataset: Any = None,
    eval_data: DataSource | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    num_proxied: int = 32,
    num_candidates: int = 8,
    num_rounds: int = 3,
    num_tokens: int = 1_000_000,
    num_rows: int = 32,
    max_length: int | None = None,
    base: PrunerConfig | None = None,
    distillation: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> SearchResult:
    """Find the best shape within a budget.

    Args:
        model: the teacher; not changed.
        scores: importance of its units.
        space: sizes to try, by their names in `PrunerConfig`: units, fractions, or multiples such as
            `"2.5*hidden_size"`.
        calibration_data: texts or token rows that the proxy is measured on.
        max_parameters: budget of parameters; exactly one of the three budgets is needed.
        max_memory_bytes: budget of bytes, for the weights in the teacher's dtype and the cache of one sequence of
            `context_length` tokens.
        max_seconds_per_token: budget of time for decoding a token at batch size 1, measured on the model's device.
        tolerance: by how much of the budget a shape may cost less.
        context_length: see `max_memory_bytes`.
        train_dataset: corpus to distil on; None ranks by the proxy alone.
        eval_data: held-out texts or token rows that decide; None takes the calibration data.
        processing_class: tokenizer of texts.
        output_dir: where results and unfinished students go. A search with the same inputs goes on there.
        num_proxied: shapes that are pruned and measured; of more, some that differ are taken.
        num_candidates: of those, how many are distilled.
        num_rounds: rounds of distillation; each keeps the better half.
        num_tokens: tokens of the first round; each further one has seen twice as many in all.
        num_rows: rows that KL is measured on.
        max_length: tokens of a row.
        base: all that is not a size in the requests (`contiguous`, `norm_compensation`, …). Candidates are compared
            without its `repair`.
        distillation: fields of `DistillationConfig`.
        show_progress: show the table of candidates as it fills.

    Returns:
        The ranking, with uncertainties.

    Raises:
        PlanError: if no shape is within the budget, or the request makes no sense.
        OutputError: if `output_dir` holds another search.
    """
    given = only_budget(max_parameters, max_memory_bytes, max_seconds_per_token)
    if train_dataset is not None and output_dir is None:
        raise PlanError("output_dir: a search that distils needs a folder for its students.")
    for name in ("teacher_offload", "teacher_correction"):
        if (distillation or {}).get(name):
            raise PlanError(
                f"distillation.{name}: every shape is cut out of the same teacher, which has to stay whole and as it "
                "is. Leave it out of the search."
            )
    max_length = max_length or default_max_length(model.config)

    def rows_of(data: DataSource) -> TokenRows:
        return token_rows(data, processing_class, max_length=max_length, num_rows=num_rows)

    rows = rows_of(calibration_data)
    held_out = rows if eval_data is None else rows_of(eval_data)
    found = enumerate_shapes(model.config, space, base)
    settings = {
        "space": {name: list(values) for name, values in space.items()},
        "budget": given,
        "tolerance": tolerance,
        "base": None if base is None else base.to_dict(),
        "distillation": dict(distillation or {}),
        "rounds": [num_proxied, num_candidates, num_rounds, num_tokens, max_length],
        "distils": train_dataset is not None,
        "context_length": context_length,
    }
    inputs = digest(model_digest(model), scores.digest, settings, rows.digest, held_out.digest)
    record = _Record(output_dir, inputs, settings, show_progress)
    shapes = _affordable(model, found.shapes, given, tolerance, context_length, record)
    measure = Divergence(model, rows)

    with record.live():
        for shape in select_diverse(shapes, num_proxied):
            candidate = record.candidate(shape)
            if candidate.proxy is None:
                plan = _plan_of(model, candidate, scores)
                # Where layers are not alike, it depends on which of them the scores keep.
                candidate.num_parameters = plan.student["num_parameters"]
                if candidate.num_parameters > given.get("max_parameters", math.inf):
                    record.candidates.remove(candidate)
                    why = "The layers that the scores keep hold more parameters than the budget."
                    found.refused[why] = found.refused.get(why, 0) + 1
                    continue
                student = apply_plan(model, plan)
                candidate.proxy = measure(student, candidate)
                del student
                gc.collect()
                record.save()
        if not record.candidates:
            raise PlanError(f"max_parameters: {why} Choose a larger budget, or layers_to_drop.")
        ranked = sorted(record.candidates, key=lambda candidate: candidate.proxy_kl)
        if train_dataset is not None:
            by_name = {candidate.name: candidate for candidate in ranked}
            chosen = select_diverse(
                [Shape(c.request, _sizes_of(c, shapes), c.num_parameters) for c in ranked],
                num_candidates,
                cost=lambda shape: by_name[shape.name].proxy_kl,
            )
            alive = [by_name[shape.name] for shape in chosen]
            judge = Divergence(model, held_out)
            for turn in range(num_rounds):
                for candidate in alive:
                    if len(candidate.rounds) <= turn:
                        student = _distil(
                            model, scores, candidate, record, num_tokens << turn, train_dataset, processing_class,
                            {**(distillation or {}), "max_length": max_length},
                        )  # fmt: skip
                        kl = judge(student, candidate)
                        candidate.rounds.append(
                            {"num_tokens": num_tokens << turn, "kl": kl["value"], "stderr": kl["stderr"]}
                        )
                        _time(student, candidate, held_out)
                        del student
                        gc.collect()
                        record.save()
                if len(alive) == 1:
                    break
                alive = _better_half(alive, turn)
    candidates = sorted(record.candidates, key=lambda candidate: (-len(candidate.rounds), candidate.kl))
    best = candidates[0]
    for candidate in candidates:
        measured_on = held_out if candidate.rounds else rows
        candidate.behind = None if candidate is best else paired_gap(candidate, best, measured_on)
    record.candidates = candidates
    record.save()
    record.clean()
    return SearchResult(candidates, len(shapes), found.refused, record.path)


def only_budget(
    max_parameters: float | None = None,
    max_memory_bytes: float | None = None,
    max_seconds_per_token: float | None = None,
) -> dict[str, float]:
    """The one budget that is given, by its name.

    Raises:
        PlanError: if there are more, or none.
    """
    budgets = {"max_parameters": max_parameters, "max_memory_bytes": max_memory_bytes}
    budgets["max_seconds_per_token"] = max_seconds_per_token
    given = {name: float(value) for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise PlanError(f"Give exactly one budget of {', '.join(budgets)}; got {', '.join(given) or 'none'}.")
    return given


def _affordable(
    model: PreTrainedModel,
    shapes: Sequence[Shape],
    budget: Mapping[str, float],
    tolerance: float,
    context_length: int,
    record: _Record,
) -> list[Shape]:
    [(name, limit)] = budget.items()
    costs = record.costs
    dtype = stored_dtype(model.config) or model.dtype
    if torch.promote_types(dtype, model.dtype) != model.dtype:
        dtype = model.dtype  # narrower than it was loaded

    def cost(shape: Shape) -> float:
        if name == "max_parameters":
            return shape.num_parameters
        if shape.name not in costs:
            config = student_config(model.config, shape.request)
            if name == "max_memory_bytes":
                costs[shape.name] = memory_bytes(
                    config, shape.num_parameters, context_length=context_length, batch_size=1, dtype=dtype
                )
            else:
                costs[shape.name] = _seconds_per_token(model, config)
            record.save()
        return costs[shape.name]

    return require_budget(shapes, name, limit, tolerance, cost)


@torch.no_grad()
def _seconds_per_token(model: PreTrainedModel, config: Any) -> float:
    """Median time to decode a token with a model of a shape, whose weights do not matter."""
    with torch.device(input_device(model)):
        empty = build_from_config(type(model), config, model.dtype).eval()
    speed = measure_cost(
        {"model": empty}, _any_rows(config), prefill_length=64, decode_tokens=16, rounds=3, show_progress=False
    )
    return 1 / speed["model"]["decode_tokens_per_second"]["median"]


def _any_rows(config: Any) -> TokenRows:
    return TokenRows((tuple(index % config.vocab_size for index in range(64)),), None)


def _plan_of(model: PreTrainedModel, candidate: Candidate, scores: ImportanceScores) -> PruningPlan:
    """The plan of a candidate, which is compared without a repair: that needs one more pass for each."""
    return make_plan(model, replace(candidate.request, repair=None), scores)


def _better_half(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    """Those with the lower KL after a round, whatever came later; one more of an odd number."""
    return sorted(candidates, key=lambda candidate: candidate.rounds[turn]["kl"])[: -(-len(candidates) // 2)]


def _sizes_of(candidate: Candidate, shapes: Sequence[Shape]) -> Mapping[str, int]:
    return next(shape.sizes for shape in shapes if shape.name == candidate.name)


def _distil(
    model: PreTrainedModel,
    scores: ImportanceScores,
    candidate: Candidate,
    record: _Record,
    num_tokens: int,
    train_dataset: Any,
    processing_class: Any,
    settings: Mapping[str, Any],
) -> PreTrainedModel:
    """The candidate's student after so many tokens, going on from its last checkpoint."""
    from transformers import PrinterCallback

    assert record.folder is not None
    folder = record.folder / CANDIDATES_DIR / digest(candidate.name)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan_of(model, candidate, scores)
    student = apply_plan(model, plan)
    defaults = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-4,
        "warmup_steps": 10,
        "packing": True,
        "packing_strategy": "wrapped",
        "shuffle_dataset": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 0.25,
        # Constant after the warm-up, so that a longer run is a shorter one that goes on.
        "lr_scheduler_type": "constant_with_warmup",
    }
    values = {**defaults, **settings}
    rows = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    steps = math.ceil(num_tokens / (rows * values["max_length"]))
    saving = {"save_strategy": "steps", "save_steps": steps, "save_total_limit": 1}
    trainer = DistillationTrainer(
        model=student,
        teacher_model=model,
        args=DistillationConfig(str(folder), **{**values, "max_steps": steps, **saving}),
        train_dataset=train_dataset,
        processing_class=processing_class,
        pruning_plan=plan,
    )
    trainer.remove_callback(PrinterCallback)  # the table says it
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return plain_model(trainer.model).eval()


def _time(student: PreTrainedModel, candidate: Candidate, rows: TokenRows) -> None:
    speed = measure_cost(
        {"student": student}, rows, prefill_length=64, decode_tokens=16, rounds=3, show_progress=False
    )["student"]
    candidate.prefill_tokens_per_second = speed["prefill_tokens_per_second"]["median"]
    candidate.decode_tokens_per_second = speed["decode_tokens_per_second"]["median"]


class _Record:
    """Results so far: on disk, and as a table on the terminal."""

    def __init__(
        self, folder: str | os.PathLike[str] | None, inputs: str, settings: Mapping[str, Any], show_progress: bool
    ) -> None:
        self.folder = None if folder is None else require_writable(folder)
        self.inputs, self.settings = inputs, settings
        self.candidates: list[Candidate] = []
        self.costs: dict[str, float] = {}
        self.display: Live | None = Live(console=Console(stderr=True), auto_refresh=False) if show_progress else None
        if self.path is not None and self.path.is_file():
            values = read_artefact(self.path)
            if values.get("inputs") != inputs:
                raise OutputError(
                    f"{self.path} is of another search: another teacher, other scores, data or settings. "
                    "Choose another output_dir, or remove that file."
                )
            self.candidates = [Candidate.from_dict(entry) for entry in values["candidates"]]
            self.costs = values["costs"]
        else:
            self.clean()  # students of whatever search was here before

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / SEARCH_NAME

    def live(self) -> Any:
        """The table on the terminal, for the duration of the context."""
        return self.display or contextlib.nullcontext()

    def candidate(self, shape: Shape) -> Candidate:
        """What is known of a shape, from now on at least its size."""
        for candidate in self.candidates:
            if candidate.name == shape.name:
                return candidate
        self.candidates.append(Candidate(shape.request, shape.num_parameters))
        return self.candidates[-1]

    def save(self) -> None:
        """Write what is known, whole or not at all, and show it."""
        if self.path is not None:
            values = {
                "inputs": self.inputs,
                "settings": public_settings(self.settings),
                "costs": self.costs,
                "candidates": [candidate.to_dict() for candidate in self.candidates],
            }
            write_artefact(self.path, values)
        if self.display is not None:
            self.display.update(table(self.candidates), refresh=True)

    def clean(self) -> None:
        """Remove the students, of which only the shape is wanted."""
        if self.folder is not None:
            shutil.rmtree(self.folder / CANDIDATES_DIR, ignore_errors=True)


def table(candidates: Sequence[Candidate]) -> Table:
    """The candidates as a table, best first."""
    made = Table("shape", "parameters", "KL pruned", "KL distilled", "tokens", "behind the best")
    retrained = any(candidate.rounds for candidate in candidates)
    for candidate in sorted(candidates, key=lambda each: (-len(each.rounds), each.kl)):
        last = candidate.rounds[-1] if candidate.rounds else None
        gap = candidate.behind if last or not retrained else None
        made.add_row(
            candidate.name,
            f"{candidate.num_parameters:,}",
            "–" if candidate.proxy is None else f"{candidate.proxy['value']:.3f} ± {candidate.proxy['stderr']:.3f}",
            "–" if last is None else f"{last['kl']:.3f} ± {last['stderr']:.3f}",
            "–" if last is None else f"{last['num_tokens']:,}",
            "–" if gap is None else f"{gap['value']:.3f} ± {gap['stderr']:.3f}",
        )
    return made
