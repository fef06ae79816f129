"""Every refusal of a recipe that needs no weights, before anything is computed; what `--dry-run` does."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MinitronError, PlanError
from ..families import FIELD_OF_AXIS, spec_for, text_config
from ..files import require_writable
from ..models import count_parameters, empty_model
from ..scoring.importance import estimate_importance
from ..sizes.resolve import resolve_sizes
from ..sizes.shapes import TOLERANCE, Shape, affordable, enumerate_shapes, shapes_near_target
from ..sizes.student import student_config
from .actions import cached_arguments, search_arguments
from .identity import dataset_identity
from .launching import require_launchable
from .run import Run
from .schema import DISTILL_DEFAULTS, Recipe
from .training import lora_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Make every refusal that needs no weights and no data, in seconds; what `--dry-run` prints.

    Returns:
        Sizes and parameter counts of teacher and student; of the shapes among which it is chosen, where the recipe
        has a search or a target.

    Raises:
        MinitronError: naming what is wrong.
    """
    run = Run(recipe)
    config = run.teacher_config
    spec = spec_for(config)
    spec.check(empty_model(config))
    candidates = _shapes_to_compare(recipe, config)
    chosen = _check_sizes(recipe, config) if candidates is None else None
    for which in ("train", "eval", "calibration"):
        dataset_identity(run.dataset_section(which))
    tokenizer = run.tokenizer
    vocab_size = text_config(config).vocab_size
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"The tokenizer of {recipe.teacher.model} has {len(tokenizer)} tokens, the model {vocab_size}. "
            "Use the tokenizer that belongs to the model."
        )
    if tokenizer.eos_token is None:
        raise DataError(
            f"The tokenizer of {recipe.teacher.model} has neither an end-of-text nor a padding token to close and pad "
            "documents with. Set tokenizer.eos_token and save it beside the model."
            if tokenizer.pad_token is None
            else f"The tokenizer of {recipe.teacher.model} has no end-of-text token to close documents with. "
            "Set tokenizer.eos_token and save it beside the model."
        )
    _check_arguments(recipe)
    require_writable(run.folder.parent if not run.folder.exists() else run.folder)
    if chosen is None:
        return {
            "model_type": spec.model_type,
            "num_parameters": {"teacher": count_parameters(config)},
            "candidates": [{"name": one.name, "num_parameters": one.num_parameters} for one in candidates or ()],
            "notes": [],
        }
    before, (student, sizes, notes) = spec.sizes(config), chosen
    return {
        "model_type": spec.model_type,
        "sizes": {axis: {"teacher": before[axis], "student": sizes[axis]} for axis in before},
        "num_parameters": {"teacher": count_parameters(config), "student": count_parameters(student)},
        "num_parameters_without_embeddings": {
            "teacher": count_parameters(config, embeddings=False),
            "student": count_parameters(student, embeddings=False),
        },
        "notes": notes,
    }


def _shapes_to_compare(recipe: Recipe, config: PretrainedConfig) -> list[Shape] | None:
    """The shapes among which the student is chosen, largest first; None where its sizes are given."""
    request = recipe.pruner_config
    if recipe.search is None:
        return None if request.target_parameters is None else shapes_near_target(config, request)
    from ..search.architectures import only_budget, search_architectures

    arguments = search_arguments(recipe)
    own = ("model", "scores", "base", "output_dir", "processing_class", "show_progress")
    data = ("calibration_data", "train_dataset", "eval_data")
    known = {*inspect.signature(search_architectures).parameters} - {*own, *data}
    if unknown := sorted(set(arguments) - known):
        raise DataError(
            f"search: {', '.join(unknown)} is unknown. Expected arguments of search_architectures: "
            f"{', '.join(sorted(known))}."
        )
    budgets = inspect.signature(only_budget).parameters
    [(name, limit)] = only_budget(**{one: arguments[one] for one in budgets if one in arguments}).items()
    shapes = enumerate_shapes(config, arguments["space"], request).shapes
    if name == "max_parameters":
        tolerance = arguments.get("tolerance", TOLERANCE)
        shapes = affordable(shapes, name, limit, tolerance, lambda shape: shape.num_parameters)
    return shapes


def _check_sizes(recipe: Recipe, config: PretrainedConfig) -> tuple[PretrainedConfig, dict[str, int], list[str]]:
    """Config and sizes of the student, and notes, after all rounds; what one of them cannot cut is refused here."""
    if not recipe.rounds:
        spec = spec_for(config)
        sizes, notes = resolve_sizes(spec, config, recipe.pruner_config)
        return student_config(config, recipe.pruner_config), sizes, notes
    notes = []
    for number in range(1, len(recipe.rounds) + 1):
        try:
            spec, request = spec_for(config), recipe.in_round(number).pruner_config
            before, (sizes, own) = spec.sizes(config), resolve_sizes(spec, config, request)
            student = student_config(config, request)
            if sizes == before:
                raise PlanError("nothing is cut: all sizes are those of the model that this round begins with.")
        except MinitronError as error:
            raise type(error)(f"Round {number}: {error}") from error
        counts = [f"{count_parameters(one):,}" for one in (config, student)]
        smaller = {axis: f"{before[axis]:,} → {size:,}" for axis, size in sizes.items() if size < before[axis]}
        cut = ", ".join(f"{FIELD_OF_AXIS[axis]} {both}" for axis, both in smaller.items())
        notes += [f"Round {number}: {' → '.join(counts)} parameters, {cut}."]
        notes += [f"Round {number}: {note}" for note in own]
        config = student
    return student, sizes, notes


def _check_arguments(recipe: Recipe) -> None:
    """Refuse arguments that a stage would only stumble over after the ones before it have worked for hours."""
    from ..distillation.config import DistillationConfig

    rounds = [recipe.in_round(number) for number in range(1, len(recipe.rounds) + 1)] or [recipe]
    known = {name for name in inspect.signature(estimate_importance).parameters if name not in ("model", "data")}
    for number, one in enumerate(rounds, 1):
        where = f"rounds.{number}." if recipe.rounds else ""
        if unknown := sorted(set(one.scores) - known):
            raise DataError(
                f"{where}scores: {', '.join(unknown)} is unknown. Expected arguments of estimate_importance: "
                f"{', '.join(sorted(known))}."
            )
        if unknown := sorted(set(one.distill) - {field.name for field in fields(DistillationConfig)}):
            raise DataError(f"{where}distill: {', '.join(unknown)} is unknown. Expected fields of DistillationConfig.")
        try:
            DistillationConfig(str(Path(recipe.output_dir)), **{**DISTILL_DEFAULTS, **one.distill})
        except MinitronError:
            raise
        except (TypeError, ValueError, ImportError) as error:
            raise DataError(f"{where}distill: {error}") from error
        if recipe.teacher_cache is None:
            continue
        whole, own = ({**DISTILL_DEFAULTS, **each.distill} for each in (recipe, one))
        if other := [name for name in cached_arguments() if own.get(name) != whole.get(name)]:
            raise DataError(
                f"{where}distill: {', '.join(other)} cannot differ between rounds that read one teacher_cache. Set it "
                "for all of them, or leave out teacher_cache."
            )
    lora_config(recipe)
    if recipe.distributed is not None:
        require_launchable(recipe.distributed.config, recipe.distributed.num_processes)
