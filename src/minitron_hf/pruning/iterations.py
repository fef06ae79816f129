"""Importance estimated again after every partial cut (Muralidharan et al. 2024, arXiv 2407.14679, §2.2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..data import DataSource, tokenize_once
from ..errors import ArgumentError, PlanError, checks_kinds, did_you_mean
from ..families import FIELD_OF_AXIS, ArchSpec, spec_for
from ..scoring.importance import estimate_importance
from ..scoring.metrics import require_one_metric
from ..scoring.scores import ImportanceScores
from ..sizes.request import PrunerConfig
from ..sizes.resolve import resolve_sizes, scoring_arguments
from ..sizes.student import resolve_fractions
from .plan import PruningPlan
from .planning import make_plan
from .surgery import apply_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Arguments of `estimate_importance` that say which rows of the data are read, and how.
CALIBRATION_ARGUMENTS = ("num_rows", "max_length", "packing", "batch_size")


def require_known_arguments(given: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse arguments that neither a function nor `estimate_importance`, to which it passes the others on, knows.

    Raises:
        ArgumentError: naming the closest argument.
    """
    known = [name for one in (function, estimate_importance) for name in inspect.signature(one).parameters]
    if unknown := [name for name in given if name not in known]:
        raise ArgumentError(f"{function.__name__} has no argument {', '.join(unknown)}.{did_you_mean(unknown, known)}")


@checks_kinds
def iterate_importance(
    model: PreTrainedModel,
    config: PrunerConfig,
    data: DataSource | None = None,
    *,
    iterations: int = 1,
    **importance_kwargs: Any,
) -> ImportanceScores:
    """Score and prune in several rounds: after round i of T, i/T of the whole cut is done.

    Muralidharan et al. 2024 (§2.2) report a loss of 5.43, 5.55 and 5.24 for T = 1, 2 and 4 before retraining, and of
    1.92 for each T after retraining.

    Args:
        model: the teacher; not changed.
        config: the student's sizes. The sizes of the rounds before the last are rounded like fractions, and
            their students may have other stock classes that hold the same model.
        data: see `estimate_importance`; tokenised once for all rounds.
        iterations: T; 1 is `estimate_importance`.
        **importance_kwargs: passed on to `estimate_importance`. Which layers a `depth_metric` measures follows from
            `config`.

    Returns:
        The scores of the last round for the teacher's units, for `make_plan` with the same `config`. Units that were
        pruned in earlier rounds get NaN. A block that lacks layers that were dropped in earlier rounds has ∞, and the
        block of exactly those -∞.

    Raises:
        PlanError: if the request does not allow several rounds.
    """
    require_iterations(config, iterations)
    require_one_metric(importance_kwargs.get("metric"))
    data = tokenize_once(data, importance_kwargs.get("processing_class"))
    if config.targets:
        once = estimate_importance(model, data, **scoring_arguments(model.config, config, importance_kwargs))
        assert isinstance(once, ImportanceScores)
        return once
    spec = spec_for(model.config)
    student, plan, first = model, None, None
    for number in range(1, iterations + 1):
        request = config if number == iterations else _request_of_round(model, config, number, iterations)
        own = estimate_importance(
            student, data, **_arguments_of_round(model, student, config, request, iterations, importance_kwargs)
        )
        assert isinstance(own, ImportanceScores)
        if plan is None or first is None:
            first = scores = own
        else:
            scores = _scores_in_teacher(own, plan, first, spec, iterations)
        if number < iterations:
            plan = make_plan(model, request, scores)
            student = apply_plan(model, plan)
    return scores


def _request_of_round(model: PreTrainedModel, config: PrunerConfig, number: int, iterations: int) -> PrunerConfig:
    """The sizes after a round before the last: that part of every cut is done.

    Raises:
        PlanError: if no stock classes hold them.
    """
    spec = spec_for(model.config)
    before, (after, _) = spec.sizes(model.config), resolve_sizes(spec, model.config, config)
    part: dict[str, Any] = {
        FIELD_OF_AXIS[axis]: (before[axis] - number * (before[axis] - after[axis]) / iterations) / before[axis]
        for axis in after
        if axis in FIELD_OF_AXIS and after[axis] < before[axis]
    }
    try:
        request = resolve_fractions(model.config, replace(config, repair=None, vocab_size=None, **part))
        # Fractions are rounded, but no round may drop units that stay in the end.
        least = {FIELD_OF_AXIS[axis]: size for axis, size in after.items() if axis in FIELD_OF_AXIS}
        below: dict[str, Any] = {name: size for name, size in least.items() if (getattr(request, name) or size) < size}
        return resolve_fractions(model.config, replace(request, **below)) if below else request
    except PlanError as error:
        raise PlanError(
            f"iterations={iterations}: the student of round {number} has no stock classes. {error} "
            "Give other sizes to end with, or another number of rounds."
        ) from error


