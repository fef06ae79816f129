"""Chooses which sizes of a teacher to cut, and the shapes that meet a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..errors import PlanError
from ..evaluation.means import with_error
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, spec_for
from ..pruning.candidates import Candidate
from ..sizes.legality import reason_not_cuttable
from ..sizes.shapes import TOLERANCE, Shape
from ..sizes.targets import (
    LEAST_NEURONS,
    NEURONS,
    enumerate_depths,
    enumerate_widths,
    select_near_target,
    shapes_with_fewer_layers,
)
from .decisions import LARGEST_MEASURED, MEASURED_HERE, MINITRON_PAPER, PRUNING_PAPER, STARTS_FILE, Decision, _short

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: What is cut: residual stream and neurons; some layers and neurons; layers alone.
Cut = Literal["width", "layers and neurons", "depth"]
#: Below this number of tokens, layers and neurons are cut rather than the residual stream. The geometric middle of the
#: two budgets at which the two were compared, 246k (here) and 94B tokens (Sreenivas et al. 2024).
SHORT_BUDGET = 150e6
#: What layers lose as a part of what neurons lose, in logarithms of the shares that are kept. Of five shapes of
#: SmolLM2-135M with 94.5M parameters, the best after 131k tokens had 26 of 30 layers and 960 of 1,536 neurons:
#: log(0.87) is 0.3 of log(0.63).
LAYERS_PART = 0.3
#: Where a comparison at a short budget stands.
SHAPES_FILE = "docs/explanation/measurements.md, shapes of a real teacher"


@dataclass(frozen=True)
class Choice:
    """What is cut, and the shapes that come into question.

    Attributes:
        cut: which sizes are cut.
        shapes: all shapes considered, for the rounds before the last.
        candidates: shapes at the target, the recommended one first.
        decisions: on the sizes that are cut.
    """

    cut: Cut
    shapes: list[Shape]
    candidates: list[Shape]
    decisions: tuple[Decision, ...]


def choose_shape(config: PretrainedConfig, goal: str, tokens: float, total: int, parameters: int) -> Choice:
    """Choose the shape of the student from what was measured elsewhere.

    Args:
        config: the teacher's config.
        goal: `"quality"` or `"latency"`.
        tokens: tokens to distil on.
        total: parameters of the teacher.
        parameters: parameters of the student.

    Raises:
        PlanError: if nothing can be cut, or the target is out of reach.
    """
    spec = spec_for(config)
    width = [name for name in ("hidden_size", *NEURONS) if not reason_not_cuttable(spec, config, name)]
    no_depth = reason_not_cuttable(spec, config, "num_hidden_layers")
    if not width and no_depth:
        raise PlanError(f"Neither width nor depth of this '{spec.model_type}' model can be cut: {no_depth}")
    mixed: list[Shape] = []
    if goal == "quality" and tokens < SHORT_BUDGET and not no_depth:
        mixed = layers_and_neurons(config, parameters)
    by_depth = not width or (goal == "latency" and not no_depth)
    cut: Cut = "depth" if by_depth else "layers and neurons" if mixed else "width"
    if mixed:
        shapes, candidates = mixed, mixed
    else:
        shapes, candidates = _candidates(config, parameters, by_depth)
    axes = _axes(spec, config, cut, goal, total)
    if goal == "quality" and tokens < SHORT_BUDGET and cut == "width":
        why = (
            no_depth or "no shape with three quarters of the layers and half of the neurons or more meets the target."
        )
        axes = replace(
            axes,
            reason=f"{axes.reason} Below {_short(SHORT_BUDGET)} tokens, layers and neurons would be cut, but {why}",
        )
    return Choice(cut, shapes, candidates, (axes, shape_decision(config, candidates[0], cut)))


def _axes(spec: ArchSpec, config: PretrainedConfig, cut: Cut, goal: str, total: int) -> Decision:
    """Which sizes to cut, and why."""
    value: str = cut
    if cut == "layers and neurons":
        source = (
            f"{MEASURED_HERE}, {STARTS_FILE}; {MEASURED_HERE}, {SHAPES_FILE}; {MINITRON_PAPER}, results of "
            "Llama-3.1-Minitron-4B"
        )
        reason = (
            f"Taken below {_short(SHORT_BUDGET)} tokens. On one real teacher (SmolLM2-135M to 94.5M parameters, 246k "
            "tokens) 26 layers and 960 neurons, repaired, ended at KL 0.674 (three seeds); neurons alone, repaired, "
            "at 0.746 (one seed). A narrower residual stream was compared once, with less calibration text: 0.963, "
            "fewer layers and neurons then 0.917. At 94B tokens width was better (Sreenivas et al.). "
            "Between the two budgets it is not measured."
        )
    elif cut == "depth" and goal == "latency":
        source = f"{MINITRON_PAPER}, speed on an H100"
        reason = "At equal size fewer layers are faster: 2.7 times the teacher's speed, where width gives 1.8 times."
    elif cut == "depth":
        source = f"{MINITRON_PAPER}, results of Llama-3.1-Minitron-4B"
        reason = f"Width would be better, but cannot be cut: {reason_not_cuttable(spec, config, 'hidden_size')}"
    else:
        value = "width before depth"
        source = f"{PRUNING_PAPER}, practice 4; {MINITRON_PAPER}, results of Llama-3.1-Minitron-4B"
        reason = "At equal size width keeps more than depth (MMLU 60.5 against 58.7 at half of Llama-3.1-8B)."
        if total > LARGEST_MEASURED:
            reason += " That was measured up to 15B: try depth as well on a teacher of this size."
        if goal == "latency":
            no_depth = reason_not_cuttable(spec, config, "num_hidden_layers")
            reason = f"Depth would be faster, but cannot be cut: {no_depth}"
    if "experts" in spec.axis:
        reason += " Both papers measured dense models; all experts stay here."
    return Decision("axes", value, reason, source)


def layers_and_neurons(config: PretrainedConfig, parameters: int) -> list[Shape]:
    """Shapes at a target with fewer layers and neurons, those nearest `LAYERS_PART` first; empty if there are none."""
    spec = spec_for(config)
    before = spec.sizes(config)

    def distance(shape: Shape) -> float:
        of_neurons = LAYERS_PART * math.log(_neurons_kept(shape, before))
        return abs(math.log(shape.sizes["layers"] / before["layers"]) - of_neurons)

    shapes = shapes_with_fewer_layers(config, parameters)
    mixed = [
        shape
        for shape in shapes
        if shape.sizes["layers"] < before["layers"] and LEAST_NEURONS <= _neurons_kept(shape, before) < 1
    ]
    return sorted(mixed, key=distance)


def _neurons_kept(shape: Shape, before: Mapping[str, int]) -> float:
    """The smallest share of neurons that a shape keeps."""
    axes = [PRUNER_FIELDS[name] for name in NEURONS]
    return min((shape.sizes[axis] / before[axis] for axis in axes if axis in shape.sizes), default=1.0)


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


def shapes_to_measure(config: PretrainedConfig, choice: Choice, parameters: int, most: int = 8) -> list[Shape]:
    """Shapes of all kinds at a target, for a comparison on text; the recommended one first.

    Args:
        config: the teacher's config.
        choice: what was chosen without text.
        parameters: parameters of the student.
        most: number of shapes.
    """
    kinds = [choice.candidates]
    if choice.cut != "depth":
        neurons_alone = [
            shape for shape in shapes_with_fewer_layers(config, parameters) if shape.request.num_hidden_layers is None
        ]
        widths = _candidates(config, parameters, by_depth=False)[1]
        kinds += [neurons_alone, layers_and_neurons(config, parameters), widths]
    found: dict[tuple[int, ...], Shape] = {}
    for turn in range(most):  # some of every kind
        for shapes in kinds:
            if turn < len(shapes):
                found.setdefault(tuple(shapes[turn].sizes.values()), shapes[turn])
    return list(found.values())[:most]


def cut_of(config: PretrainedConfig, shape: Shape) -> Cut:
    """Which sizes a shape cuts."""
    before = spec_for(config).sizes(config)
    if shape.sizes["layers"] == before["layers"]:
        return "width"
    return "layers and neurons" if _neurons_kept(shape, before) < 1 else "depth"


def shape_decision(config: PretrainedConfig, shape: Shape, cut: Cut, measured: Sequence[Candidate] = ()) -> Decision:
    """The sizes of the student.

    Args:
        config: the teacher's config.
        shape: the student.
        cut: what is cut.
        measured: candidates that were compared on text, best first.
    """
    before = spec_for(config).sizes(config)
    changed = [
        f"{FIELD_OF_AXIS[axis]} {before[axis]:,} → {size:,}"
        for axis, size in shape.sizes.items()
        if size < before[axis] and axis in FIELD_OF_AXIS
    ]
    value = ", ".join(changed)
    if measured:
        results = "; ".join(f"{one.name} {with_error(**one.pruned_kl)}" for one in measured if one.pruned_kl)
        reason = f"The lowest KL before retraining, repaired, on your text: {results}."
        return Decision("shape", value, reason, f"{MEASURED_HERE}, now, on your text")
    reasons = {
        "depth": "As many layers as the target holds; width stays.",
        "width": "The residual stream and the MLP become narrower, in proportions as equal as the target allows. The "
        "layers stay, and so do the attention heads, unless together they must be as wide as the residual stream.",
        "layers and neurons": "More neurons than layers go: of five shapes of SmolLM2-135M, with the sequential "
        "repair, 26 of 30 layers and 960 of 1,536 neurons ended best after 131k tokens (KL 0.689; 28 layers and 855 "
        "neurons 0.701, 24 and 1,083 0.734, neurons alone 0.748, 22 and 1,228 0.893; one seed each). At "
        "least three quarters of the layers and half of the neurons stay. Residual stream and heads stay.",
    }
    sources = {
        "depth": f"{MINITRON_PAPER}, depth pruning",
        "width": f"{MINITRON_PAPER}, shape of Llama-3.1-Minitron-4B-Width (table)",
        "layers and neurons": f"{MEASURED_HERE}, {STARTS_FILE}",
    }
    by_text = "" if cut == "depth" else " With your text, --measure compares shapes on it."
    return Decision("shape", value, reasons[cut] + by_text, sources[cut])


def shapes_of_rounds(config: PretrainedConfig, choice: Choice, total: int, wanted: int) -> tuple[Shape, ...]:
    """Students on the way to the last one, in equal ratios: every size between the round before and the last.

    Args:
        config: the teacher's config.
        choice: the shapes that come into question; its first candidate is the student of the last round.
        total: parameters of the teacher.
        wanted: number of rounds.
    """
    steps: list[Shape] = []
    last, sizes = choice.candidates[0], spec_for(config).sizes(config)
    for number in range(1, wanted):
        goal = total * (last.num_parameters / total) ** (number / wanted)
        shapes = choice.shapes
        if choice.cut == "layers and neurons":
            shapes = shapes_with_fewer_layers(config, round(goal))
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
