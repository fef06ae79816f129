"""The exceptions of this package. Every message says what was wrong, where, what was expected, and what to do next.

Each is also the built-in exception that code which knows nothing of this package would catch: `ValueError`, `OSError`
for the Hub, `ImportError` for a missing package. The command line prints any as one message with exit code 2.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

_Callable = TypeVar("_Callable", bound=Callable[..., Any])

#: Environment variable: the folder in which launched processes leave their errors to the one that started them.
MESSAGES = "MINITRON_HF_MESSAGES"


class MinitronError(Exception):
    """Base class of every error that this package raises on purpose."""


class UnsupportedModelError(MinitronError, ValueError):
    """The model's architecture is unknown, or its parameters are not the ones its family table declares."""


class PlanError(MinitronError, ValueError):
    """The requested sizes cannot be cut from this teacher, or the stock student class cannot hold them."""


class ArgumentError(MinitronError, TypeError):
    """An argument that a function does not have, or of another type than it takes."""


class DataError(MinitronError, ValueError):
    """Text, token rows or a tokenizer that cannot be used."""


class MismatchError(MinitronError, ValueError):
    """An artefact was made from another model, tokenizer, dataset or settings than the ones at hand."""


class OutputError(MinitronError, ValueError):
    """An output folder cannot be written, or already holds something else."""


class HubError(MinitronError, OSError):
    """The Hub refused a request, or a model or dataset could not be found."""


class ServerError(MinitronError, OSError):
    """The server of a teacher did not answer, or cannot give what is needed."""