def _arguments_of_round(
    model: PreTrainedModel,
    student: PreTrainedModel,
    config: PrunerConfig,
    request: PrunerConfig,
    iterations: int,
    importance_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of `estimate_importance` for the student of the round before, which is cut to `request`."""
    left = resolve_sizes(spec_for(model.config), model.config, request)[0]["layers"]
    depth = PrunerConfig(
        num_hidden_layers=left,
        contiguous=config.contiguous,
        keep_first_layers=config.keep_first_layers,
        keep_last_layers=config.keep_last_layers,
        hidden_basis=config.hidden_basis,
    )
    arguments = scoring_arguments(student.config, depth, importance_kwargs)
    if iterations > 1 and arguments.get("one_by_one"):
        raise PlanError(
            "contiguous=False with a depth_metric removes layers one after another already. Leave out iterations."
        )
    return arguments


def require_iterations(config: PrunerConfig, iterations: int) -> None:
    """Refuse rounds of scoring that cannot be followed for a request.

    Raises:
        PlanError: naming what stands in the way.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise PlanError(f"iterations={iterations!r}: expected a number of rounds.")
    if iterations > 1 and (config.nonuniform_sizes or config.layers_to_drop is not None):
        raise PlanError(
            f"iterations={iterations} cannot be combined with nonuniform_sizes or layers_to_drop: the cut of each "
            "round follows from sizes. Leave them out, or score once."
        )
    if iterations > 1 and config.hidden_basis:
        raise PlanError(
            f"iterations={iterations} cannot be combined with hidden_basis: the axes of one round are no channels of "
            "the next. Leave one of them out."
        )
    if iterations > 1 and config.head_add_back:
        raise PlanError(
            f"iterations={iterations} cannot be combined with head_add_back: it needs the order of all heads in one "
            "round of scoring. Leave it out, or score once."
        )
    if config.targets and iterations > 1:
        raise PlanError(
            f"iterations={iterations} cannot be combined with {next(iter(config.targets))}: what goes in each round "
            "follows from sizes. Give sizes, or score once."
        )


def _scores_in_teacher(
    own: ImportanceScores, plan: PruningPlan, first: ImportanceScores, spec: ArchSpec, iterations: int
) -> ImportanceScores:
    """Scores of a student as scores of its teacher: NaN for units that are gone, so that they come last."""
    axes: dict[str, torch.Tensor] = {}
    for axis, values in own.axes.items():
        table = axes[axis] = torch.full_like(first.axes[axis], torch.nan)
        within = spec.axis[axis].within
        if not spec.axis[axis].per_layer:
            table[torch.from_numpy(plan.kept[axis]) if axis in plan.kept else slice(None)] = values
            continue
        for new, old in enumerate(plan.layers_kept):
            kept = plan.kept_in(old)
            units = torch.from_numpy(kept[axis]) if axis in kept else torch.arange(table.shape[-1])
            if within is None:
                table[old, units] = values[new, : len(units)]
                continue
            outer = kept[within].tolist() if within in kept else range(table.shape[1])
            for row, unit in enumerate(outer):
                chosen = units if units.ndim == 1 else units[row]
                table[old, unit, chosen] = values[new, row, : len(chosen)]
    blocks = torch.full_like(first.blocks, torch.nan)
    kept_layers = list(plan.layers_kept)
    for start in range(len(blocks)):
        for end in range(start, len(blocks)):
            inside = [new for new, old in enumerate(kept_layers) if start <= old <= end]
            if not set(plan.layers_dropped) <= set(range(start, end + 1)):
                blocks[start, end] = torch.inf
            else:  # a block without other layers than those that are gone costs nothing more
                blocks[start, end] = own.blocks[inside[0], inside[-1]] if inside else -torch.inf
    if not plan.pruner_config["contiguous"]:
        # Single layers: those that are gone already go first.
        for layer in range(len(blocks)):
            position = kept_layers.index(layer) if layer in kept_layers else None
            blocks[layer, layer] = -torch.inf if position is None else own.blocks[position, position]
    settings = {**own.settings, "model": first.settings["model"], "iterations": iterations}
    digests = {**own.digests, "model": first.digests["model"], "architecture": first.digests["architecture"]}
    return replace(own, axes=axes, blocks=blocks, settings=settings, digests=digests)
