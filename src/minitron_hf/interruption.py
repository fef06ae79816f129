"""Signals that ended a command. A library may swallow the KeyboardInterrupt that one raises, as `datasets` does while
it hashes a function; what computes for long asks here again. It imports nothing that takes time.
"""

from __future__ import annotations

from typing import NoReturn

_arrived: list[int] = []


def interrupt(number: int, frame: object = None) -> NoReturn:
    """Handle a signal: remember it, and raise.

    Raises:
        KeyboardInterrupt: always.
    """
    _arrived.append(number)
    raise KeyboardInterrupt


def last_signal() -> int | None:
    """Number of the last signal that arrived; None without one."""
    return _arrived[-1] if _arrived else None


def raise_if_interrupted() -> None:
    """End what goes on although a signal came.

    Raises:
        KeyboardInterrupt: if one came.
    """
    if _arrived:
        raise KeyboardInterrupt
