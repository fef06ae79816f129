"""Recommends how to prune a teacher: its config, a target and a budget become decisions with reasons, and a recipe.

`decisions.SOURCES` names the two papers and the other sources of the decisions.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, spec_for
from ..models import count_parameters
from ..sizes.legality import reason_not_cuttable
from ..sizes.shapes import TOLERANCE, Shape
from ..sizes.targets import NEURONS, enumerate_depths, enumerate_widths, select_near_target
from .decisions import (
    IMPORTANCE,
    LARGEST_MEASURED,
    LAYERS,
    LOSS,
    MINITRON_PAPER,
    MODEL_OPTIMIZER,
    P2_TOKENS,
    PRUNING_PAPER,
    Decision,
    _correction,
    _intermediate,
    _repair,
    _schedule,
    _search,
    _short,
    teacher_decision,
)
from .reading import apply_overrides, write_yaml
from .schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Goal = Literal["quality", "latency"]
#: Share of the parameters that a round keeps at least (Model Optimizer: "up to 1/3rd parameter reduction").
LEAST_KEPT = 2 / 3


@dataclass(frozen=True)
class Recommendation:
    """Decisions for a teacher, and the students that they lead to.

    Attributes:
        decisions: in the order in which they are taken.
        rounds: the student of every round, the last one at the target.
    """

    decisions: tuple[Decision, ...]
    rounds: tuple[Shape, ...]

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
        for each in [recipe.in_round(number) for number in range(1, len(recipe.rounds) + 1)] or [recipe]:
            each.pruner_config  # noqa: B018 (refuses what is wrong)
        return values

    def to_yaml(self, recipe: Mapping[str, Any]) -> str:
        """A recipe of `recipe()` as YAML, with the decisions as comments."""
        lines = ["Written by minitron-hf recommend."]
        lines += [f"{one.name}: {one.value}. {one.reason} [{one.source}]" for one in self.decisions]
        comment = "\n".join(
            textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
            for line in lines
        )
        return f"{comment}\n{write_yaml(dict(recipe))}"


def recommend(
    config: PretrainedConfig,
    target: float,
    *,
    tokens: float = P2_TOKENS,
    goal: Goal = "quality",
    rounds: int | None = None,
    own_corpus: bool = False,
    teacher_learning_rate: float | None = None,
) -> Recommendation:
    """Recommend what the two Minitron papers would do with a teacher. Only its config is read; nothing is random.

    Args:
        config: the teacher's config.
        target: parameters of the student, tied ones once; below 1: the fraction of the teacher's that stays.
        tokens: number of tokens to distil on, in all rounds together. Sreenivas et al. used 94 billion.
        goal: `"quality"`, the best student of its size, or `"latency"`, the fastest.
        rounds: number of prune-and-distil rounds; None: as many as the target asks for.
        own_corpus: whether the teacher was trained on this corpus.
        teacher_learning_rate: peak learning rate of the teacher's training, which teacher correction needs.

    Raises:
        PlanError: if an argument makes no sense, or the target is out of reach.
        UnsupportedModelError: if the family is unknown.
    """
    total = count_parameters(config)
    parameters = _num_parameters(target, total)
    _require_arguments(tokens, goal, rounds, teacher_learning_rate)
    spec = spec_for(config)
    by_depth, axes = _axes(spec, config, goal, total)
    shapes, candidates = _candidates(config, parameters, by_depth)
    share = target if target < 1 else parameters / total  # unrounded, so that two thirds are two thirds
    wanted = rounds or max(1, math.ceil(math.log(share) / math.log(LEAST_KEPT) - 1e-9))
    students = _rounds(spec, config, shapes, candidates[0], total, wanted)
    depths = [spec.sizes(config)["layers"], *(shape.sizes["layers"] for shape in students)]
    dropped = max(1 - after / before for before, after in itertools.pairwise(depths))
    per_round = tokens / len(students)
    schedule = _schedule(config, per_round)
    decisions = (
        teacher_decision(total, parameters),
        axes,
        _shape(spec, config, candidates[0], by_depth),
        _round_decision(students, total, parameters, len(students) if rounds is None else rounds, rounds is not None),
        IMPORTANCE,
        *([LAYERS] if by_depth else []),
        *_repair(spec, config, students[-1]),
        _search(candidates, tokens),
        _correction(own_corpus, teacher_learning_rate, per_round, schedule),
        LOSS,
        _intermediate(dropped),
        schedule,
    )
    return Recommendation(decisions, students)


def _num_parameters(target: float, total: int) -> int:
    """The parameters of the student, from a number or a fraction of the teacher's."""
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


def _axes(spec: ArchSpec, config: PretrainedConfig, goal: Goal, total: int) -> tuple[bool, Decision]:
    """Whether to cut depth rather than width."""
    width = [name for name in ("hidden_size", *NEURONS) if not reason_not_cuttable(spec, config, name)]
    no_depth = reason_not_cuttable(spec, config, "num_hidden_layers")
    if not width and no_depth:
        raise PlanError(f"Neither width nor depth of this '{spec.model_type}' model can be cut: {no_depth}")
    by_depth = not width or (goal == "latency" and not no_depth)
    if by_depth and goal == "latency":
        reason = "At equal size fewer layers are faster: 2.7 times the teacher's speed, where width gives 1.8 times."
    elif by_depth:
        reason = f"Width would be better, but cannot be cut: {reason_not_cuttable(spec, config, 'hidden_size')}"
    else:
        reason = "At equal size width keeps more than depth (MMLU 60.5 against 58.7 at half of Llama-3.1-8B)."
        if total > LARGEST_MEASURED:
            reason += " That was measured up to 15B: try depth as well on a teacher of this size."
        if goal == "latency":
            reason = f"Depth would be faster, but cannot be cut: {no_depth}"
    if "experts" in spec.axis:
        reason += " Both papers measured dense models; all experts stay here."
    return by_depth, Decision(
        "axes",
        "depth" if by_depth else "width before depth",
        reason,
        MINITRON_PAPER if by_depth else f"{PRUNING_PAPER}, practice 4; {MINITRON_PAPER}",
    )


