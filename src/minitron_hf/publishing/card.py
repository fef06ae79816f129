"""Renders the model card from the files of a run folder.

`render_model_card` reads nothing but the files of the folder, so the card of a published student can be rendered again
from its repository, byte for byte.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import MismatchError
from ..files import write_text
from ..privacy import is_outside_folder, public_settings
from . import markdown as md
from .card_tables import _model_title
from .card_values import read_run
from .plots import write_plots
from .report import write_report
from .templating import fill_template

logger = logging.getLogger(__name__)

#: Last line of a card in `README.md`. The text below it is the owner's and is kept.
END_OF_CARD = "<!-- minitron-hf writes everything above this line anew; what you write below it stays. -->"


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
    return f"{rendered.rstrip()}\n\n{END_OF_CARD}\n{_text_below_card(run_dir / 'README.md') or ''}"


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
    _keep_foreign_readme(path)
    write_text(path, content)
    return path


def _text_below_card(path: Path) -> str | None:
    """The text below `END_OF_CARD` in a card; None if there is no card that this package wrote."""
    if not path.is_file() or is_outside_folder(path, path.parent):
        return None
    try:
        _, line, below = path.read_text(encoding="utf-8").partition(END_OF_CARD)
    except UnicodeDecodeError:
        return None
    return below.removeprefix("\n") if line else None


def _keep_foreign_readme(path: Path) -> None:
    """Rename a `README.md` that this package did not write, unless it is the template of PEFT adapters."""
    if not os.path.lexists(path) or _text_below_card(path) is not None:
        return
    text = path.read_bytes() if path.is_file() else b""
    if b"library_name: peft" in text and b"[More Information Needed]" in text:
        return
    names = (f"README.before{f'-{number}' if number > 1 else ''}.md" for number in itertools.count(1))
    free = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    path.rename(free)
    logger.warning(
        "%s was not written by minitron-hf and was renamed to %s. Put text that the card should keep below the card's "
        "last line.",
        path,
        free.name,
    )


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
