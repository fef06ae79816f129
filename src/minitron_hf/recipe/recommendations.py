"""Recommends how to prune a teacher: its config, a target and a budget become decisions with reasons, and a recipe.

`decisions.SOURCES` names the two papers and the other sources of the decisions.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..data.context import context_length
from ..errors import PlanError, checks_kinds
from ..families import PRUNER_FIELDS, spec_for
from ..models import count_parameters
from ..pruning.candidates import Candidate
from ..sizes.shapes import Shape
from .decisions import (
    LOSS,
    MEASURED_HERE,
    MODEL_OPTIMIZER,
    PRUNING_PAPER,
    Decision,
    _correction,
    _importance,
    _intermediate,
    _repair,
    _schedule,
    _search,
    _short,
    layers_decision,
    teacher_decision,
)
from .reading import apply_overrides, write_yaml
from .schedules import LEAST_ROUND_STEPS, PAPER_TOKENS, Corpus, most_rounds, peak_rate, plan_schedule
from .schema import Recipe
from .shape_choice import Choice, choose_shape, cut_of, shape_decision, shapes_of_rounds, shapes_to_measure

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Goal = Literal["quality", "latency"]
#: Sections of a recipe that no decision makes.
OWN_SECTIONS = ("teacher", "output_dir", "data")
#: Decisions that tell sizes, beside `rounds`, which sets them.
BY_SIZES = ("teacher", "axes", "shape")
#: Share of the parameters that a round keeps at least (Model Optimizer: "up to 1/3rd parameter reduction").
LEAST_KEPT = 2 / 3


@dataclass(frozen=True)
class Recommendation:
    """Decisions for a teacher, and the students that they lead to.

    Attributes:
        decisions: in the order in which they are taken.
        rounds: the student of every round, the last one at the target.
        context: tokens of the teacher's context; None if it has no limit.
    """

    decisions: tuple[Decision, ...]
    rounds: tuple[Shape, ...]
    context: int | None

    def __getitem__(self, name: str) -> Decision:
        return {decision.name: decision for decision in self.decisions}[name]

    def recipe(
        self, teacher: str, *, train: Any, eval: Any, output_dir: str, overrides: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The recipe: the settings of all decisions, as `Recipe.from_dict` takes them.

        Args:
            teacher: Hub id or folder.
            train: corpus for distillation: a source, or a section of `data`.
            eval: held-out corpus, likewise.
            output_dir: run folder.
            overrides: changes, each `"a.b=value"`.

        Raises:
            DataError: if it is no recipe with these changes.
        """
        from .settings import require_lengths, require_sections

        values: dict[str, Any] = {
            "teacher": teacher,
            "output_dir": output_dir,
            "data": {"train": train, "eval": eval},
        }
        for decision in self.decisions:
            for name, value in decision.settings.items():
                *sections, leaf = name.split(".")
                section = values
                for one in sections:
                    section = section.setdefault(one, {})
                section[leaf] = value
        values = apply_overrides(values, list(overrides))
        recipe = Recipe.from_dict(values)
        for number, each in enumerate(recipe.each_round(), 1):
            each.pruner_config  # noqa: B018 (refuses what is wrong)
            require_sections(each, f"rounds.{number}." if recipe.rounds else "")
        require_lengths(recipe, self.context)
        return values

    def to_yaml(self, recipe: Mapping[str, Any]) -> str:
        """A recipe of `recipe()` as YAML, with the decisions as comments; those that were changed are marked."""
        changes = _changes(self.decisions, recipe)
        lines = ["Written by minitron-hf recommend."]
        if changes:
            told = "; ".join(change for found in changes.values() for change in found)
            lines.append(
                f"Changed afterwards: {told}. The lines marked with a star tell what was recommended instead."
            )
        for one in self.decisions:
            star = "* " if one.name in changes or (one.name in BY_SIZES and changes.get("rounds")) else ""
            lines.append(f"{star}{one.name}: {one.value}. {one.reason} [{one.source}]")
        comment = "\n".join(
            textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
            for line in lines
        )
        return f"{comment}\n{write_yaml(dict(recipe))}"


