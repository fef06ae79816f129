"""What an interrupt leaves to say. It imports nothing that takes time."""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import NoReturn

#: Commands that go on where they were interrupted.
RESUMING = ("run", "search", "generate", "cache", "distill")
_interrupts: list[int] = []


def note_interrupts() -> None:
    """Have Ctrl-C remembered, unless it is ignored or handled already. Only the main thread gets it."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note_interrupt)


def _note_interrupt(number: int, frame: object) -> NoReturn:
    _interrupts.append(number)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether there was an interrupt. An import that it breaks off may fail with another error."""
    return bool(_interrupts)


def exit_interrupted() -> NoReturn:
    """Say how to go on, with --json in a document as for every error, and exit with 130."""
    resumes = any(one in RESUMING for one in sys.argv[1:2])
    text = f"Interrupted. {'The same command resumes where this one stopped.' if resumes else 'Run it again.'}"
    as_json = "--json" in sys.argv
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps({"error": text, "exit_code": 130}))
    sys.exit(130)
