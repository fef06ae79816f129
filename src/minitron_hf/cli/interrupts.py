"""What an interrupt leaves to say. It imports nothing that takes time."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import NoReturn

from ..interruption import interrupt, last_signal

#: Commands that go on where they were interrupted.
RESUMING = ("run", "search", "generate", "cache", "distill")
#: Signals that end a command with a message: Ctrl-C, and what schedulers and containers send before they kill.
SIGNALS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
_UNHANDLED = (signal.default_int_handler, signal.SIG_DFL)


def note_interrupts() -> None:
    """Have these signals remembered, unless they are ignored or handled already. Only the main thread gets them."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        # A launcher ends the processes that it started, and they wait for each other otherwise.
        is_launchers = number == signal.SIGTERM and "LOCAL_RANK" in os.environ
        if signal.getsignal(number) in _UNHANDLED and not is_launchers:
            signal.signal(number, interrupt)


def was_interrupted() -> bool:
    """Whether there was an interrupt. An import that it breaks off may fail with another error."""
    return last_signal() is not None


def exit_interrupted() -> NoReturn:
    """Say how to go on, with --json in a document as for every error, and exit with 128 + the signal's number."""
    number = last_signal() or int(signal.SIGINT)
    resumes = any(one in RESUMING for one in sys.argv[1:2]) and "--dry-run" not in sys.argv
    how = "The same command resumes where this one stopped." if resumes else "Run it again."
    text, code = f"{SIGNALS[signal.Signals(number)]}. {how}", 128 + number
    as_json = "--json" in sys.argv
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps({"error": text, "exit_code": code}))
    sys.exit(code)
