"""Runs the stages of a recipe: skips finished ones, refuses changed inputs, resumes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..distillation.deciding import with_recorded_running
from ..errors import MinitronError, MismatchError, OutputError, checks_kinds
from ..files import digest, is_storage_error, is_working_file, remove, require_writable, versions, write_text
from ..formats import (
    read_artefact,
    require_readable,
    require_whole_weights,
    without_new_defaults,
    write_artefact,
)
from ..interruption import raise_if_interrupted
from ..locks import locked_folder
from ..privacy import recorded_settings
from ..progress import progress_bars, step
from ..publishing.markdown import duration
from ..publishing.readme import remove_card
from .checking import check_recipe
from .estimates import Estimate, estimate_recipe
from .identity import FIELDS_OF, hub_commit
from .run import PRIVATE_RECIPE_NAME, RECIPE_NAME, STAGES_DIR, Run
from .schema import ROUNDS_DIR, Recipe
from .stages import CARD, CONTROLS_STAGE, PUBLISH, Stage, stages_of, stages_until
from .usage import Usage, earlier_seconds, measured_usage, read_costs, write_costs, write_estimate

#: The records of the stages in `formats.FORMATS`.
RECORD_KIND = f"{STAGES_DIR}/*.json"


def stage_digests(recipe: Recipe, folder: Path | None = None) -> dict[str, str]:
    """Digest of each stage's settings, external inputs and earlier stages.

    Args:
        recipe: the recipe.
        folder: run folder. A stage that an earlier version has done with the same settings has the digest that this
            version gave it, although there are new settings now, if these have their defaults. So has one whose
            training is only to run otherwise (`with_recorded_running`).
    """
    digests: dict[str, str] = {}
    for stage in stages_of(recipe):
        if not stage.wanted(recipe):
            continue
        above = [digests.get(name) for name in stage.inputs_in(recipe)]
        settings = stage.dependencies(recipe)
        digests[stage.name] = digest(stage.name, settings, above)
        record = None
        with contextlib.suppress(MismatchError):  # a record that cannot be read is refused or redone later
            record = None if folder is None else _record(folder, stage.name)
        if record is not None:
            known = without_new_defaults(settings, record["settings"], FIELDS_OF)
            for same in (known, with_recorded_running(known, record["settings"])):
                if record["digest"] == (earlier := digest(stage.name, same, above)):
                    digests[stage.name] = earlier
    return digests


@checks_kinds
def run_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    redo: bool = False,
    show_progress: bool = True,
    report: Callable[[str], None] = print,
    report_shapes: Callable[[dict[str, Any]], None] | None = None,
    report_estimate: Callable[[Estimate], None] | None = None,
) -> Path:
    """Run the stages of a recipe, and skip stages that are finished for the same inputs.

    Args:
        recipe: the recipe.
        until: last stage to run; None: all of them.
        redo: restart all stages that are not finished for these inputs, and remove the files of stages that the
            recipe no longer has. Otherwise changed inputs are refused, and interrupted stages resume.
        show_progress: show progress bars.
        report: receives one line per stage.
        report_shapes: receives the result of `check_recipe`, after every check and before the first stage.
        report_estimate: receives what the run will cost (`estimate_recipe`), which then goes into `costs.json`; None
            estimates nothing.

    Returns:
        The run folder.

    Raises:
        OutputError: if the folder holds something else.
        MismatchError: without `redo`, if a stage was made from other inputs, or this version cannot read its files.
        MinitronError: errors of the stages.
    """
    with progress_bars(show_progress):
        with step("Checking the recipe", show_progress):
            shapes = check_recipe(recipe, until=until)

        def announce() -> None:
            if report_shapes is not None:
                report_shapes(shapes)
            folder = Path(recipe.output_dir)
            estimated = {one["stage"] for one in (read_costs(folder)["estimate"] or {"stages": []})["stages"]}
            is_known = estimated >= {one.name for one in stages_until(recipe, until)} and _is_recipe_of(folder, recipe)
            if report_estimate is not None and (redo or not is_known):
                with step("Timing this machine, and counting the tokens of the corpora", show_progress):
                    estimate = estimate_recipe(recipe, until=until)
                report_estimate(estimate)
                write_estimate(folder, estimate)

        return _run_stages(Run(recipe, show_progress=show_progress), until, redo, report, announce)


def _run_stages(
    run: Run, until: str | None, redo: bool, report: Callable[[str], None], announce: Callable[[], None]
) -> Path:
    """Check the run folder, announce the run, then run the unfinished stages."""
    recipe = run.recipe
    hub_commit.cache_clear()
    digests = stage_digests(recipe, run.folder)
    _require_own_folder(run.folder)
    wanted = stages_until(recipe, until)
    with locked_folder(require_writable(run.folder)):
        (run.folder / STAGES_DIR).mkdir(exist_ok=True)
        if redo:
            _clear_unfinished(run.folder, wanted, recipe, digests)
            _clear_unwanted(run.folder, recipe)
        else:  # check everything before the first computation
            _require_usable(run.folder, wanted, recipe, digests)
        _drop_rounds(run.folder, recipe, redo)
        announce()
        write_text(run.folder / PRIVATE_RECIPE_NAME, recipe.to_yaml(), private=True)
        write_text(run.folder / RECIPE_NAME, recipe.to_public_yaml())
        for number, stage in enumerate(wanted):
            if _is_done(run.folder, stage, digests[stage.name]):
                report(f"[{stage.name}] done before, skipped")
            else:
                rest = [one.name for one in wanted[number:] if not _is_done(run.folder, one, digests[one.name])]
                _run_stage(run, stage, digests, report, _time_left(run.folder, rest, digests))
    return run.folder


def _is_recipe_of(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder's last run had this recipe, word for word."""
    path = folder / PRIVATE_RECIPE_NAME
    return path.is_file() and path.read_text(encoding="utf-8") == recipe.to_yaml()


