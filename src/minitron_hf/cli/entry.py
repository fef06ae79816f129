"""Where a command begins: from here on Ctrl-C ends it with one message, also while modules are imported.

It imports nothing that takes time.
"""

from __future__ import annotations

from .interrupts import exit_interrupted, note_interrupts, was_interrupted


def main() -> None:
    """Entry point of `minitron-hf`, `python -m minitron_hf` and `python -m minitron_hf.cli`."""
    note_interrupts()
    try:
        from .app import main as run
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) or was_interrupted():
            exit_interrupted()
        raise
    run()
