"""Keeps what a user wrote: text below a card in `README.md`, and a `README.md` that this package did not write."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

from ..files import write_text
from ..privacy import is_outside_folder

logger = logging.getLogger(__name__)

#: Last line of a card in `README.md`. The text below it is the owner's and is kept.
END_OF_CARD = "<!-- minitron-hf writes everything above this line anew; what you write below it stays. -->"


def text_below_card(path: Path) -> str | None:
    """The text below `END_OF_CARD` in a card; None if there is no card that this package wrote."""
    if not path.is_file() or is_outside_folder(path, path.parent):
        return None
    try:
        _, line, below = path.read_text(encoding="utf-8").partition(END_OF_CARD)
    except UnicodeDecodeError:
        return None
    return below.removeprefix("\n") if line else None


def remove_card(path: Path) -> None:
    """Remove the card from a `README.md`. What its owner wrote below it stays, and so does a file of others."""
    below = text_below_card(path)
    if below is None:
        return
    if below.strip():
        write_text(path, f"{END_OF_CARD}\n{below}")
    else:
        path.unlink()


def keep_foreign_readme(path: Path) -> None:
    """Rename a `README.md` that this package did not write, unless it is the template of PEFT adapters."""
    if not os.path.lexists(path) or text_below_card(path) is not None:
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