def _changes(decisions: Sequence[Decision], recipe: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of a decision → what a recipe has instead of its settings; "" → entries that no decision made.

    Args:
        decisions: of a recommendation.
        recipe: made of them, with changes.
    """
    found = _leaves({name: value for name, value in recipe.items() if name not in OWN_SECTIONS})
    changes: dict[str, list[str]] = {}
    for decision in decisions:
        for name, value in _leaves(decision.settings).items():
            now = found.pop(name, None)
            if now != value:
                text = (
                    f"{name}={json.dumps(now, ensure_ascii=False)} instead of {json.dumps(value, ensure_ascii=False)}"
                )
                changes.setdefault(decision.name, []).append(text)
    if found:
        changes[""] = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in found.items()]
    return changes


def _leaves(values: Any, where: str = "") -> dict[str, Any]:
    """Dotted name → value, of nested entries; those of lists of sections count from 1."""
    if isinstance(values, list) and any(isinstance(one, Mapping) for one in values):
        values = {str(number): one for number, one in enumerate(values, 1)}
    if not isinstance(values, Mapping):
        return {where: values}
    inner = (_leaves(value, f"{where}.{name}" if where else str(name)) for name, value in values.items())
    return {name: value for leaves in inner for name, value in leaves.items()}


@checks_kinds
def recommend(
    config: PretrainedConfig,
    target: float,
    *,
    tokens: float = PAPER_TOKENS,
    goal: Goal = "quality",
    rounds: int | None = None,
    own_corpus: bool = False,
    teacher_learning_rate: float | None = None,
    corpus: Corpus | None = None,
    measure: Callable[[list[Shape]], list[Candidate]] | None = None,
) -> Recommendation:
    """Recommend how to prune a teacher and how to distil the student on a number of tokens.

    Every decision names its paper or measurement. Only the config is read, unless `measure` is given.

    Args:
        config: the teacher's config.
        target: parameters of the student, tied ones once; below 1: the fraction of the teacher's that stays.
        tokens: number of tokens to distil on, in all rounds together. Sreenivas et al. used 94 billion.
        goal: `"quality"`, the best student of its size, or `"latency"`, the fastest.
        rounds: number of prune-and-distil rounds; None: as many as target and tokens ask for.
        own_corpus: whether the teacher was trained on this corpus.
        teacher_learning_rate: peak learning rate of the teacher's training, which teacher correction needs.
        corpus: lengths of the training corpus, which limit the length of a row; None if it is not at hand.
        measure: measures shapes on text, best first (`measure_on_text`); None goes by what was measured elsewhere.

    Raises:
        PlanError: if an argument makes no sense, or the target is out of reach.
        UnsupportedModelError: if the family is unknown.
    """
    total = count_parameters(config)
    parameters, spec = _num_parameters(target, total), spec_for(config)
    _require_arguments(tokens, goal, rounds, teacher_learning_rate)
    choice = choose_shape(config, goal, tokens, total, parameters)
    choice = choice if measure is None else _choose_by_measuring(config, choice, parameters, measure)
    wanted = _rounds_by_target(target if target < 1 else parameters / total)
    number = rounds or min(wanted, most_rounds(tokens))
    students = shapes_of_rounds(config, choice, total, number)
    depths = [spec.sizes(config)["layers"], *(shape.sizes["layers"] for shape in students)]
    dropped = max(1 - after / before for before, after in itertools.pairwise(depths))
    plan = plan_schedule(config, tokens, num_rounds=len(students), corpus=corpus)
    schedule = _schedule(plan, peak_rate(tokens, total), tokens, len(students), corpus)
    return Recommendation(
        (
            teacher_decision(total, parameters),
            *choice.decisions,
            _round_decision(students, total, parameters, _Rounds(wanted, number, rounds is not None, plan.steps)),
            _importance(config, plan, tokens),
            *([layers_decision(total, depths)] if dropped else []),
            *_repair(spec, config, students[-1]),
            _search(choice.candidates[1:], tokens),
            _correction(own_corpus, teacher_learning_rate, tokens / len(students), schedule),
            LOSS,
            _intermediate(dropped),
            schedule,
        ),
        students,
        context_length(config),
    )


def _rounds_by_target(share: float) -> int:
    """Number of rounds that each keep `LEAST_KEPT` of the parameters or more; `share` is not rounded before."""
    return max(1, math.ceil(math.log(share) / math.log(LEAST_KEPT) - 1e-9))


def _choose_by_measuring(
    config: PretrainedConfig, choice: Choice, parameters: int, measure: Callable[[list[Shape]], list[Candidate]]
) -> Choice:
    """The choice with the shapes that were measured, best first, and a decision that says so."""
    shapes = {shape.name: shape for shape in shapes_to_measure(config, choice, parameters)}
    measured = measure(list(shapes.values()))
    candidates = [shapes[one.name] for one in measured]
    cut = cut_of(config, candidates[0])
    return replace(
        choice, cut=cut, candidates=candidates, decisions=(shape_decision(config, candidates[0], cut, measured),)
    )


def _num_parameters(target: float, total: int) -> int:
    """The parameters of the student, from a number or a fraction of the teacher's."""
    if target > 1 and target != round(target):
        raise PlanError(f"target={target:g}: expected a fraction of the teacher below 1, or a number of parameters.")
    parameters = round(target * total) if 0 < target < 1 else round(target)
    if not 0 < parameters < total:
        raise PlanError(
            f"target={target:g}: expected less than the teacher's {total:,} parameters, or a fraction of it."
        )
    return parameters


def _require_arguments(tokens: float, goal: str, rounds: int | None, teacher_learning_rate: float | None) -> None:
    if not tokens >= 1:
        raise PlanError(f"tokens={tokens!r}: expected at least 1.")
    if goal not in get_args(Goal):
        raise PlanError(f"goal={goal!r}: expected {' or '.join(get_args(Goal))}.")
    if rounds is not None and rounds < 1:
        raise PlanError(f"rounds={rounds!r}: expected at least 1.")
    if teacher_learning_rate is not None and not teacher_learning_rate > 0:
        raise PlanError(f"teacher_learning_rate={teacher_learning_rate!r}: expected a number above 0.")


@dataclass(frozen=True)
class _Rounds:
    """Numbers of rounds.

    Attributes:
        by_target: as many as the target asks for.
        wanted: as many as were to be planned.
        forced: whether the user gave the number.
        steps: optimiser steps of each.
    """

    by_target: int
    wanted: int
    forced: bool
    steps: int


def _round_decision(shapes: Sequence[Shape], total: int, parameters: int, rounds: _Rounds) -> Decision:
    """How many rounds, and the student of each."""
    cuts = [
        {name: size for name in PRUNER_FIELDS if (size := getattr(shape.request, name)) is not None}
        for shape in shapes
    ]
    settings: dict[str, Any] = {f"prune.{name}": size for name, size in cuts[0].items()}
    if len(shapes) > 1:
        settings = {"rounds": [{"prune": sizes} for sizes in cuts]}
    source = f"{PRUNING_PAPER}, practice 1; {MODEL_OPTIMIZER}, examples/pruning/README.md"
    if not rounds.forced and rounds.wanted < rounds.by_target:
        source += f"; {MEASURED_HERE}, benchmarks/results/babyllama-105-rounds.json"
    sequence = " → ".join([_short(total), *(_short(shape.num_parameters) for shape in shapes)])
    return Decision(
        "rounds", f"{len(shapes)}: {sequence}", _why_rounds(shapes, 1 - parameters / total, rounds), source, settings
    )


def _why_rounds(shapes: Sequence[Shape], cut: float, rounds: _Rounds) -> str:
    """Why there are so many rounds."""
    limited = not rounds.forced and rounds.wanted < rounds.by_target
    if len(shapes) > 1:
        reason = (
            f"{cut:.0%} of the parameters go, {'' if limited else 'about a third at most in each round: '}large → "
            "medium → small beats one cut (MMLU 42.5 against 37.8 at equal compute). Sreenivas et al. cut "
            "Llama-3.1-8B by 44% at once, which --rounds 1 does."
        )
    elif cut <= 1 - LEAST_KEPT + 1e-9:
        reason = f"{cut:.0%} of the parameters go; up to a third goes well at once."
    else:
        reason = f"{cut:.0%} of the parameters go at once, more than the third that goes well"
        if rounds.forced:
            reason += ", as was asked for; Sreenivas et al. cut Llama-3.1-8B so."
        else:
            reason += "." if limited else ": no shape lies between."
    if limited:
        reason += (
            f" {rounds.by_target} rounds of a third each would have fewer than {LEAST_ROUND_STEPS} steps: two rounds "
            "of 80 steps still paid on a model of 0.9M parameters."
        )
    if len(shapes) < rounds.wanted:
        reason += " There are no more shapes in between."
    if rounds.forced and rounds.steps < LEAST_ROUND_STEPS and len(shapes) > 1:
        reason += f" {rounds.steps} steps a round are few: take fewer rounds, or more tokens."
    return reason
