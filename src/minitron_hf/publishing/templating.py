"""Fills the templates of the model card and the report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MismatchError
from .card_values import card_values, read_run

if TYPE_CHECKING:
    from jinja2 import Environment


def environment_of(filters: Mapping[str, Callable[..., Any]], *, html: bool) -> Environment:
    """The templates of this package.

    Args:
        filters: filters of the templates.
        html: escape every value for HTML.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=html,
    )
    environment.filters.update(filters)
    environment.tests["web_address"] = lambda link: re.fullmatch(r"https?://[^\s<>]+", str(link)) is not None
    return environment


def fill_template(
    name: str, run_dir: str | os.PathLike[str], filters: Mapping[str, Callable[..., Any]], *, html: bool
) -> str:
    """Fill a template with the values of a run folder.

    Args:
        name: file in `templates/`.
        run_dir: the run folder.
        filters: the filters of the template.
        html: escape every value for HTML.

    Raises:
        OutputError: if the folder holds no student, or one that was neither pruned nor distilled here.
        MismatchError: if one of the files cannot be understood.
    """
    import jinja2

    run_dir = Path(run_dir)
    run = read_run(run_dir)
    try:
        return environment_of(filters, html=html).get_template(name).render(card_values(run))
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise MismatchError(
            f"The files in {run_dir} do not have the expected fields ({type(error).__name__}: {error}). They were "
            "written by another version of this package. Run their stages again."
        ) from error