def _time_left(folder: Path, stages: list[str], digests: dict[str, str]) -> str:
    """What was estimated of the next stage, and of all that are left, in words; nothing without an estimate.

    Args:
        folder: run folder.
        stages: names of the stages that are left, the next one first.
        digests: digest of each stage.
    """
    estimate = read_costs(folder)["estimate"] or {"stages": []}
    known = {one["stage"]: one["seconds"] for one in estimate["stages"] if one["seconds"] is not None}
    if stages[0] not in known:
        return ""
    record = _record(folder, stages[0])
    if record is not None and record["digest"] == digests[stages[0]]:
        return f" (goes on; about {duration(known[stages[0]])} from its beginning)"
    left = sum(known.get(name, 0.0) for name in stages)
    return f" (about {duration(known[stages[0]])}; {duration(left)} left in all)"


def try_recipe(recipe: Recipe, *, until: str | None = None, redo: bool = False) -> dict[str, Any]:
    """Check everything that `run_recipe` checks before its first stage, without weights; write nothing.

    Args:
        recipe: the recipe.
        until: last stage to run; None: all of them.
        redo: see `run_recipe`.

    Returns:
        What `check_recipe` found.

    Raises:
        MinitronError: errors of the checks.
    """
    shapes = check_recipe(recipe, until=until)
    folder = Run(recipe).folder
    _require_own_folder(folder)
    if (folder / STAGES_DIR).is_dir() and not redo:
        hub_commit.cache_clear()
        _require_usable(folder, stages_until(recipe, until), recipe, stage_digests(recipe, folder))
        _drop_rounds(folder, recipe, redo)
    return shapes


def _run_stage(
    run: Run, stage: Stage, digests: dict[str, str], report: Callable[[str], None], remark: str = ""
) -> None:
    """Run a stage, or resume it; `remark` ends the line that announces it."""
    record, earlier, stage_digest = _record(run.folder, stage.name), 0.0, digests[stage.name]
    if record is None or not _can_go_on(record, stage, run.recipe, digests):
        _clear(run.folder, stage)
    elif record["status"] == "running":
        begun = _record_path(run.folder, stage.name)
        earlier = earlier_seconds(begun, record["seconds"], _resumable(run.folder, stage))
    elif record["digest"] != stage_digest:  # of the controls that are done
        earlier = record["seconds"] or 0.0
    raise_if_interrupted()
    report(f"[{stage.name}] {stage.help}{remark}")
    _write_record(run.folder, stage, run.recipe, stage_digest, "running", Usage(seconds=round(earlier, 2)))
    _write_costs(run)
    with measured_usage(run.folder) as usage, _explain_storage_errors():
        stage.run(run)
    usage.seconds = round((usage.seconds or 0.0) + earlier, 2)
    _write_record(run.folder, stage, run.recipe, stage_digest, "done", usage)
    if stage.name not in (CARD, PUBLISH):  # the card shows what was known when it was written
        _write_costs(run)
    gc.collect()


