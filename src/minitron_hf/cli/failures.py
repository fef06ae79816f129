"""Turns errors into messages of the command line."""

from __future__ import annotations

import os
import tempfile
import traceback

from ..errors import MinitronError


def error_message(error: BaseException) -> tuple[str, int]:
    """The message of an error, and the exit code of the command.

    Errors that this package or the file system raises say all there is to say: exit code 2, as does a lack of memory.
    So do those by which libraries refuse an argument (ValueError). For any other, code 1. Of the last two kinds the
    traceback goes into a file, whose name is in the message.
    """
    if isinstance(error, MinitronError | OSError):
        return str(error), 2
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
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def _written_traceback(error: BaseException) -> str:
    handle, name = tempfile.mkstemp(prefix="minitron-hf-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return name
