"""Every refusal of a recipe that needs no weights, before anything is computed; what `--dry-run` does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.context import context_length, short_rows_note
from ..distillation.checks import refuse_frozen_embeddings, refuse_top_k
from ..distillation.fake_quantization import require_fake_quantizable
from ..distillation.intermediate import state_pairs
from ..errors import DataError, MinitronError, PlanError, did_you_mean
from ..families import FIELD_OF_AXIS, VOCABULARY, spec_for, text_config
from ..files import refuse_own_folder
from ..models import count_parameters, empty_model, first_line, stored_dtype
from ..scoring.removal import require_depth
from ..sizes.compared import compared_counts
from ..sizes.counts import parameter_counts
from ..sizes.resolve import scoring_arguments
from ..sizes.shapes import COUNTED, TOLERANCE, Shape, counted_cost, enumerate_shapes, require_budgets
from ..sizes.student import check_sizes, student_config
from ..sizes.targets import shapes_near_target
from ..vocabulary.choice import require_choice
from .actions import search_arguments
from .environment import check_environment
from .identity import dataset_identity, training_identity
from .lineage import corpus_notes, longest_document
from .run import Run
from .schema import Recipe
from .settings import check_settings, require_lengths
from .stages import stages_until
from .training import lora_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..distillation.config import DistillationConfig


def check_recipe(recipe: Recipe, *, until: str | None = None) -> dict[str, Any]:
    """Make every refusal that needs no weights, before anything is computed; what `--dry-run` prints.

    Settings come first, then the sizes, then what this machine and the Hub have to offer: corpora, packages, tasks,
    access, disk space. Nothing is written.

    Args:
        recipe: what is to be run.
        until: last stage to run; what only later ones need is not asked for.

    Returns:
        Sizes and parameter counts of teacher and student; of the shapes among which it is chosen, where the recipe
        has a search or a target. `notes` say what could not be checked.

    Raises:
        MinitronError: naming what is wrong.
    """
    names = [stage.name for stage in stages_until(recipe, until)]
    arguments = check_settings(recipe)
    run = Run(recipe)
    refuse_own_folder(run.folder, teacher=recipe.teacher.model)
    config = run.teacher_config
    spec = spec_for(config)
    spec.check(empty_model(config))
    candidates = _shapes_to_compare(recipe, config)  # one or more, largest first
    chosen = _check_sizes(recipe, config) if candidates is None else None
    students = [config] if chosen is None else chosen[0]
    _check_against_model(recipe, config, students, arguments)
    training_identity(recipe.data)
    for section in (recipe.data.eval, recipe.data.calibration):
        if section is not None:
            dataset_identity(section)
    _check_tokenizer(run.tokenizer, recipe, text_config(config).vocab_size)
    before = spec.sizes(config)
    after: Mapping[str, int] = before if chosen is None else chosen[1]
    after = candidates[0].sizes if candidates else after
    if after[VOCABULARY] < before[VOCABULARY]:
        require_choice(run.tokenizer, after[VOCABULARY], before[VOCABULARY])
    skipped = check_environment(run, {name.rpartition("/")[2] for name in names}, arguments, students)
    notes = [f"Not checked: {one}." for one in skipped]
    if "max_seconds_per_token" in (recipe.search or {}):
        notes.append("Not checked: max_seconds_per_token, which the search measures. It may leave fewer shapes.")
    if "distill" in {name.rpartition("/")[2] for name in names}:
        notes = [*_short_rows(run, arguments), *corpus_notes(run), *notes]
    if chosen is None:
        return {
            "model_type": spec.model_type,
            "num_parameters": {"teacher": count_parameters(config)},
            "candidates": [{"name": one.name, "num_parameters": one.num_parameters} for one in candidates or ()],
            "notes": notes,
        }
    students, sizes, found = chosen
    return {
        "model_type": spec.model_type,
        "sizes": {axis: {"teacher": before[axis], "student": sizes[axis]} for axis in before},
        **compared_counts({"teacher": parameter_counts(config), "student": parameter_counts(students[-1])}),
        "notes": [*found, *notes],
    }


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, vocab_size: int) -> None:
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


def _check_against_model(
    recipe: Recipe,
    teacher: PretrainedConfig,
    students: Sequence[PretrainedConfig],
    arguments: Sequence[DistillationConfig],
) -> None:
    """Refuse settings that do not fit the models: lengths, layers, adapters, numbers of tokens."""
    require_lengths(recipe, context_length(teacher))
    vocab_size = min(text_config(one).vocab_size for one in (teacher, *students))
    if recipe.teacher_cache is not None and (top_k := recipe.teacher_cache.top_k or 0) > vocab_size:
        raise DataError(f"teacher_cache.top_k={top_k}: the vocabulary has {vocab_size} tokens. Lower it.")
    for args in arguments:
        refuse_top_k(args.top_k, vocab_size, where="distill.")
    config, prunes = teacher, recipe.each_round()
    for one, student, args in zip(prunes, students, arguments):
        depths = [text_config(each).num_hidden_layers for each in (student, teacher)]
        layers: Any = args.hidden_layers  # a string was parsed by the arguments
        state_pairs(args.hidden_loss, args.embedding_loss, layers, *depths)
        once = {name: value for name, value in one.scores.items() if name != "iterations"}
        measured = scoring_arguments(config, one.pruner_config, once)
        require_depth(
            spec_for(config).sizes(config)["layers"],
            measured.get("depth_metric"),
            measured.get("block_length"),
            measured.get("one_by_one", False),
        )
        config = student
    adapter = lora_config(recipe)
    if adapter is not None:
        _check_adapter(adapter, empty_model(students[-1]))
    is_split = recipe.distributed is not None and recipe.distributed.config in ("fsdp2", "zero2", "zero3")
    for student, args in zip(students, arguments):
        if method := args.fake_quantization:
            require_fake_quantizable(student, method, has_adapter=adapter is not None, is_split=is_split)
        if args.freeze_embeddings:
            refuse_frozen_embeddings(has_adapter=adapter is not None)


def _short_rows(run: Run, arguments: Sequence[DistillationConfig]) -> list[str]:
    """A warning where distillation reads rows far shorter than the context that the student claims."""
    longest = max((args.max_length for args in arguments if args.max_length is not None), default=None)
    remedy = "Raise distill.max_length"
    if not any(args.packing and args.packing_strategy == "wrapped" for args in arguments):  # documents stay apart
        document = longest_document(run)
        if document is not None and (longest is None or document < longest):
            longest, remedy = document, "Add longer documents"
    note = short_rows_note(longest, context_length(run.teacher_config))
    advice = f"{remedy}, or measure them: evaluate.max_length, with documents of that length."
    return [] if note is None else [f"{note} {advice}"]


def _check_adapter(adapter: Any, model: Any) -> None:
    """Refuse an adapter that PEFT cannot add to the student, or that the loss would ignore."""
    from ..compat import add_adapter
    from ..distillation.adapters import refuse_split_tie
    from ..distillation.checks import refuse_adapter

    refuse_adapter(model, adapter)
    try:
        adapted = add_adapter(model, adapter)
    except (TypeError, ValueError, ImportError, RuntimeError, AttributeError) as error:
        raise DataError(f"lora: {first_line(error)}") from error
    refuse_split_tie(adapted)
    targets = adapted.targeted_module_names
    for name in ("rank_pattern", "alpha_pattern"):
        # As `peft.utils.other.get_pattern_key` of PEFT 0.21 matches them.
        unused = [
            str(key)
            for key in getattr(adapter, name, None) or {}
            if not any(re.match(rf"(.*\.)?({key})$", target) for target in targets)
        ]
        if unused:
            ends = {target.rpartition(".")[2] for target in targets}
            raise DataError(
                f"lora.{name}: no module with an adapter is called {', '.join(unused)}.{did_you_mean(unused, ends)} "
                f"Expected names such as {', '.join(sorted(ends))}."
            )
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if unknown := [name for name in adapter.modules_to_save or () if name.rpartition(".")[2] not in names]:
        raise DataError(
            f"lora.modules_to_save: the student has no {', '.join(unknown)}.{did_you_mean(unknown, names)}"
        )


def _shapes_to_compare(recipe: Recipe, config: PretrainedConfig) -> list[Shape] | None:
    """The candidate shapes of the student, largest first; None if the recipe gives its sizes."""
    request = recipe.pruner_config
    if recipe.search is None:
        return shapes_near_target(config, request) if request.targets else None
    import torch

    from ..search.architectures import search_architectures
    from ..search.budget import MEASURED, given_budgets, memory_cost

    arguments = search_arguments(recipe)
    names = inspect.signature(given_budgets).parameters
    budgets = given_budgets(**{name: arguments[name] for name in names if name in arguments})
    known = {name: limit for name, limit in budgets.items() if name != MEASURED}
    shapes = enumerate_shapes(config, arguments["space"], request).shapes
    if not known:
        return shapes
    given = inspect.signature(search_architectures).parameters
    cache = {name: arguments.get(name, given[name].default) for name in ("context_length", "batch_size")}
    bytes_of = memory_cost(config, dtype=stored_dtype(config) or torch.float32, **cache)

    def cost(name: str, shape: Shape) -> float:
        return counted_cost(name, shape) if name in COUNTED else bytes_of(shape)

    # Where time is limited, too, a shape may use that budget, and stay far below the others.
    tolerance = arguments.get("tolerance", TOLERANCE) if known == budgets else 1.0
    return require_budgets(shapes, known, tolerance, cost)


def _check_sizes(recipe: Recipe, config: PretrainedConfig) -> tuple[list[PretrainedConfig], dict[str, int], list[str]]:
    """Check the sizes of every round; return the students' configs, the last one's sizes, and notes."""
    if not recipe.rounds:
        sizes, notes = check_sizes(config, recipe.pruner_config)
        return [student_config(config, recipe.pruner_config)], sizes, notes
    notes, students = [], []
    for number in range(1, len(recipe.rounds) + 1):
        try:
            request = recipe.in_round(number).pruner_config
            before, (sizes, own) = spec_for(config).sizes(config), check_sizes(config, request)
            student = student_config(config, request)
            if sizes == before:
                raise PlanError("nothing is cut: all sizes are those of the model that this round begins with.")
        except MinitronError as error:
            raise type(error)(f"Round {number}: {error}") from error
        counts = [f"{count_parameters(one):,}" for one in (config, student)]
        smaller = {axis: f"{before[axis]:,} → {size:,}" for axis, size in sizes.items() if size < before[axis]}
        fields = {**FIELD_OF_AXIS, VOCABULARY: "vocab_size"}
        cut = ", ".join(f"{fields[axis]} {both}" for axis, both in smaller.items())
        notes += [f"Round {number}: {' → '.join(counts)} parameters, {cut}."]
        notes += [f"Round {number}: {note}" for note in own]
        config = student
        students.append(student)
    return students, sizes, notes
