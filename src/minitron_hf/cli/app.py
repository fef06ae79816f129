"""The command line. Commands only parse arguments and print; everything heavy is imported when a command runs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from .._version import __version__
from ..errors import MinitronError
from .checked import CheckedCommand
from .distill import distill
from .doctor import doctor
from .evaluate import card, evaluate, publish
from .failures import error_message
from .families import families
from .fit import fit
from .generate import generate
from .interrupts import exit_interrupted, was_interrupted
from .plan import plan
from .prune import prune
from .quantize import quantize
from .recommend import recommend
from .run import accelerate_config, run, stage
from .score import cache, score
from .search import search

app = typer.Typer(
    name="minitron-hf",
    help="Make large causal language models small: score, prune width and depth, distil, measure, publish.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: every error is one message. The exit code is 2, or 1 for an unexpected error."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if was_interrupted() and not isinstance(error, MinitronError):  # as in an import that it has broken off
            exit_interrupted()
        from ..recipe.launching import write_error_message

        if hasattr(error, "format_message"):  # wrong usage, whose class Typer 0.20 to 0.29 keep in different modules
            usage: Any = error
            usage.show()
            text, code = usage.format_message(), usage.exit_code
        else:
            text, code = error_message(error)
            if not write_error_message(text):
                typer.echo(f"minitron-hf: {text}", err=True)
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": text, "exit_code": code}, ensure_ascii=False))
        sys.exit(code)
    if code:  # of typer.Exit
        sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minitron-hf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


#: In the order of the path from a model to a published student, which `--help` shows.
COMMANDS = (
    run,
    recommend,
    score,
    plan,
    fit,
    search,
    prune,
    generate,
    cache,
    distill,
    accelerate_config,
    quantize,
    evaluate,
    card,
    publish,
    families,
    doctor,
)

for command in COMMANDS:
    app.command(cls=CheckedCommand)(command)
app.command(hidden=True)(stage)  # what `run` starts in other processes
