"""Writes the reference pages that come from the code: `recipe.md`, `configs.md` and `cli.md` in `reference/`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import click
from typer.main import get_command

from minitron_hf import DistillationConfig, PrunerConfig
from minitron_hf.cli.app import app
from minitron_hf.recipe import schema
from minitron_hf.recipe.reading import BUDGETS, BYTE_BUDGETS


def write_generated(folder: Path) -> None:
    """Write the pages into `folder`."""
    (folder / "recipe.md").write_text(recipe_reference(), encoding="utf-8")
    (folder / "configs.md").write_text(configs_reference(), encoding="utf-8")
    (folder / "cli.md").write_text(cli_reference(), encoding="utf-8")


def recipe_reference() -> str:
    """One table per section of a recipe, from the dataclasses and their docstrings."""
    sections = [schema.Recipe]
    parts = []
    for section in sections:
        described = _attributes(section)
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(section):
            hint = get_type_hints(section)[field.name]
            sections += [inner for inner in _sections_in(hint) if inner not in sections]
            rows.append(f"| `{field.name}` | {_type(hint)} | {_default(field)} | {described.get(field.name, '')} |")
        name = section.__name__
        about = _first_paragraph(section)
        parts.append(f"({name.lower()})=\n## {name}\n\n{about}\n\n" + "\n".join(rows) + "\n")
    budgets = ", ".join(f"`{name}`" for name in BUDGETS)
    about = (
        "This page lists every key of a recipe for users of `minitron-hf run`. A recipe is a YAML file. Budgets may "
        f"end in `k`, `M`, `B` or `T`, in lower or upper case: {budgets}. "
        f"Those of bytes may also end in `KB`, `MB`, `GB` or `TB`: {', '.join(f'`{name}`' for name in BYTE_BUDGETS)}."
    )
    return f"# The keys of a recipe\n\n{about}\n\n" + "\n".join(parts)


def configs_reference() -> str:
    """One table each for the fields of `PrunerConfig` and those that `DistillationConfig` adds or changes."""
    about = (
        "This page lists the fields of `PrunerConfig` and `DistillationConfig` for users of Python. In a recipe they "
        "stand under `prune` and `distill`; `minitron-hf plan --set` and `minitron-hf distill --set` take them, too."
    )
    inherited = (
        "`DistillationConfig` has all fields of "
        "[`trl.SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig). It adds those below, or "
        "changes their defaults. Recipes have some other defaults (`minitron_hf.recipe.schema.DISTILL_DEFAULTS`)."
    )
    own = [
        one
        for one in dataclasses.fields(DistillationConfig)
        if one.name in vars(DistillationConfig)["__annotations__"]
    ]
    sizes = "A size is an `int` (units to keep), a `float` in (0, 1] (fraction of the teacher's), or None (unchanged)."
    helps = {one.name: _cell(one.metadata["help"]) for one in own}
    return (
        f"# The fields of PrunerConfig and DistillationConfig\n\n{about}\n\n## PrunerConfig\n\n{sizes}\n\n"
        + _field_table(dataclasses.fields(PrunerConfig), _attributes(PrunerConfig))
        + f"\n## DistillationConfig\n\n{inherited}\n\n"
        + _field_table(own, helps)
    )


def _field_table(fields: Iterable[dataclasses.Field[Any]], described: Mapping[str, str]) -> str:
    rows = ["| field | default | meaning |", "|---|---|---|"]
    rows += [f"| `{one.name}` | {_default(one)} | {described[one.name]} |" for one in fields]
    return "\n".join(rows) + "\n"


def cli_reference() -> str:
    """One section per command: its help, arguments and options."""
    command: Any = get_command(app)
    about = "This page lists every command and its options. `minitron-hf COMMAND --help` prints the same."
    parts = [f"# The command line\n\n{about}\n"]
    for name, one in command.commands.items():
        if one.hidden:
            continue
        context = click.Context(one, info_name=f"minitron-hf {name}")
        usage = " ".join(one.collect_usage_pieces(context))
        parts.append(
            f"## minitron-hf {name}\n\n{_plain(one.help or '')}\n\n```text\nminitron-hf {name} {usage}\n```\n"
        )
        rows = ["| option | meaning |", "|---|---|"]
        for parameter in one.params:
            record = parameter.get_help_record(context)
            if record is None:  # hidden
                continue
            rows.append(f"| `{_cell(record[0])}` | {_cell(record[1])} |")
        if len(rows) > 2:
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _attributes(section: type) -> dict[str, str]:
    """The entries of a docstring's `Attributes:` block, one line each."""
    _, _, block = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name, found[entry[1]] = entry[1], entry[2]
        elif name:
            found[name] += " " + line.strip()
    return {name: _cell(text) for name, text in found.items()}


def _first_paragraph(section: type) -> str:
    return inspect.cleandoc(section.__doc__ or "").split("\n\nAttributes:")[0]


def _sections_in(hint: Any) -> list[type]:
    inner = getattr(hint, "__args__", ())
    return [one for one in (hint, *inner) if dataclasses.is_dataclass(one) and isinstance(one, type)]


def _type(hint: Any) -> str:
    if sections := _sections_in(hint):
        links = " or ".join(f"[{one.__name__}](#{one.__name__.lower()})" for one in sections)
        inner = (hint, *getattr(hint, "__args__", ()))
        lists = [one for one in inner if getattr(one, "__origin__", None) is list]
        return f"{links} or a list of them" if lists and hint not in lists else f"list of {links}" if lists else links
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
    return f"`{_cell(text.replace('typing.', ''))}`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "" if dataclasses.is_dataclass(made) else f"`{made!r}`"
    return "required"


def _plain(text: str) -> str:
    return inspect.cleandoc(text).replace("\f", "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write_generated(Path(__file__).parent / "reference")
