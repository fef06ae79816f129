"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import DataError, OutputError
from . import wording

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads the annotation at run time, on Python 3.10 too)
    typer.Option("--set", metavar="KEY=VALUE", help="Change one entry; the value is YAML. Repeatable."),
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="cpu, cuda, cuda:1, … (default: an accelerator where there is one)."),
]
Accelerate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME|FILE", help="Train in several processes: ddp, fsdp2, zero2, zero3 or a file."),
]
Processes = Annotated[Optional[int], typer.Option(help="Number of processes (default: one per accelerator).")]  # noqa: UP045
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files that this command writes.")]
Data = Annotated[str, typer.Option(help="Calibration text: file, saved dataset or Hub id.")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
TextField = Annotated[str, typer.Option(help="Column that holds the text.")]
PLAN_HELP = "Folder with the plan (of `plan`, or of a student), or its pruning_plan.json."
Scores = Annotated[Path, typer.Option(help="Folder or file with scores.")]
Target = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NUMBER|FRACTION", help="Parameters to keep, such as 4.5B or 0.5, instead of sizes."),
]
SizeOption = Annotated[Optional[str], typer.Option(metavar="INT|FRACTION", help="Units or fraction to keep.")]  # noqa: UP045


def _load(name: str, *corpora: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A model, and what reads corpora for it."""
    from ..models import load_for_compute

    reader = _reader(name, *corpora)
    return load_for_compute(name, **kwargs), reader


def _reader(name: str, *corpora: Any) -> Any:
    """The processor of a model, if one of the corpora has images; else its tokenizer."""
    from ..data.images import holds_images, require_image_model
    from ..models import load_config, load_processor, load_tokenizer

    if not any(holds_images(one) for one in corpora):
        return load_tokenizer(name)
    require_image_model(load_config(name), f"The model {name}")
    return load_processor(name)


def _require_free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Refuse to replace existing files and files of a run.

    Args:
        folder: the --output of a command.
        names: files that the command writes there.
        overwrite: whether existing files may be replaced.
    """
    from ..recipe.run import STAGES_DIR

    if (folder / STAGES_DIR).is_dir():
        raise DataError(
            f"{folder} is the folder of a run, and this command would replace its files. Choose another --output, or "
            "change the recipe and run it again."
        )
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise OutputError(
                f"{folder / name} exists already. Choose another --output, or replace it with --overwrite."
            )


def _require_prepared(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """As `_require_free`; also refuses folders with other files than those of the commands that prepare a cut.

    Scores, plans and searches may share a folder.
    """
    from ..pruning.candidates import SEARCH_NAME, UNFINISHED_NAME
    from ..pruning.plan import INDICES_NAME, PLAN_NAME
    from ..scoring.scores import SCORES_NAME
    from ..search.record import CANDIDATES_DIR
    from ..sizes.request import PRUNER_CONFIG_NAME

    _require_free(folder, names, overwrite)
    prepared = (SCORES_NAME, PLAN_NAME, INDICES_NAME, PRUNER_CONFIG_NAME, UNFINISHED_NAME, SEARCH_NAME, CANDIDATES_DIR)
    _require_own(folder, prepared)


def _require_own(folder: Path, written: Sequence[str]) -> None:
    """Refuse a folder with files, unless this command wrote some of them and resumes there.

    Args:
        folder: the --output of a command.
        written: patterns of files that the command writes there.
    """
    from ..files import require_empty
    from ..hardware import is_launched

    _require_free(folder, (), overwrite=True)
    if is_launched():  # the process that starts several has checked it; they find each other's files
        return
    if not any(any(folder.glob(pattern)) for pattern in written):
        require_empty(folder)


def _texts(data: str, split: str, text_field: str, option: str = "--data") -> Any:
    """Load calibration data: an iterator of texts, or rows of another format."""
    from ..data.formats import row_format
    from ..data.images import holds_images
    from ..recipe.corpora import with_text_in

    rows = _corpus(data, split, text_field, option, cached=False)
    if holds_images(rows) or row_format(next(iter(rows)), text_field) != "texts":
        return with_text_in(rows, text_field, "text")
    return (row[text_field] for row in rows)


def _corpus(
    source: str,
    split: str,
    text_field: str,
    option: str,
    *,
    cached: bool = True,
    images: str | None = None,
    named_with: str = "--text-field",
) -> Any:
    """Load a corpus or a teacher cache; refuse a corpus whose first rows hold no text.

    Args:
        source: file, saved dataset, Hub id, or folder of a teacher cache.
        split: of the corpus.
        text_field: column that holds a text.
        option: that names the corpus, for messages.
        cached: whether a teacher cache may be given.
        images: corpus with the images of a teacher cache.
        named_with: what names the column.
    """
    from ..data import load_text_dataset
    from ..distillation.teacher_cache import MANIFEST_NAME, load_teacher_cache
    from ..recipe.beginnings import read_rows
    from ..recipe.environment import require_text

    if cached and (Path(source) / MANIFEST_NAME).is_file():
        rows = None if images is None else load_text_dataset(images, split=split)
        return load_teacher_cache(source, rows)
    if images is not None:
        raise DataError(
            f"{option.replace('-data', '-images')} holds the images of a teacher cache, and {option} {source} is "
            "none. Leave it out: a corpus has its own images."
        )
    rows = load_text_dataset(source, split=split)
    require_text(read_rows(rows, min(64, len(rows)), option), source, text_field, option, named_with=named_with)
    return rows


def _size(name: str, text: str) -> int | float:
    try:
        return int(text) if text.isascii() and text.removeprefix("-").isdigit() else _finite(text)
    except ValueError:
        raise DataError(f"--{name.replace('_', '-')} {text}: expected an integer or a fraction.") from None


def _sizes(
    hidden_size: str | None,
    intermediate_size: str | None,
    num_attention_heads: str | None,
    num_key_value_heads: str | None,
    num_hidden_layers: str | None,
    vocab_size: str | None = None,
) -> dict[str, int | float]:
    """The given sizes, by their names in `PrunerConfig`."""
    texts = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
        "vocab_size": vocab_size,
    }
    return {name: _size(name, text) for name, text in texts.items() if text is not None}


def _number(name: str, text: str) -> int | float:
    """A number that may end in k, M, B or T, and in units such as GB where it is one of bytes."""
    from ..recipe.reading import BYTE_BUDGETS, read_number

    return read_number(text, f"--{name.replace('_', '-')} ", is_bytes=name in BYTE_BUDGETS)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _settings(
    entries: Sequence[str] | None, hints: Mapping[str, Any], takes: str, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The entries of --set, checked against the function or class that takes them.

    Args:
        entries: each `name=value`.
        hints: name → annotation, see `recipe.rules.hints_of`.
        takes: description of the names for error messages.
        defaults: entries that are overridden.
    """
    from ..recipe.reading import apply_overrides
    from ..recipe.rules import require_settings, with_new_names

    wording.takes(hints)
    found = with_new_names(apply_overrides(defaults or {}, list(entries or ())), "scores", "--set ")
    require_settings(found, hints, "--set ", takes)
    return found