class MissingDependencyError(MinitronError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class DistributedError(MinitronError, ValueError):
    """Several processes cannot be started, or one of them has died."""


class DivergedError(MinitronError, ValueError):
    """A loss or a weight is not a number any more."""


class NotEnoughMemoryError(MinitronError, MemoryError):
    """The memory of the machine or of a device does not suffice."""


class VerificationError(MinitronError, ValueError):
    """A student does not compute what its teacher does with the same units masked."""


def cut_short(text: str, limit: int) -> str:
    """A text on one line that ends with a whole word and an ellipsis where it is too long.

    >>> cut_short("one two three", 9), cut_short("one two", 9), cut_short("characters", 5)
    ('one two…', 'one two', 'chara…')
    """
    short = textwrap.shorten(text, limit, placeholder="…")
    return short if short != "…" else f"{text[:limit]}…"


def did_you_mean(names: str | Iterable[str], known: Iterable[str]) -> str:
    """A sentence that suggests the known names that are spelt most like wrong ones, after a space; or nothing.

    >>> did_you_mean("learning_rat", ["learning_rate", "seed"]), did_you_mean("colour", ["seed"])
    (" Did you mean 'learning_rate'?", '')
    """
    import difflib

    known = [str(name) for name in known]
    lower = {name.lower(): name for name in known}
    close: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else map(str, names):
        found = difflib.get_close_matches(name.lower(), lower, n=1)
        close |= dict.fromkeys(repr(lower[one]) for one in found)
    return f" Did you mean {', '.join(close)}?" if close else ""


def shortened(items: list[str], separator: str = ", ", limit: int = 4) -> str:
    """The first of some items, and how many more there are.

    >>> shortened(["a", "b", "c"], limit=2)
    'a, b, … (1 more)'
    """
    more = f"{separator}… ({len(items) - limit} more)" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


#: Class that arguments of public functions have → where an instance comes from, for messages.
KINDS: Mapping[str, str] = {
    "PrunerConfig": "Build it with PrunerConfig(hidden_size=0.75, …), or PrunerConfig.from_dict(…) from a mapping.",
    "ImportanceScores": "Make them with estimate_importance(…), or read ImportanceScores.from_pretrained(folder).",
    "PruningPlan": "Make it with make_plan(…), or read PruningPlan.from_pretrained(folder).",
    "TokenCounts": "Make them with count_tokens(corpus, tokenizer).",
    "PretrainedConfig": "Read it with transformers.AutoConfig.from_pretrained(folder_or_hub_id).",
    "Recipe": "Build it with Recipe.from_dict(…), or read Recipe.from_yaml(file).",
    "PreTrainedModel": "Load it with load_model(folder_or_hub_id).",
    "PreTrainedTokenizerBase": "Load it with load_tokenizer(folder_or_hub_id).",
}
#: Class → others that do as well: Transformers 5 spells its config otherwise, models are wrapped, processors hold
#: tokenizers.
_ALSO = {
    "PretrainedConfig": {"PreTrainedConfig"},
    "PreTrainedModel": {"Module"},
    "PreTrainedTokenizerBase": {"ProcessorMixin"},
}
#: What an argument may be beside an object that can be loaded from it.
_PATHS = ("str", "os.PathLike[str]")
#: Plain type of an argument → what a message calls it, and what is taken for it.
_PLAIN: Mapping[str, tuple[str, type]] = {
    "int": ("an integer", numbers.Integral),
    "float": ("a number", numbers.Real),
    "bool": ("True or False", bool),
    "str": ("text", str),
    "None": ("None", type(None)),
}


def expected_instead(value: Any, annotation: str) -> str | None:
    """What an annotation of plain types expects, if a value is something else.

    Args:
        value: of an argument or a field.
        annotation: as it is written; others than plain types and their unions allow everything.

    >>> expected_instead("10", "int | None"), expected_instead(10, "int | None"), expected_instead("false", "bool")
    ('an integer or None', None, 'True or False')
    """
    parts = annotation.split(" | ")
    if not set(parts) <= _PLAIN.keys():
        return None
    flag = isinstance(value, bool)
    if any(isinstance(value, _PLAIN[part][1]) and flag <= (part == "bool") for part in parts):
        return None
    return " or ".join(_PLAIN[part][0] for part in parts)


def checks_kinds(function: _Callable) -> _Callable:
    """Decorate a function: arguments annotated as `KINDS` or plain types have to be that, or the call is refused."""
    annotations = {name: str(one) for name, one in function.__annotations__.items() if name != "return"}
    parts_of = {name: one.split(" | ") for name, one in annotations.items()}
    kinds = {
        name: parts
        for name, parts in parts_of.items()
        if {*parts} <= {*KINDS, *_PATHS, "None"} and not KINDS.keys().isdisjoint(parts)
    }
    names = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        for name, value in given.items():
            if name in kinds and not _is_one_of(value, kinds[name]):
                wanted = [kind for kind in kinds[name] if kind in KINDS]
                path = "" if len(wanted) == len({*kinds[name]} - {"None"}) else " or a path"
                raise ArgumentError(
                    f"{function.__name__}({name}=…): expected a {' or '.join(wanted)}{path}, not a "
                    f"{type(value).__name__}. {KINDS[wanted[0]]}"
                )
            if plain := expected_instead(value, annotations.get(name, "")):
                raise ArgumentError(f"{function.__name__}({name}={value!r}): expected {plain}.")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _is_one_of(value: Any, kinds: Iterable[str]) -> bool:
    """Whether a value is an instance of one of some classes, given by name; they are not imported."""
    own = {one.__name__ for one in type(value).__mro__} | (
        {"os.PathLike[str]"} if isinstance(value, os.PathLike) else set()
    )
    return any(value is None if kind == "None" else own & {kind, *_ALSO.get(kind, ())} for kind in kinds)


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a public name was renamed. The old name will be removed in the next release."""
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release: use {new}.", DeprecationWarning, stacklevel
    )


def accept_old_names(**new_names: str) -> Callable[[_Callable], _Callable]:
    """Decorate a function, or a class, that takes arguments under old names, with a `DeprecationWarning`.

    A class has properties of the old names, too.

    Args:
        **new_names: old name → new name.
    """

    def decorate(target: _Callable) -> _Callable:
        call: Any = vars(target)["__init__"] if isinstance(target, type) else target

        @functools.wraps(call)
        def with_new_names(*args: Any, **kwargs: Any) -> Any:
            for old, new in new_names.items():
                # `dataclasses.replace` gives both to a class.
                if old in kwargs and new in kwargs and not isinstance(target, type):
                    name = target.__name__
                    raise DataError(f"{name}({old}=…) is the old name of {new}=…, which is given, too. Leave it out.")
                if old in kwargs:
                    warn_renamed(f"{target.__name__}({old}=…)", f"{new}=…")
                    kwargs[new] = kwargs.pop(old)
            return call(*args, **kwargs)

        if not isinstance(target, type):
            return with_new_names  # type: ignore[return-value]
        setattr(target, "__init__", with_new_names)  # noqa: B010 (a checker refuses the plain assignment)
        for old, new in new_names.items():
            setattr(target, old, property(functools.partial(_read_old_name, old=old, new=new)))
        return target

    return decorate


def _read_old_name(owner: Any, *, old: str, new: str) -> Any:
    warn_renamed(f"{type(owner).__name__}.{old}", new)
    return getattr(owner, new)
