"""How a command prints: text for people, or one JSON document for machines; how much of it, and one progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import typer

from .wording import worded

#: Libraries whose warnings are hidden without --verbose, as beginnings of module names, and their verbosity variables.
NOISY = r"(accelerate|datasets|huggingface_hub|peft|torch|transformers|trl)\b"
#: Loggers that warn while libraries are imported: of kernels for other processors, and of names that torch replaces.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")


@dataclass
class Output:
    """What the options --json, --quiet and --verbose say, and the values of the JSON document.

    Attributes:
        json: print one JSON document instead of text.
        quiet: no lines about the progress. Neither with this nor with `json` are there progress bars.
        verbose: messages of all libraries.
        values: name → value.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are shown."""
        return not (self.quiet or self.json)


_CURRENT: ContextVar[Output] = ContextVar("output", default=Output())  # noqa: B039 (replaced by every command)


def current() -> Output:
    """How the command that runs prints."""
    return _CURRENT.get()


def given(name: str, value: Any) -> bool:
    """Put a value into the JSON document, if one is wanted.

    Args:
        name: its key.
        value: what `plain` knows.

    Returns:
        Whether it was put there, so that no text is printed.
    """
    output = current()
    if output.json:
        output.values[name] = value
    return output.json


def added(name: str, value: Any) -> bool:
    """As `given`, for one of several values of a name."""
    output = current()
    if output.json:
        output.values.setdefault(name, []).append(value)
    return output.json


def say(text: str) -> None:
    """Print a line; beside a JSON document to the standard error."""
    typer.echo(text, err=current().json)


def tell(text: str) -> None:
    """Print a line about the progress, which --quiet hides."""
    if not current().quiet:
        say(text)


def wrote(path: Any, remark: str = "") -> None:
    """Say, or put into the JSON document, what a command has written."""
    if not added("written", os.fspath(path)):
        say(f"Wrote {os.fspath(path)}{remark}")


def plain(value: Any) -> Any:
    """A value as JSON holds it; numbers that are not finite become null.

    >>> plain({"a": (1, float("nan")), 2: {"b"}})
    {'a': [1, None], '2': ['b']}
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextlib.contextmanager
def printing(command: str, output: Output) -> Iterator[None]:
    """Run the body of a command: one progress bar, no noise, the JSON document at its end.

    Args:
        command: its name.
        output: how to print.
    """
    from ..progress import one_progress_bar

    token = _CURRENT.set(output)
    try:
        with contextlib.ExitStack() as stack:
            if output.json:  # whatever else is printed must not break the document
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(_library_messages(verbose=output.verbose))
            stack.enter_context(one_progress_bar(show=output.shows_progress))
            yield
        _print_document(command, output)
    except typer.Exit:  # a command that has printed its result
        _print_document(command, output)
        raise
    finally:
        _CURRENT.reset(token)


def _print_document(command: str, output: Output) -> None:
    if output.json:
        typer.echo(json.dumps({"command": command, **plain(output.values)}, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def _library_messages(*, verbose: bool) -> Iterator[None]:
    """Hide the warnings of other libraries; or show all messages, those of this package with their details.

    Messages of this package are in the words of the command.
    """
    logger, handler = logging.getLogger("minitron_hf"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Worded("%(asctime)s %(name)s: %(message)s" if verbose else None, "%H:%M:%S"))
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    before, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    if verbose:
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        with contextlib.nullcontext() if verbose else _without_others():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagates


class _Worded(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return worded(super().format(record))


@contextlib.contextmanager
def _without_others() -> Iterator[None]:
    """Hide the warnings of other libraries."""
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    own = {name: "error" for name in VERBOSITY if name not in os.environ}
    os.environ.update(own)  # read when the libraries are imported
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=NOISY)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in own:
            os.environ.pop(name, None)
