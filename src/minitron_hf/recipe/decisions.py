"""Single decisions of a recommendation, each with its source."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..families import ArchSpec
from ..pruning.choice_of_layers import LARGE_BLOCK
from ..scoring.calibration import default_max_length
from ..sizes.resolve import repaired_axes
from ..sizes.shapes import Shape
from .schedules import PAPER_RATE, SHORT_RUN, SMALL_TEACHER, Corpus, Schedule

if TYPE_CHECKING:
    from transformers import PretrainedConfig


#: How the sources are cited.
PRUNING_PAPER, MINITRON_PAPER = "Muralidharan et al. 2024", "Sreenivas et al. 2024"
MODEL_OPTIMIZER, MEASURED_HERE = "NVIDIA Model Optimizer", "measured here"
SOURCES: Mapping[str, str] = {
    PRUNING_PAPER: "Compact Language Models via Pruning and Knowledge Distillation, arXiv 2407.14679",
    MINITRON_PAPER: "LLM Pruning and Distillation in Practice: The Minitron Approach, arXiv 2408.11796",
    MODEL_OPTIMIZER: "examples/pruning/README.md",
    MEASURED_HERE: "the benchmarks of minitron-hf, in the files that are named",
}
#: Where the comparisons of shapes and layers at a short budget stand.
STARTS_FILE = "docs/explanation/real-teachers.md, starts"
#: From this share of dropped layers on, states and embeddings are compared too.
MUCH_DEPTH = 1 / 4
#: The largest teacher that width was compared with depth on, Nemotron-4 15B.
LARGEST_MEASURED = 16e9
#: Tokens of teacher correction (Sreenivas et al. 2024, §2.1).
CORRECTION_TOKENS = 100e9
#: Fewer tokens than this do not rank shapes by brief retraining.
RANKING_TOKENS = 1e6


@dataclass(frozen=True)
class Decision:
    """One decision of a recommendation.

    Attributes:
        name: subject.
        value: what is recommended, in a few words.
        reason: why.
        source: paper or measurement that the reason rests on.
        settings: the resulting entries of the recipe, by their dotted names.
    """

    name: str
    value: str
    reason: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


#: Rows of calibration data: of Muralidharan et al. 2024, §2.2, and the fewest for short budgets.
PAPER_CALIBRATION, LEAST_CALIBRATION = 1024, 64
#: Tokens of calibration data, as a share of the tokens to distil on.
CALIBRATION_SHARE = 0.05
LOSS = Decision(
    "loss",
    "KL(teacher ‖ student) of the logits alone, T = 1, no cross-entropy",
    "KL alone beats KL with cross-entropy, reverse KL, MSE and cosine; of 0.1, 0.5, 1 and 3, temperature 1 is best.",
    f"{PRUNING_PAPER}, practice 5, table 15",
    {
        "distill.divergence": "forward_kl",
        "distill.kd_weight": 1.0,
        "distill.ce_weight": 0.0,
        "distill.temperature": 1.0,
    },
)


#: Measurements of the repair.
_REPAIR_FILES, _LAYER_FILES = "benchmarks/results/*-repair.json", "benchmarks/results/real/layers/*.json"


def layers_decision(total: int, depths: Sequence[int]) -> Decision:
    """Which layers go: a block, or single layers where a small teacher loses many.

    Args:
        total: parameters of the teacher.
        depths: layers of the teacher and of the students of all rounds.
    """
    kept = {"prune.keep_first_layers": 1, "prune.keep_last_layers": 1}
    dropped = max(before - after for before, after in itertools.pairwise(depths))
    if total < SMALL_TEACHER and dropped >= LARGE_BLOCK:
        return Decision(
            "layers",
            "single layers, first and last layer kept, by cosine similarity",
            "12 of 30 layers of SmolLM2-135M went: single ones left a KL of 1.63, a block 3.96. After distillation, "
            "the first ended at 0.962 (246k tokens), a block at 1.163 (2M tokens; one seed each).",
            f"{MEASURED_HERE}, {STARTS_FILE}",
            {"prune.contiguous": False, **kept},
        )
    return Decision(
        "layers",
        "one contiguous block, first and last layer kept, by perplexity without it",
        "The 16 single layers of least importance left Llama-3.1-8B at chance on WinoGrande, a block did not, before "
        "and after retraining.",
        f"{MINITRON_PAPER}, depth pruning; {PRUNING_PAPER}, practice 2",
        {"prune.contiguous": True, **kept, "scores.depth_metric": "perplexity"},
    )


def teacher_decision(total: int, parameters: int) -> Decision:
    """Which model to start from.

    Args:
        total: parameters of the teacher.
        parameters: parameters of the student.
    """
    return Decision(
        "teacher",
        f"{_short(total)} parameters → {_short(parameters)}",
        "Start from the smallest model above the target, as it is after its last phase of training.",
        f"{PRUNING_PAPER}, practices 8 and 10",
    )


def _importance(config: PretrainedConfig, plan: Schedule, tokens: float) -> Decision:
    """How to score units; on fewer rows where the budget is short."""
    length = min(default_max_length(config), plan.length)
    fitting = round(CALIBRATION_SHARE * tokens / length)
    rows = max(LEAST_CALIBRATION, min(PAPER_CALIBRATION, fitting))
    shorter = {} if length == default_max_length(config) else {"scores.max_length": length}
    reason = (
        "The norm over rows of the mean over tokens ranks best or second. Scoring again while cutting gains nothing "
        "after retraining."
    )
    if rows < PAPER_CALIBRATION:
        reason += f" The papers took 1,024 rows; here they would be more than {CALIBRATION_SHARE:.0%} of the tokens."
    return Decision(
        "importance",
        f"activations, one forward pass, (L2, mean), {rows:,} rows without padding",
        reason,
        f"{PRUNING_PAPER}, practices 2 and 3, table 13",
        {
            "scores.metric": "activation",
            "scores.batch_reduction": "l2",
            "scores.sequence_reduction": "mean",
            "scores.num_rows": rows,
            **shorter,
            "scores.packing": True,
        },
    )


def _repair(spec: ArchSpec, config: PretrainedConfig, last: Shape) -> list[Decision]:
    """One decision where neurons, heads or layers are cut."""
    try:
        if not (axes := repaired_axes(spec, spec.sizes(config), last.sizes)):
            return []
    except PlanError as error:
        return [Decision("repair", "none", str(error), f"{MEASURED_HERE}, {_REPAIR_FILES}")]
    if axes == ("layers",):
        return [
            Decision(
                "repair",
                "the projection before dropped layers takes over the linear part of what they added",
                "Closer to the teacher before distillation, above all where several layers are dropped at once; not "
                "measured after it.",
                f"{MEASURED_HERE}, {_LAYER_FILES}",
                {"prune.repair": "least_squares"},
            )
        ]
    return [
        Decision(
            "repair",
            "projections refitted to what is kept, by least squares",
            "Better than cutting alone in every case of three small models, before distillation and after it, for one "
            "more forward pass; adding dropped heads to kept ones, as Muralidharan et al. do, was worse in all.",
            f"{MEASURED_HERE}, {_REPAIR_FILES}",
            {"prune.repair": "least_squares"},
        )
    ]


def _search(others: Sequence[Shape], tokens: float) -> Decision:
    """Which other shapes are worth a try."""
    if not others:
        return Decision(
            "search", "none", "No other shape meets the target by these axes.", f"{PRUNING_PAPER}, practice 9"
        )
    value = "also try " + "; ".join(shape.name for shape in others[:3])
    reason = (
        f"Ranks before retraining mislead: retrain each on about 2% of the tokens ({_short(tokens / 50)}; ranks "
        "settle after some 300 steps) and keep the best."
    )
    if tokens / 50 < RANKING_TOKENS:
        reason = (
            "Ranks settle after some 300 steps of retraining, for which this budget is too short: compare whole "
            "runs, or the divergence before retraining (--measure)."
        )
    return Decision("search", value, reason, f"{PRUNING_PAPER}, §2.3 and practice 9")


def _correction(own_corpus: bool, rate: float | None, tokens: float, schedule: Decision) -> Decision:
    source = f"{MINITRON_PAPER}, §2.1"
    if own_corpus:
        return Decision("teacher correction", "none", "The teacher was trained on this corpus.", source)
    reason = (
        "The teacher was not trained on this corpus. Fine-tuning it there at a fifth of its peak learning rate lowers "
        "the student's loss by over 6%. Sreenivas et al. spent 100B tokens on that and 94B on the student; whether "
        "fewer suffice is not known."
    )
    if rate is None:
        return Decision(
            "teacher correction",
            "yes, once its peak learning rate is known",
            f"{reason} Give it as --teacher-learning-rate; without it the recipe has no correction.",
            source,
        )
    correction = max(min(round(tokens), round(CORRECTION_TOKENS)), 1)
    arguments = {
        name: schedule.settings[f"distill.{name}"]
        for name in ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    }
    return Decision(
        "teacher correction",
        f"{_short(correction)} tokens at {rate / 5:g}",
        reason,
        source,
        {
            "teacher_correction": {
                "original_learning_rate": rate,
                "num_tokens": correction,
                "arguments": arguments,
            }
        },
    )


def _intermediate(share: float) -> Decision:
    """By the share of the layers that a round drops at most."""
    if share >= MUCH_DEPTH:
        return Decision(
            "states and embeddings",
            "both, by cosine, weighted to equal the logits' loss",
            f"{share:.0%} of the layers go, a quarter or more: states two before the last layer and the embeddings' "
            "output lower the loss further (2.155 → 2.141).",
            f"{PRUNING_PAPER}, practice 6, table 17",
            {
                "distill.hidden_loss": "cosine",
                "distill.embedding_loss": "cosine",
                "distill.intermediate_weight": "dynamic",
            },
        )
    return Decision(
        "states and embeddings",
        "not compared",
        f"{share:.0%} of the layers go, less than a quarter: the logits alone are as good.",
        f"{PRUNING_PAPER}, practice 7",
        {"distill.hidden_loss": None, "distill.embedding_loss": None},
    )


def _schedule(plan: Schedule, rate: float, tokens: float, num_rounds: int, corpus: Corpus | None) -> Decision:
    """How to train on a number of tokens in all rounds together, at a peak learning rate."""
    in_all = f", {num_rounds * plan.steps:,} in all" if num_rounds > 1 else ""
    lengths = f"{plan.length_limit[0].upper()}{plan.length_limit[1:]} decides the length of a row"
    if corpus is None:
        lengths += "; the documents were not looked at"
    elif (passes := tokens / corpus.num_tokens) > 1:
        lengths += f"; the corpus has about {_short(corpus.num_tokens)} tokens and is read {passes:.1f} times"
    reason = (
        "The rate is that of the papers, for teachers of 8B and 12B parameters and 94B tokens; other budgets of large "
        "teachers are not measured."
    )
    if rate != PAPER_RATE:
        reason = (
            "3e-4 ended closer to a teacher of 135M parameters than the papers' 1e-4 and than 1e-3 after 262k tokens "
            f"(three seeds). Above {_short(SMALL_TEACHER)} parameters or {_short(SHORT_RUN)} tokens the papers' rate "
            "is taken."
        )
    return Decision(
        "schedule",
        f"{plan.steps:,} steps a round{in_all}, of {plan.rows:,} × {plan.length:,} tokens, {plan.warmup} of them "
        f"warm-up, rate {_rate(rate)} → {_rate(rate / 10)}, cosine",
        "Steps and their size grow with the budget, from 4,096 tokens at 1M in all (short runs here) to 9.4M at 94B "
        f"(Sreenivas et al., who took 40 steps of warm-up). {lengths}. {reason}",
        f"{MINITRON_PAPER}, §3; {MEASURED_HERE}, docs/explanation/real-teachers.md",
        {
            "distill.max_length": plan.length,
            "distill.per_device_train_batch_size": plan.batch_size,
            "distill.gradient_accumulation_steps": plan.accumulation,
            "distill.max_steps": plan.steps,
            "distill.learning_rate": rate,
            "distill.lr_scheduler_type": "cosine_with_min_lr",
            "distill.lr_scheduler_kwargs": {"min_lr": float(f"{rate / 10:.3g}")},
            "distill.warmup_steps": plan.warmup,
        },
    )


def _rate(rate: float) -> str:
    """A learning rate as people write it.

    >>> _rate(1e-4), _rate(3e-4 / 10)
    ('1e-4', '3e-5')
    """
    return f"{rate:.0e}".replace("e-0", "e-")


def _short(number: float) -> str:
    """A large number in few characters.

    >>> _short(8030261248), _short(94e9), _short(400_000), _short(12)
    ('8.03B', '94B', '400k', '12')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
