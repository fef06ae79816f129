"""Stops a run at a signal or a deadline, where it can go on later."""

from __future__ import annotations

import contextlib
import datetime
import signal
import time
from collections.abc import Iterator
from typing import Any


class Stopped(Exception):
    """The run was asked to stop; the same command goes on."""


class Stop:
    """Whether the run should stop. While `deferred`, it is only noted; otherwise `Stopped` is raised at once."""

    def __init__(self) -> None:
        self._wanted = False
        self._deferred = False

    @property
    def wanted(self) -> bool:
        """Whether to stop at the next safe point."""
        return self._wanted

    def check(self) -> None:
        """Raise `Stopped` if the run should stop."""
        if self.wanted:
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Do not interrupt the body at a signal; it checks `wanted` itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def listen(self, seconds: float | None = None) -> None:
        """Stop at SIGINT, SIGTERM, or after so many seconds."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, self._handle)
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))

    def _handle(self, number: int, frame: Any) -> None:
        if self._wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._wanted = True
        if not self._deferred:
            raise Stopped


def seconds_until(clock: str) -> float:
    """Seconds until a time of day, HH:MM, today or tomorrow."""
    hours, minutes = map(int, clock.split(":"))
    now = datetime.datetime.now()
    then = now.replace(hour=hours, minute=minutes, second=0, microsecond=0)
    if then <= now:
        then += datetime.timedelta(days=1)
    return (then - now).total_seconds()


def log(text: str) -> None:
    """One line with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
