"""Renders the report of a run: one HTML file with tables, figures and samples, which opens without a network."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from . import markdown as md
from .card_tables import _model_title, headline
from .card_values import REPORT_NAME
from .templating import fill_template


def render_report(run_dir: str | os.PathLike[str]) -> str:
    """The report of a run folder as one HTML page.

    The result depends only on the files in `run_dir` and on this package's template. Figures are those of `plots/`,
    inside the page. The page loads nothing: its content security policy forbids every request.

    Raises:
        OutputError: if the folder holds no student, or one that was neither pruned nor distilled here.
        MismatchError: if one of the files cannot be understood.
    """
    plots = Path(run_dir) / "plots"
    filters = {**FILTERS, "picture": lambda name: _data_uri(plots / name)}
    return fill_template("report.html.j2", run_dir, filters, html=True)


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Render the report of a run folder into `report.html`.

    Raises:
        OutputError: if the folder holds no student, or one that was neither pruned nor distilled here; or if it cannot
            be written.
        MismatchError: if one of the files cannot be understood.
    """
    path = Path(run_dir) / REPORT_NAME
    write_text(path, render_report(run_dir))
    return path


def _data_uri(path: Path) -> str:
    """A picture as the address of an `img`."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _code(text: Any) -> Any:
    from markupsafe import Markup

    return Markup("<code>{}</code>").format(_cell(text))


def _cell(text: Any) -> str:
    return re.sub(r"\s+", " ", str(text)).strip()


def _table_cell(text: Any) -> Any:
    """A cell of a table of the card: Markdown's code and bold text become elements."""
    from markupsafe import Markup

    text = str(text)
    for pattern, element in ((r"(`+) ?(.+?) ?\1", "<code>{}</code>"), (r"(\*\*)(.+)\*\*", "<strong>{}</strong>")):
        if found := re.fullmatch(pattern, text):
            return Markup(element).format(found[2])
    return text


def _address(link: str) -> Any:
    from markupsafe import Markup

    return Markup('<a href="{0}">{0}</a>').format(link)


def _teacher_link(teacher: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    if teacher["hub_id"]:
        return Markup('<a href="https://huggingface.co/{0}">{0}</a>').format(teacher["hub_id"])
    return _code(teacher["label"]) if teacher["label"] else "a teacher"


#: Filters of the template. What they return is escaped, unless it is markup.
FILTERS: dict[str, Callable[..., Any]] = {
    "count": md.count,
    "short_count": md.short_count,
    "ranges": md.ranges,
    "json": md.json_text,
    "code": _code,
    "cell": _cell,
    "table_cell": _table_cell,
    "link": _teacher_link,
    "address": _address,
    "model_title": _model_title,
    "headline": headline,
}
