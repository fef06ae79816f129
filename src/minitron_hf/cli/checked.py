"""Checks the arguments of every command by their names, before the command runs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import DataError
from ..files import require_creatable
from ..recipe.rules import require_choice, require_value
from .interrupts import exit_interrupted
from .output import Output, printing
from .wording import begin

#: Words that an argument takes, by its name.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "fake_quantization": ("int8", "int4"),
    "goal": ("quality", "latency"),
    "optimizer": ("adamw", "adamw_8bit"),
    "sharding": ("ddp", "fsdp2", "zero2", "zero3"),
}
#: Commands whose --output is a file.
WRITES_A_FILE = ("recommend", "families")


def output_options(
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON document, all else to the standard error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and warnings, no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print messages of all libraries, too.")] = False,
) -> None:
    """Holds the options of all commands, which `output.printing` carries out."""


def _options_of(function: Any) -> list[Any]:
    """The options of a function as Typer makes them, whose own class for them changes between versions."""
    single = typer.Typer(add_completion=False)
    single.command()(function)
    return list(typer.main.get_command(single).params)


class CheckedCommand(TyperCommand):
    """A command whose arguments are checked by their names; `~` is the user's home in all of them.

    Every command has the options of `output_options`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _options_of(output_options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; after a misspelt option, suggest the closest options that `--help` shows."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "possibilities"):  # NoSuchOption, which Typer 0.20 to 0.27 keep in different modules
                shown = [name for one in self.params if not getattr(one, "hidden", False) for name in one.opts]
                error.possibilities = difflib.get_close_matches(getattr(error, "option_name", ""), shown, 1, 0.7)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Check, then run; Ctrl-C exits with 130, SIGTERM with 143."""
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            exit_interrupted()

    def _invoke(self, ctx: Any) -> Any:
        options = {one.name: one for one in self.params if one.name and one.opts[0].startswith("-")}
        flags = {name for name, one in options.items() if getattr(one, "is_flag", False)}
        named = {name: max(one.opts, key=len) for name, one in options.items()}
        begin({**{ENTRIES.get(name, name): option for name, option in named.items()}, **named}, flags)
        to_file = ctx.command.name in WRITES_A_FILE or ctx.params.get("recommend", False)
        for name, value in ctx.params.items():
            ctx.params[name] = _checked(name, value, to_file)
        _refuse_twice(ctx)
        output = Output(**{name: ctx.params.pop(name) for name in ("json", "quiet", "verbose")})
        if output.quiet and output.verbose:
            raise DataError("--quiet and --verbose exclude each other. Leave out one of them.")
        with printing(ctx.command.name, output):
            return super().invoke(ctx)


#: Options → the entry of --set that means the same, where their names differ.
ENTRIES: Mapping[str, str] = {
    "target": "target_parameters",
    "accelerate": "distributed.config",
    "num_processes": "distributed.num_processes",
}


def _refuse_twice(ctx: Any) -> None:
    """Refuse an entry of --set that an option gives as well."""
    sources = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in ctx.params}
    named = {ENTRIES.get(name, name): name for name, source in sources.items() if source == "COMMANDLINE"}
    for entry in ctx.params.get("set_") or ():
        if (option := named.get(entry.partition("=")[0])) is not None:
            raise DataError(
                f"--set {entry} and --{option.replace('_', '-')} exclude each other. Leave out one of them."
            )


def _checked(name: str, value: Any, to_file: bool) -> Any:
    option = f"--{name.rstrip('_').replace('_', '-')}"
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        require_value(value, type(value), option, name)
        return value
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.path.expanduser(os.fspath(value))
    if not text.strip():
        raise DataError(f"{option} {text!r}: expected text. Leave the option out for its default.")
    if name in CHOICES:
        require_choice(text, CHOICES[name], option)
    if name == "output":
        _require_output(Path(text), to_file)
    return Path(text) if isinstance(value, os.PathLike) else text


def _require_output(path: Path, to_file: bool) -> None:
    if not to_file:
        require_creatable(path)
    elif path.is_dir():
        raise DataError(f"--output {path}: a folder, expected the name of a file to write.")
    else:
        require_creatable(path.parent)
