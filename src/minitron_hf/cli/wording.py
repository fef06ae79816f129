"""Messages for users of Python, in the words of the command that runs: its options, its --set, other commands.

Errors, notes of plans and of estimates, and warnings of this package are worded so where they are printed.

Messages of the library name settings as Python does (`tolerance=0.07`). Which of them are options, and which are
entries of --set, the command knows: `CheckedCommand` says it with `begin`, and what reads --set with `takes`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

_SCORE = "`minitron-hf score MODEL --data TEXT --output FOLDER`"
#: Whole sentences of advice → the same for the command line.
SENTENCES: Mapping[str, str] = {
    "Pass scores=estimate_importance(…), or calibration_data to prune_model.": (
        f"Make them with {_SCORE}, then pass --scores FOLDER."
    ),
    "Make them with estimate_importance(…, hidden_covariance=True), or pass calibration_data to prune_model.": (
        f"Make them with {_SCORE} and --set hidden_covariance=true."
    ),
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
    "Write the cache with pruning_plan=plan, or pass the texts and teacher_model instead of the cache.": (
        "Write the cache with `minitron-hf cache --plan FOLDER`, or pass the texts and --teacher instead of the cache."
    ),
    "(pruning_plan of cache_teacher_logits). Write it with the plan of this student": (
        "(--plan of `minitron-hf cache`). Write it with the plan of this student"
    ),
    "Name the text column with text_field=…": "Name the text column with --text-field.",
    "Name the column with text_field=…": "Name the column with --set text_field=NAME.",
    "or set HF_TOKEN or pass token= with a token that has": "or set HF_TOKEN to a token that has",
    "Set tokenizer.chat_template.": "Save one beside the tokenizer (chat_template.jinja).",
    "Plan with PrunerConfig(repair=…).": "Plan with `minitron-hf plan --set repair=…`.",
    "lan with repair='least_squares'.": "lan with `minitron-hf plan --set repair=least_squares`.",
    "so repaired= would not be recorded": "so repaired weights would not be recorded",
}
#: Functions and classes that messages call → what does the same. Their names alone stay, as in "fields of …".
CALLS: Mapping[str, str] = {
    "estimate_importance": _SCORE,
    "make_plan": "`minitron-hf plan`",
    "plan_for_target": "`minitron-hf plan --target`",
    "apply_plan": "`minitron-hf prune`",
    "prune_checkpoint": "`minitron-hf prune --data`",
    "prune_with_plan": "`minitron-hf prune --in-memory`",
    "count_tokens": "`minitron-hf plan --vocab-size`",
    "load_teacher_cache": "the folder of a teacher cache",
    "correct_teacher": "the recipe's teacher_correction",
    "cache_teacher_logits": "`minitron-hf cache`",
}
#: A call without the argument lists of other calls in it.
_CALL = re.compile(rf"\b({'|'.join(CALLS)})\([^()]*\)")
#: `PrunerConfig(a=…)` and its like: the arguments are settings.
_CONFIG = re.compile(r"\b(?:PrunerConfig|DistillationConfig)\(([^()]*)\)")
#: A setting and its value, unless it is an entry of --set or a part of a longer name.
_SETTING = re.compile(
    r"(?P<given>--set[ =]'?\S+|--space \S+)"
    r"|(?<![\w.'\"=\-/])(?P<name>[a-z][a-z0-9_]*)="
    r"(?P<value>'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^}]*\}|\d+(?:,\d{3})+|[^\s,:;()'\"=]+(?=\.(?:\s|$))|[^\s,:;()'\"=]+)"
)
_LITERALS: Mapping[str, str] = {"True": "true", "False": "false", "None": "null"}


@dataclass
class _Settings:
    """What a command takes.

    Attributes:
        options: name of a parameter → the option.
        flags: names of options without a value.
        sections: each gives section (none: "") → names of the entries of --set; called when a message is worded.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    flags: Collection[str] = ()
    sections: list[Callable[[], Mapping[str, Iterable[str]]]] = field(default_factory=list)

    def entry(self, name: str, text: str) -> str | None:
        """The entry of --set with a name; None if there is none, or several sections have one.

        Args:
            name: as in Python.
            text: the message. Where it begins with a section, the entry of this section is meant.
        """
        begins, found = re.match(r"\w+", text), []
        for sections in self.sections:
            with contextlib.suppress(ImportError):
                found += [section for section, names in sections().items() if name in names]
        meant = [section for section in found if begins and section == begins[0]] or found
        return None if len(meant) != 1 else f"{meant[0]}.{name}" if meant[0] else name


_CURRENT: ContextVar[_Settings] = ContextVar("settings", default=_Settings())  # noqa: B039 (replaced by every command)


def begin(options: Mapping[str, str], flags: Collection[str] = ()) -> None:
    """Begin a command.

    Args:
        options: name of each parameter → its option.
        flags: names of those without a value.
    """
    _CURRENT.set(_Settings(options, flags))


def takes(names: Iterable[str]) -> None:
    """Say what --set takes.

    Args:
        names: of the entries.
    """
    known = {"": list(names)}
    _CURRENT.get().sections.append(lambda: known)


def takes_sections(sections: Callable[[], Mapping[str, Iterable[str]]]) -> None:
    """Say what the sections of a recipe take.

    Args:
        sections: gives section → names of its entries.
    """
    _CURRENT.get().sections.append(sections)


def worded(text: str) -> str:
    """A message of the library in the words of the command that runs."""
    for python, command in SENTENCES.items():
        text = text.replace(python, command)
    text = _CALL.sub(lambda found: CALLS[found[1]], text)
    text = _CONFIG.sub(lambda found: found[1], text)
    settings = _CURRENT.get()

    def in_options(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name is None:
            return found[0]
        value = _LITERALS.get(value, value.strip("'\""))
        if name in settings.flags and value == "true":
            return settings.options[name]
        if name in settings.options and name not in settings.flags:
            return f"{settings.options[name]} {value}"
        entry = settings.entry(name, text)
        if entry is None:
            return found[0]
        # An entry of a section may stand in the recipe; others are given with --set alone.
        return f"{entry}={value}" if "." in entry else f"--set {entry}={value}"

    return _SETTING.sub(in_options, text)
