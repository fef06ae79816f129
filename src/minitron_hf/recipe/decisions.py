"""Single recommendations, each with its source in the papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..families import ArchSpec, text_config
from ..sizes.resolve import repaired_axes
from ..sizes.shapes import Shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


#: What the sources are.
SOURCES: Mapping[str, str] = {
    "P1": "arXiv 2407.14679",
    "P2": "arXiv 2408.11796",
    "MO": "NVIDIA Model Optimizer, examples/pruning/README.md",
    "M": "minitron-hf, benchmarks/results/*-repair.json; beyond the papers",
}
#: From this share of dropped layers on, states and embeddings are compared too.
MUCH_DEPTH = 1 / 4
#: The largest teacher that width was compared with depth on, Nemotron-4 15B.
LARGEST_MEASURED = 16e9
#: What P2 trained Llama-3.1-8B's students with: tokens, rows of a step, tokens of a row; and the steps that makes.
P2_TOKENS, P2_ROWS, P2_LENGTH = 94e9, 1152, 8192
P2_STEPS = P2_TOKENS / (P2_ROWS * P2_LENGTH)
P2_WARMUP, P2_CORRECTION_TOKENS = 40, 100e9
#: Fewer rows make a step too noisy for P2's learning rate.
LEAST_ROWS = 8


@dataclass(frozen=True)
class Decision:
    """One thing decided.

    Attributes:
        name: what about.
        value: what is recommended, in few words.
        reason: why.
        source: where that was found.
        settings: entries of the recipe that follow, by their dotted names.
    """

    name: str
    value: str
    reason: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _repair(spec: ArchSpec, config: PretrainedConfig, last: Shape) -> list[Decision]:
    """One decision where neurons or heads are cut."""
    try:
        if not repaired_axes(spec, spec.sizes(config), last.sizes):
            return []
    except PlanError as error:
        return [Decision("repair", "none", str(error), "M")]
    return [
        Decision(
            "repair",
            "output projections refitted to what is kept, by least squares",
            "Better than cutting alone in every case of three small models, before distillation and after it, for one "
            "more forward pass; adding dropped heads to kept ones (P1) was worse in all.",
            "M",
            {"prune.repair": "least_squares"},
        )
    ]


def _search(candidates: Sequence[Shape], tokens: float) -> Decision:
    others = candidates[1:4]
    if not others:
        return Decision("search", "none", "No other shape meets the target by these axes.", "P1, practice 9")
    return Decision(
        "search",
        "also try " + "; ".join(shape.name for shape in others),
        f"Ranks before retraining deceive: retrain each on about 2% of the tokens ({_short(tokens / 50)}; ranks "
        "settle after some 300 steps) and keep the best.",
        "P1, practice 9",
    )


def _correction(own_corpus: bool, rate: float | None, tokens: float, schedule: Decision) -> Decision:
    if own_corpus:
        return Decision("teacher correction", "none", "The corpus is the teacher's own.", "P2")
    reason = (
        "The corpus is not the teacher's own: fine-tuned on it at a fifth of its peak learning rate, it lowers the "
        "student's loss by over 6%. P2 spent 100B tokens on that and 94B on the student; whether fewer do is open."
    )
    if rate is None:
        return Decision(
            "teacher correction",
            "yes, once its peak learning rate is known",
            f"{reason} Give it as --teacher-learning-rate; without it the recipe has no correction.",
            "P2",
        )
    correction = min(round(tokens), round(P2_CORRECTION_TOKENS))
    arguments = {
        name: schedule.settings[f"distill.{name}"]
        for name in ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    }
    return Decision(
        "teacher correction",
        f"{_short(correction)} tokens at {rate / 5:g}",
        reason,
        "P2",
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
            "P1, practice 6, table 17",
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
        "P1, practice 7",
        {"distill.hidden_loss": None, "distill.embedding_loss": None},
    )


def _schedule(config: PretrainedConfig, tokens: float) -> Decision:
    length = min(P2_LENGTH, getattr(text_config(config), "max_position_embeddings", None) or P2_LENGTH)
    rows = min(P2_ROWS, max(LEAST_ROWS, round(tokens / (P2_STEPS * length))))
    steps = max(1, round(tokens / (rows * length)))
    warmup = min(P2_WARMUP, steps // 10)
    return Decision(
        "schedule",
        f"{_short(tokens)} tokens a round: {steps:,} steps of {rows:,} × {length:,}, {warmup} of them warm-up, "
        "rate 1e-4 → 1e-5, cosine",
        "P2's schedule for Llama-3.1-8B (94B tokens, 1,152 × 8,192), with smaller steps where there are fewer tokens. "
        "The rate decides what pruning is worth: try a few on a small model.",
        "P2",
        {
            "distill.max_length": length,
            "distill.per_device_train_batch_size": 1,
            "distill.gradient_accumulation_steps": rows,
            "distill.max_steps": steps,
            "distill.learning_rate": 1e-4,
            "distill.lr_scheduler_type": "cosine_with_min_lr",
            "distill.lr_scheduler_kwargs": {"min_lr": 1e-5},
            "distill.warmup_steps": warmup,
        },
    )


def _short(number: float) -> str:
    """A large number in few characters.

    >>> _short(8030261248), _short(94e9), _short(400_000), _short(12)
    ('8.03B', '94B', '400k', '12')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
