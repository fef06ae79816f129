"""`minitron-hf run`, and the commands that it starts in other processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import DataError
from .options import Accelerate, Processes, Settings
from .output import current, given, tell
from .printing import _print_estimate, _print_results, _print_shapes
from .wording import takes_sections

if TYPE_CHECKING:
    from ..recipe.estimates import Estimate
    from ..recipe.schema import Recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    until: Annotated[Optional[str], typer.Option(help="Last stage to run.")] = None,  # noqa: UP045
    set_: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe without reading weights; print shapes and costs.")
    ] = False,
    redo: Annotated[
        bool, typer.Option("--redo", help="Repeat stages whose inputs have changed or that did not finish.")
    ] = False,
    accelerate: Accelerate = None,
    num_processes: Processes = None,
) -> None:
    """Run a recipe, from scores to the published student.

    The stages: generate, score, search, plan, prune, correct, cache, distill, controls, quantize, evaluate, card,
    publish. Stages that are done for the same inputs are skipped; a killed run resumes. With --accelerate, stages that
    train do so in several processes (`distributed` in the recipe).
    """
    from ..hardware import is_launched
    from ..progress import step
    from ..recipe.estimates import estimate_recipe
    from ..recipe.runner import run_recipe, try_recipe
    from ..recipe.settings import section_names

    takes_sections(section_names)
    if is_launched():
        raise DataError("run starts its processes itself: minitron-hf run RECIPE --accelerate ddp --num-processes 8")
    loaded = _read(recipe, set_ or [], accelerate, num_processes)
    if dry_run:
        with step("Checking the recipe"):
            shapes = try_recipe(loaded, until=until, redo=redo)
        _print_shapes(shapes)
        with step("Timing this machine, and counting the tokens of the corpora"):
            estimate = estimate_recipe(loaded, until=until)
        _print_estimate(estimate)
        return
    folder = run_recipe(
        loaded,
        until=until,
        redo=redo,
        show_progress=current().shows_progress,
        report=tell,
        report_shapes=_print_shapes,
        report_estimate=_tell_estimate,
    )
    _print_results(folder)


def _read(recipe: Path, entries: list[str], accelerate: str | None, num_processes: int | None) -> Recipe:
    """The recipe with the entries of --set, then with the options for several processes."""
    from ..recipe.schema import Recipe

    loaded = Recipe.from_yaml(
        recipe, [*entries, *([] if accelerate is None else [f"distributed.config={accelerate}"])]
    )
    if num_processes is None:
        return loaded
    if loaded.distributed is None:
        raise DataError(
            "--num-processes needs --accelerate NAME, such as ddp, because the recipe does not say how to train in "
            "several processes (distributed)."
        )
    return replace(loaded, distributed=replace(loaded.distributed, num_processes=num_processes))


def _tell_estimate(estimate: Estimate) -> None:
    """Print what a run will cost, unless it is quiet: its results are later ones."""
    if not current().quiet or current().json:
        _print_estimate(estimate)


def accelerate_config(
    name: Annotated[Optional[str], typer.Argument(help="ddp, fsdp2, zero2 or zero3.")] = None,  # noqa: UP045
) -> None:
    """Print the path of a packaged Accelerate configuration, for `accelerate launch --config_file`; or all names."""
    from ..recipe.launching import CONFIG_NAMES
    from ..recipe.launching import accelerate_config as path_of

    found = CONFIG_NAMES if name is None else [path_of(name)]
    if not given("configurations" if name is None else "path", found if name is None else found[0]):
        typer.echo("\n".join(map(str, found)))


def stage(
    name: Annotated[str, typer.Argument()],
    recipe: Annotated[Path, typer.Argument()],
    student: Annotated[Optional[Path], typer.Argument()] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Argument()] = None,  # noqa: UP045
    set_: Settings = None,
    round_: Annotated[Optional[int], typer.Option("--round")] = None,  # noqa: UP045
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
) -> None:
    """Run the stage `correct` or `distill` in several processes; `distill` reads and writes the given folders."""
    from ..progress import progress_bars
    from ..recipe.actions import correct
    from ..recipe.reading import apply_overrides
    from ..recipe.run import Run
    from ..recipe.schema import Recipe
    from ..recipe.training import train

    whole = Run(Recipe.from_yaml(recipe), show_progress=not quiet)
    part = whole if round_ is None else whole.in_round(round_)
    with progress_bars(not quiet):
        if name == "correct":
            correct(part)
        else:
            assert student is not None
            assert output is not None
            train(part, student, output, apply_overrides({}, set_ or []))
