"""Switches the progress bars of other libraries off while a run is to be quiet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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
