"""Turns errors into messages of the command line."""

from __future__ import annotations

import os
import tempfile
import traceback

from ..errors import MinitronError, cut_short
from .wording import worded


def error_message(error: BaseException) -> tuple[str, int]:
    """The message of an error, and the exit code of the command.

    The exit code is 2 for errors of this package, errors of the file system, lack of memory, and arguments that a
    library refuses (ValueError). It is 1 for all other errors. For the last two kinds, the traceback is written to a
    file, and the message names the file.
    """
    if isinstance(error, MinitronError | OSError):
        return worded(str(error)), 2
    if is_out_of_memory(error):
        return (
            f"Out of memory: {_line(error)} Lower the batch size or the length of rows, turn on "
            "activation_checkpointing, or take a smaller model or a larger device.",
            2,
        )
    where = _written_traceback(error)
    if isinstance(error, ValueError):
        return f"{_line(error)} (Details: {where})", 2
    return (
        f"This should not happen: {type(error).__name__}: {_line(error)} The traceback is in {where}; please report "
        "it with the command.",
        1,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or a device ran out of memory. PyTorch has its own error class for that."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _line(error: BaseException, limit: int = 600) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = cut_short(text, limit)
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def _written_traceback(error: BaseException) -> str:
    handle, name = tempfile.mkstemp(prefix="minitron-hf-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return name
