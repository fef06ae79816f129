"""Renders the model card from the files of a run folder.

`render_model_card` reads nothing but the files of the folder, so the card of a published student can be rendered again
from its repository, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import MismatchError
from ..files import write_text
from ..privacy import public_settings
from . import markdown as md
from .card_tables import _model_title
from .card_values import read_run
from .plots import write_plots
from .readme import END_OF_CARD, keep_foreign_readme, text_below_card
from .report import write_report
from .templating import fill_template


def render_model_card(run_dir: str | os.PathLike[str]) -> str:
    """The model card of a run folder: YAML metadata and Markdown.

    The result depends only on the files in `run_dir` and on this package's template. A section whose file is missing
    is absent or says “not measured”. Text below `END_OF_CARD` in an existing `README.md` is kept.

    Raises:
        OutputError: if the folder holds no student, or one that was neither pruned nor distilled here.
        MismatchError: if one of the files cannot be understood.
    """
    run_dir = Path(run_dir)
    # Markdown needs no escapes: free text only ever stands in fences and escaped cells.
    rendered = fill_template("model_card.md.j2", run_dir, FILTERS, html=False)
    return f"{rendered.rstrip()}\n\n{END_OF_CARD}\n{text_below_card(run_dir / 'README.md') or ''}"


def write_model_card(run_dir: str | os.PathLike[str]) -> Path:
    """Draw the plots whose inputs are in the run folder, and write `report.html` and the card, `README.md`.

    Text below `END_OF_CARD` is kept. A `README.md` without that line is renamed.

    Raises:
        OutputError: if the folder holds no student, or one that was neither pruned nor distilled here; or if it cannot
            be written.
    """
    run_dir = Path(run_dir)
    read_run(run_dir)  # refuses a wrong folder before any plot is drawn
    write_plots(run_dir)
    _redact_recipe(run_dir / "recipe.yaml")
    write_report(run_dir)  # the card links it
    path = run_dir / "README.md"
    content = render_model_card(run_dir)
    keep_foreign_readme(path)
    write_text(path, content)
    return path


def _redact_recipe(path: Path) -> None:
    """Remove private values from a recipe."""
    import yaml

    if not path.is_file():
        return
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise MismatchError(f"{path} is not valid YAML ({error}). Delete it; the next run writes it again.") from error
    public = public_settings(recipe)
    if public != recipe:
        write_text(path, yaml.safe_dump(public, sort_keys=False, allow_unicode=True))


#: Filters of the template.
FILTERS: dict[str, Callable[..., str]] = {
    "count": md.count,
    "short_count": md.short_count,
    "ranges": md.ranges,
    "table": md.table,
    "code": md.code,
    "fence": md.fence,
    "cell": md.cell,
    "json": md.json_text,
    "model_title": _model_title,
    "link": md.teacher_link,
    "address": "<{}>".format,
}