def _write_costs(run: Run) -> None:
    """Write what the finished stages took."""
    records = [_record(run.folder, one.name) for one in stages_of(run.recipe)]
    write_costs(run.folder, [one for one in records if one is not None and one["status"] == "done"])


def _require_own_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / STAGES_DIR).is_dir():
        if all(is_working_file(path) for path in folder.iterdir()):
            return
        raise OutputError(
            f"The output folder {folder} already holds files that are not a run of minitron-hf. "
            "Choose another output_dir, or empty it."
        )


def _drop_rounds(folder: Path, recipe: Recipe, redo: bool) -> None:
    """Remove rounds of an earlier run, so that they are not published with this run."""
    ours = {str(number) for number in range(1, len(recipe.rounds))}
    for path in [*folder.glob(f"{ROUNDS_DIR}/*"), *(path for path in folder.glob(f"{STAGES_DIR}/*") if path.is_dir())]:
        if path.name in ours:
            continue
        if not redo:
            raise MismatchError(
                f"The output folder {folder} holds another run: this recipe has no round {path.name} before its last. "
                "Choose another output_dir, or pass --redo to remove it."
            )
        remove(path)


def _is_done(folder: Path, stage: Stage, stage_digest: str) -> bool:
    """Whether a stage has finished for the same inputs, and its output files exist."""
    record = _record(folder, stage.name)
    ended = record is not None and record["status"] == "done" and record["digest"] == stage_digest
    return ended and all((folder / output).exists() for output in stage.outputs)


def _clear_unfinished(folder: Path, stages: list[Stage], recipe: Recipe, digests: dict[str, str]) -> None:
    """Remove the files of unfinished and unreadable stages, of those after an unreadable one, and later stale ones.

    Args:
        folder: run folder.
        stages: those that run now.
        recipe: the recipe.
        digests: digest of each stage. Later stages that were done for other inputs are of a student that goes.
    """
    unreadable: set[str] = set()
    for stage in stages:
        try:
            _require_readable(folder, stage)
        except MismatchError:
            unreadable.add(stage.name)
        if not unreadable.isdisjoint(stage.inputs_in(recipe)):
            unreadable.add(stage.name)
        record = None if stage.name in unreadable else _record(folder, stage.name)
        kept = record is not None and _can_go_on(record, stage, recipe, digests)
        if record is None or not kept or not _is_done(folder, stage, record["digest"]):
            _forget(folder, stage)
    for stage in stages_until(recipe)[len(stages) :]:
        with contextlib.suppress(MismatchError):  # of a newer version, which may still use it
            record = _record(folder, stage.name)
            if record is not None and not _can_go_on(record, stage, recipe, digests):
                _forget(folder, stage)


def _forget(folder: Path, stage: Stage) -> None:
    """Remove the files of a stage, and its record."""
    _clear(folder, stage)
    _record_path(folder, stage.name).unlink(missing_ok=True)


def _clear_unwanted(folder: Path, recipe: Recipe) -> None:
    """Remove the files of stages that the recipe no longer has, so that they are not published with this run.

    Files without a record of their stage were made by hand, and stay. So does what the recipe names as an input, such
    as text that the teacher wrote before.
    """
    named = recipe.to_yaml()
    for stage in stages_of(recipe):
        record = _record_path(folder, stage.name)
        if stage.wanted(recipe) or not record.is_file():
            continue
        if not any(f"{folder.name}/{output}" in named for output in stage.outputs):
            _forget(folder, stage)


