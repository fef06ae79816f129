"""Turns errors into messages of the command line."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Mapping

from ..errors import MinitronError, cut_short

_SCORE = "`minitron-hf score MODEL --data TEXT --output FOLDER`"
#: What messages advise to users of Python → the same for the command line.
IN_COMMANDS: Mapping[str, str] = {
    "Pass scores=estimate_importance(…), or calibration_data to prune_model.": (
        f"Make them with {_SCORE}, then pass --scores FOLDER."
    ),
    "Make them with estimate_importance(…) first.": f"Make them with {_SCORE} first.",
    "Make them again with estimate_importance(…).": f"Make them again with {_SCORE}.",
    "Make them with estimate_importance(…).": f"Make them with {_SCORE}.",
    "Score this model with estimate_importance(…).": f"Score this model with {_SCORE}.",
    "teacher_model is None, and train_dataset is not a teacher cache. Pass a teacher, or load_teacher_cache(folder) "
    "as train_dataset.": (
        "--teacher is missing, and --train-data is not a teacher cache. Pass --teacher MODEL, or the folder of a "
        "teacher cache (`minitron-hf cache`) as --train-data."
    ),
    "Give smaller ones, or fractions of them (hidden_size=0.75), or layers_to_drop, or target_parameters.": (
        "Give smaller ones, or fractions of them such as 0.75, or layers_to_drop."
    ),
    "Pass token_counts=count_tokens(corpus, tokenizer), or calibration_data to prune_model; on the command line, "
    "--data with text.": "Pass --data with text like the student's later input.",
    "Pass speed=False to skip the timing.": "Skip the timing with --set speed=false.",
    "Pass speed=False.": "Skip the timing with --set speed=false.",
}


def error_message(error: BaseException) -> tuple[str, int]:
    """The message of an error, and the exit code of the command.

    The exit code is 2 for errors of this package, errors of the file system, lack of memory, and arguments that a
    library refuses (ValueError). It is 1 for all other errors. For the last two kinds, the traceback is written to a
    file, and the message names the file.
    """
    if isinstance(error, MinitronError | OSError):
        return _in_commands(str(error)), 2
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


def _in_commands(text: str) -> str:
    """A message with its advice in the words of the command line."""
    for python, command in IN_COMMANDS.items():
        text = text.replace(python, command)
    return text


def _line(error: BaseException, limit: int = 600) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = cut_short(text, limit)
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def _written_traceback(error: BaseException) -> str:
    handle, name = tempfile.mkstemp(prefix="minitron-hf-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return name