def _candidates(config: PretrainedConfig, parameters: int, by_depth: bool) -> tuple[list[Shape], list[Shape]]:
    """All shapes considered, and those at the target, the best first."""
    if by_depth:
        shapes = enumerate_depths(config)
        return shapes, select_near_target(shapes, parameters)[:1]
    shapes, names = enumerate_widths(config, parameters)
    before = spec_for(config).sizes(config)

    def inequality(shape: Shape) -> float:
        """How differently stream and neurons are cut."""
        shares = [math.log(shape.sizes[axis] / before[axis]) for axis in map(PRUNER_FIELDS.__getitem__, names)]
        return max(shares) - min(shares)

    widest: dict[int, Shape] = {}
    for shape in select_near_target(shapes, parameters):  # largest first
        widest.setdefault(shape.sizes["hidden"], shape)
    return shapes, sorted(widest.values(), key=inequality)


def _rounds(
    spec: ArchSpec, config: PretrainedConfig, shapes: Sequence[Shape], last: Shape, total: int, wanted: int
) -> tuple[Shape, ...]:
    """Students on the way to the last one, in equal ratios: every size between the round before and the last."""
    steps: list[Shape] = []
    sizes = spec.sizes(config)
    for number in range(1, wanted):
        goal = total * (last.num_parameters / total) ** (number / wanted)
        between = [
            shape
            for shape in shapes
            if last.num_parameters < shape.num_parameters < (steps[-1].num_parameters if steps else total)
            and all(last.sizes[axis] <= size <= sizes[axis] for axis, size in shape.sizes.items())
        ]
        if between:
            steps.append(min(between, key=lambda shape: _distance(shape, goal, last, sizes)))
            sizes = dict(steps[-1].sizes)
    return (*steps, last)


def _distance(shape: Shape, goal: float, last: Shape, sizes: Mapping[str, int]) -> tuple[bool, float]:
    """Sort key: outside the tolerance or not; then the distance, or the inequality of the cuts."""
    off = abs(shape.num_parameters / goal - 1)
    ways = [
        math.log(shape.sizes[axis] / sizes[axis]) / math.log(last.sizes[axis] / sizes[axis])
        for axis in sizes
        if last.sizes[axis] < sizes[axis]
    ]
    return off > TOLERANCE, off if off > TOLERANCE else max(ways) - min(ways)


def _shape(spec: ArchSpec, config: PretrainedConfig, shape: Shape, by_depth: bool) -> Decision:
    before = spec.sizes(config)
    changed = [
        f"{FIELD_OF_AXIS[axis]} {before[axis]:,} → {size:,}"
        for axis, size in shape.sizes.items()
        if size < before[axis] and axis in FIELD_OF_AXIS
    ]
    reason = (
        "As many layers as the target holds; width stays."
        if by_depth
        else "The residual stream and the MLP become narrower, in proportions as equal as the target allows. The "
        "layers stay, and so do the attention heads, unless together they must be as wide as the residual stream."
    )
    return Decision("shape", ", ".join(changed), reason, MINITRON_PAPER)


def _round_decision(steps: Sequence[Shape], total: int, parameters: int, wanted: int, forced: bool) -> Decision:
    sequence = " → ".join([_short(total), *(_short(shape.num_parameters) for shape in steps)])
    cut = 1 - parameters / total
    if len(steps) == 1:
        reason = f"{cut:.0%} of the parameters go; up to a third goes well at once."
        if cut > 1 - LEAST_KEPT + 1e-9:
            reason = f"{cut:.0%} of the parameters go at once, more than the third that goes well" + (
                ", as was asked for; Sreenivas et al. cut Llama-3.1-8B so." if forced else ": no shape lies between."
            )
    else:
        reason = (
            f"{cut:.0%} of the parameters go, about a third at most in each round: large → medium → small beats one "
            "cut (MMLU 42.5 against 37.8 at equal compute). Sreenivas et al. cut Llama-3.1-8B by 44% at once, which "
            "--rounds 1 does."
        )
    cuts = [
        {name: size for name in PRUNER_FIELDS if (size := getattr(shape.request, name)) is not None} for shape in steps
    ]
    settings: dict[str, Any] = {f"prune.{name}": size for name, size in cuts[0].items()}
    if len(steps) > 1:
        settings = {"rounds": [{"prune": sizes} for sizes in cuts]}
    if len(steps) < wanted:
        reason += " There are no more shapes in between."
    return Decision(
        "rounds",
        f"{len(steps)}: {sequence}",
        reason,
        f"{PRUNING_PAPER}, practice 1; {MODEL_OPTIMIZER}",
        settings,
    )
