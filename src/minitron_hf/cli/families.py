"""`minitron-hf families`: lists supported families and drafts new tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import DataError
from .options import Overwrite, _require_free
from .output import given, wrote
from .printing import _print_family, _print_matrix


def families(
    model_type: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="MODEL_TYPE|draft", help="A family to show; or the word draft."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="MODEL", help="With draft: a model type of Transformers, a folder or a Hub id."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the matrix as Markdown.")] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="With draft: the file to write, instead of printing it."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print which sizes can be pruned in which model family, and the reasons for those that cannot.

    `families draft MODEL` writes a first draft of a family's table. It reads shapes only, from models without weights.
    """
    from ..survey.matrix import describe_family, support_matrix, to_markdown

    if model_type != "draft" and (output is not None or model is not None):
        extra = "--output" if output is not None else model
        raise DataError(f"families: {extra} is for `families draft MODEL`. Leave it out, or redirect what is printed.")
    if model_type is not None and markdown:
        raise DataError("families: --markdown prints the matrix of all families. Leave out the model type.")
    if model_type == "draft":
        if model is None:
            raise DataError("families draft: name a model type, a folder or a Hub id.")
        if output is not None:
            _require_free(output.parent, [output.name], overwrite)
        _write_draft(model, output)
    elif model_type is not None:
        for about, spec in describe_family(model_type):
            _print_family(about, spec)
    elif markdown:
        text = to_markdown(support_matrix())
        if not given("markdown", text):
            typer.echo(text)
    else:
        _print_matrix()


def _write_draft(model: str, output: Path | None) -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    from ..files import replacing_file
    from ..models import load_config
    from ..survey.draft import draft_family

    text = draft_family(AutoConfig.for_model(model) if model in CONFIG_MAPPING else load_config(model))
    if output is None:
        if not given("draft", text):
            typer.echo(text, nl=False)
    else:
        with replacing_file(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
        wrote(output)
