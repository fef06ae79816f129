"""Progress bars: those of other libraries switched off, or one at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from .compat import open_bars


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Hide the progress bars of Transformers, `datasets` and `huggingface_hub`, and restore them afterwards.

    Args:
        show: leave them as they are.
    """
    if show:
        yield
        return
    import datasets
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    were_shown = (
        logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled() is False,
        hub.are_progress_bars_disabled() is False,
    )
    switches = (
        (logging.disable_progress_bar, logging.enable_progress_bar),
        (datasets.disable_progress_bars, datasets.enable_progress_bars),
        (hub.disable_progress_bars, hub.enable_progress_bars),
    )
    for hide, _ in switches:
        hide()
    try:
        yield
    finally:
        # Transformers' switch also moves that of the Hub's client, which comes last.
        for was_shown, (hide, restore) in zip(were_shown, switches, strict=True):
            (restore if was_shown else hide)()


@contextlib.contextmanager
def step(title: str, show: bool = True) -> Iterator[None]:
    """Show what takes a while on the standard error, if that is a terminal, and remove it in the end.

    Args:
        title: what is done.
        show: whether to show it.
    """
    from tqdm.auto import tqdm

    with tqdm(desc=title, bar_format="{desc} …", leave=False, disable=None if show else True):
        yield


@contextlib.contextmanager
def one_progress_bar(show: bool) -> Iterator[None]:
    """Show at most one progress bar at a time, whichever library draws it, and remove it when it is done.

    A bar that begins while another one is shown is hidden: the first one is of the larger task. Bars are for
    terminals: where the standard error is none, there are none.

    Args:
        show: whether to show bars; if not, lines that a trainer writes between them are hidden, too.
    """
    from tqdm.std import tqdm

    own_init, own_write = tqdm.__init__, tqdm.write
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        others = [one for one in open_bars() if one is not self and not getattr(one, "disable", False)]
        if not show or not terminal or others:
            kwargs["disable"] = True
        own_init(self, *args, **{**kwargs, "leave": False})

    tqdm.__init__ = begin
    if not show:
        tqdm.write = classmethod(lambda cls, *args, **kwargs: None)
    try:
        yield
    finally:
        tqdm.__init__, tqdm.write = own_init, own_write