def _require_usable(folder: Path, stages: list[Stage], recipe: Recipe, digests: dict[str, str]) -> None:
    """Refuse finished stages that this run can neither skip nor replace unasked."""
    for stage in stages:
        try:
            _require_readable(folder, stage)
        except MismatchError as error:
            raise MismatchError(
                f"The stage '{stage.name}' cannot be skipped: {error} In this run, --redo does the stage and those "
                "after it again."
            ) from error
        _require_same_inputs(folder, stage, recipe, digests)


def _require_readable(folder: Path, stage: Stage) -> None:
    """Refuse a finished stage if this version cannot read its files, or if weights are cut."""
    record = _record(folder, stage.name)
    if record is None or record["status"] != "done":
        return
    optional = (path for pattern in stage.leftovers for path in folder.glob(pattern) if path.is_file())
    for path in (*(folder / output for output in stage.outputs), *optional):
        if path.exists():
            require_readable(path)
            require_whole_weights(path)


def _resumable(folder: Path, stage: Stage) -> Iterator[Path]:
    """What an interrupted stage left to go on from."""
    return (path for pattern in stage.resumable for path in folder.glob(pattern))


def _can_go_on(record: dict[str, Any], stage: Stage, recipe: Recipe, digests: dict[str, str]) -> bool:
    """Whether what a stage has done so far is of its inputs. Controls that are done stay when others are added."""
    if record["digest"] == digests[stage.name]:
        return True
    if stage.name != CONTROLS_STAGE or not set(record["settings"].get("controls", ())) < set(recipe.controls):
        return False
    above = [digests.get(name) for name in stage.inputs_in(recipe)]
    return bool(record["digest"] == digest(stage.name, record["settings"], above))


def _record_path(folder: Path, name: str) -> Path:
    return folder / STAGES_DIR / f"{name}.json"


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    path = _record_path(folder, name)
    return read_artefact(path, RECORD_KIND) if path.is_file() else None


def _write_record(folder: Path, stage: Stage, recipe: Recipe, stage_digest: str, status: str, usage: Usage) -> None:
    path = _record_path(folder, stage.name)
    path.parent.mkdir(exist_ok=True)
    before = _record(folder, stage.name)
    if before is not None and before["digest"] == stage_digest:
        settings = before["settings"]  # the digest is of these; those of today may differ in how a training runs
    else:
        settings = recorded_settings(stage.dependencies(recipe))
    write_artefact(
        path,
        {
            "stage": stage.name,
            "status": status,
            "digest": stage_digest,
            **asdict(usage),
            "settings": settings,
            "versions": versions(),
        },
        RECORD_KIND,
    )


def _require_same_inputs(folder: Path, stage: Stage, recipe: Recipe, digests: dict[str, str]) -> None:
    record = _record(folder, stage.name)
    if record is None or _can_go_on(record, stage, recipe, digests):
        return
    is_done = record["status"] == "done"
    if not is_done and next(_resumable(folder, stage), None) is None:
        return  # an unfinished stage with nothing to go on from accepts corrected inputs
    settings = without_new_defaults(stage.dependencies(recipe), record["settings"], FIELDS_OF)
    settings = with_recorded_running(settings, record["settings"])
    old, new = _flatten(record["settings"]), _flatten(recorded_settings(settings))
    changed = [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    what = "; ".join(changed[:5]) or f"an earlier stage ({', '.join(stage.inputs_in(recipe))})"
    if not is_done:
        raise MismatchError(
            f"The stage '{stage.name}' in {folder} was interrupted, and what it has done was made from other inputs "
            f"({what}). Take these changes back to go on from there, or pass --redo to start the stage again."
        )
    raise MismatchError(
        f"The output folder {folder} holds another run: its stage '{stage.name}' was made from other inputs ({what}). "
        "Choose another output_dir, take these changes back, or pass --redo to repeat this stage and the later ones."
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _clear(folder: Path, stage: Stage) -> None:
    """Remove files of an earlier run of a stage, so that they are not resumed or published."""
    for pattern in (*stage.outputs, *stage.leftovers):
        for path in folder.glob(pattern):
            if stage.name == CARD and path.name == "README.md":
                remove_card(path)
            else:
                remove(path)


@contextlib.contextmanager
def _explain_storage_errors() -> Iterator[None]:
    """Turn errors of the file system into one clear message."""
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
