"""Runs the stages of a recipe: skips finished ones, refuses changed inputs, resumes."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import MinitronError, MismatchError, OutputError
from ..files import digest, is_storage_error, read_json, require_writable, versions, write_json, write_text
from ..privacy import recorded_settings
from .checking import check_recipe
from .run import PRIVATE_RECIPE_NAME, RECIPE_NAME, STAGES_DIR, UNFINISHED_DIR, Run
from .schema import ROUNDS_DIR, Recipe
from .stages import Stage, stages_of


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
    shapes = check_recipe(recipe, until=until)
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
    write_text(run.folder / PRIVATE_RECIPE_NAME, recipe.to_yaml(), private=True)
    write_text(run.folder / RECIPE_NAME, recipe.to_public_yaml())
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
            "settings": recorded_settings(stage.settings(recipe)),
            "versions": versions(),
        },
    )


def _require_same_inputs(folder: Path, stage: Stage, recipe: Recipe, stage_digest: str) -> None:
    record = _record(folder, stage.name)
    if record is None or record["digest"] == stage_digest:
        return
    old, new = _flatten(record["settings"]), _flatten(recorded_settings(stage.settings(recipe)))
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
