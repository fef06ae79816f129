"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import DataError

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads the annotation at run time, on Python 3.10 too)
    typer.Option("--set", metavar="KEY=VALUE", help="Change one entry; the value is YAML. Repeatable."),
]
Accelerate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME|FILE", help="Train in several processes: ddp, fsdp2, zero2, zero3 or a file."),
]
Processes = Annotated[Optional[int], typer.Option(help="How many (default: one for every accelerator).")]  # noqa: UP045
SizeOption = Annotated[Optional[str], typer.Option(metavar="INT|FRACTION", help="Units or fraction to keep.")]  # noqa: UP045


def _distributed(accelerate: str | None, num_processes: int | None) -> list[str]:
    """The options for several processes as entries of a recipe."""
    entries = {"config": accelerate, "num_processes": num_processes}
    return [f"distributed.{key}={value}" for key, value in entries.items() if value is not None]


def _load(name: str, **kwargs: Any) -> tuple[Any, Any]:
    from ..models import load_model, load_tokenizer

    return load_model(name, **kwargs), load_tokenizer(name)


def _texts(data: str, split: str, text_field: str) -> Any:
    """Calibration texts one by one, or rows of tokens."""
    from ..data import load_text_dataset

    rows = load_text_dataset(data, split=split)
    columns = rows.column_names or []
    if not {text_field, "input_ids"} & {*columns}:
        raise DataError(f"{data} has the columns {', '.join(columns)}, and no {text_field!r}. Pass --text-field.")
    return (row[text_field] for row in rows) if text_field in columns else rows


def _corpus(source: str, split: str) -> Any:
    from ..data import load_text_dataset
    from ..distillation.teacher_cache import MANIFEST_NAME, load_teacher_cache

    if (Path(source) / MANIFEST_NAME).is_file():
        return load_teacher_cache(source)
    return load_text_dataset(source, split=split)


def _size(name: str, text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise DataError(f"--{name.replace('_', '-')} {text}: expected an integer or a fraction.") from None


def _sizes(
    hidden_size: str | None,
    intermediate_size: str | None,
    num_attention_heads: str | None,
    num_key_value_heads: str | None,
    num_hidden_layers: str | None,
) -> dict[str, int | float]:
    """The sizes that were given, by their names in `PrunerConfig`."""
    texts = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
    }
    return {name: _size(name, text) for name, text in texts.items() if text is not None}


def _number(name: str, text: str) -> float:
    """A number that may end in k, M, B or T."""
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:], 1)
    try:
        return float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        raise DataError(f"--{name} {text}: expected a number, such as 0.5, 4.5e9 or 4.5B.") from None


def _with_arguments(function: str, call: Any) -> Any:
    """Call with user-given keyword arguments; an unknown one is the user's mistake, not ours."""
    try:
        return call()
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise DataError(f"--set: {function} has no argument {str(error).split()[-1]}.") from error
        raise
