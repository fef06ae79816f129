"""A recipe at work: check it, run its stages, skip what is done for the same inputs, refuse what differs, resume."""

from __future__ import annotations

import contextlib
import gc
import inspect
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MinitronError, MismatchError, OutputError, PlanError
from ..families import FIELD_OF_AXIS, spec_for, text_config
from ..files import digest, is_storage_error, read_json, require_writable, versions, write_json, write_text
from ..models import count_parameters, empty_model
from ..scoring.importance import estimate_importance
from ..sizes.resolve import resolve_sizes
from ..sizes.shapes import TOLERANCE, Shape, affordable, enumerate_shapes, shapes_near_target
from ..sizes.student import student_config
from .actions import cached_arguments, search_arguments
from .identity import dataset_identity
from .launching import require_launchable
from .run import RECIPE_NAME, STAGES_DIR, UNFINISHED_DIR, Run
from .schema import DISTILL_DEFAULTS, ROUNDS_DIR, Recipe
from .stages import Stage, stages_of
from .training import lora_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def stage_digests(recipe: Recipe) -> dict[str, str]:
    """Digest of everything each stage depends on: its settings, its external inputs, and the stages before it."""
    digests: dict[str, str] = {}
    for stage in stages_of(recipe):
        if stage.wanted(recipe):
            above = [digests.get(name) for name in stage.inputs]
            digests[stage.name] = digest(stage.name, stage.settings(recipe), above)
    return digests


def run_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    redo: bool = False,
    show_progress: bool = True,
    report: Callable[[str], None] = print,
    report_shapes: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Run the stages of a recipe, skipping those that are done for the same inputs.

    Args:
        recipe: what to do.
        until: last stage to run; None: all of them.
        redo: do stages again whose recorded inputs differ, instead of refusing.
        show_progress: show progress bars.
        report: receives one line per stage.
        report_shapes: receives what `check_recipe` found, before the first stage.

    Returns:
        The run folder.

    Raises:
        OutputError: if the folder holds something else, or a stage made from other inputs (without `redo`).
        MinitronError: whatever a stage refuses.
    """
    names = [stage.name for stage in stages_of(recipe)]
    if until is not None and until not in names:
        raise DataError(f"There is no stage {until!r}. Expected one of {', '.join(names)}.")
    shapes = check_recipe(recipe)
    if report_shapes is not None:
        report_shapes(shapes)
    run = Run(recipe, show_progress=show_progress)
    digests = stage_digests(recipe)
    _claim_folder(run.folder)
    wanted = [stage for stage in stages_of(recipe) if stage.name in digests]
    for stage in wanted:  # every refusal before the first computation
        if not redo:
            _require_same_inputs(run.folder, stage, recipe, digests[stage.name])
        if stage.name == until:
            break
    _drop_rounds(run.folder, recipe, redo)
    write_text(run.folder / RECIPE_NAME, recipe.to_yaml())
    for stage in wanted:
        record = _record(run.folder, stage.name)
        done = record is not None and record["status"] == "done" and record["digest"] == digests[stage.name]
        if done and all((run.folder / output).exists() for output in stage.outputs):
            report(f"[{stage.name}] done before, skipped")
        else:
            if record is not None and record["digest"] != digests[stage.name]:
                _clear(run.folder, stage)
            report(f"[{stage.name}] {stage.help}")
            _write_record(run.folder, stage, recipe, digests[stage.name], "running", None)
            start = time.monotonic()
            with _clear_errors():
                stage.run(run)
            _write_record(run.folder, stage, recipe, digests[stage.name], "done", time.monotonic() - start)
            gc.collect()
        if stage.name == until:
            break
    return run.folder


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


def _claim_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STAGES_DIR).is_dir():
        raise OutputError(
            f"The output folder {folder} already holds files that are not a run of minitron-hf. "
            "Choose another output_dir, or empty it."
        )
    require_writable(folder)
    (folder / STAGES_DIR).mkdir(exist_ok=True)


def _drop_rounds(folder: Path, recipe: Recipe, redo: bool) -> None:
    """Rounds of an earlier run that this one does not have would be published as its own."""
    ours = {str(number) for number in range(1, len(recipe.rounds))}
    for path in [*folder.glob(f"{ROUNDS_DIR}/*"), *(path for path in folder.glob(f"{STAGES_DIR}/*") if path.is_dir())]:
        if path.name in ours:
            continue
        if not redo:
            raise MismatchError(
                f"The output folder {folder} holds another run: this recipe has no round {path.name} before its last. "
                "Choose another output_dir, or pass --redo to remove it."
            )
        shutil.rmtree(path)


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / STAGES_DIR / f"{name}.json"
    return read_json(path) if path.is_file() else None


def _write_record(
    folder: Path, stage: Stage, recipe: Recipe, stage_digest: str, status: str, seconds: float | None
) -> None:
    path = folder / STAGES_DIR / f"{stage.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(
        path,
        {
            "stage": stage.name,
            "status": status,
            "digest": stage_digest,
            "seconds": None if seconds is None else round(seconds, 2),
            "settings": stage.settings(recipe),
            "versions": versions(),
        },
    )


def _require_same_inputs(folder: Path, stage: Stage, recipe: Recipe, stage_digest: str) -> None:
    record = _record(folder, stage.name)
    if record is None or record["digest"] == stage_digest:
        return
    old, new = _flatten(record["settings"]), _flatten(stage.settings(recipe))
    changed = [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    what = "; ".join(changed[:5]) or f"an earlier stage ({', '.join(stage.inputs)})"
    raise MismatchError(
        f"The output folder {folder} holds another run: its stage '{stage.name}' was made from other inputs ({what}). "
        "Choose another output_dir, or pass --redo to do this stage and those after it again."
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _clear(folder: Path, stage: Stage) -> None:
    """Remove what an earlier run of a stage left, so that nothing stale is resumed or published."""
    stale = [folder / output for output in stage.outputs]
    if stage.name.endswith("distill"):
        own = (folder / stage.outputs[0]).parent  # of its round
        stale += [*own.glob("checkpoint-*"), *own.glob("model*.safetensors*"), own / UNFINISHED_DIR]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what the file system says into one clear message; leave everything else alone."""
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise OutputError(
            f"A file could not be read or written: {error}. If the disk is full, free space; the same command then "
            "resumes the run."
        ) from error
