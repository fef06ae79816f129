"""Checks settings before anything is computed: unknown names, types, choices and ranges.

Types and choices come from the annotations of whatever takes a setting, a function or a dataclass. Ranges are listed
here by name, because a name means the same everywhere.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError, did_you_mean, warn_renamed


@dataclass(frozen=True)
class Range:
    """The allowed numbers of a setting.

    Attributes:
        least: the smallest of them.
        above: all of them are larger.
        most: the largest of them.
        below: all of them are smaller.
        also: a number outside that has a meaning of its own.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return value == self.also or (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (
            ("at least", self.least),
            ("more than", self.above),
            ("at most", self.most),
            ("less than", self.below),
        )
        text = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return text + ("" if self.also is None else f", or {self.also:g}")


_COUNT, _SOME, _SHARE, _SEED = Range(least=1), Range(least=0), Range(least=0, most=1), Range(least=0, most=2**32 - 1)
_POSITIVE = Range(above=0)
#: The range of a setting, by its name.
RANGES: Mapping[str, Range] = {
    # rows and batches
    **dict.fromkeys(
        (
            "batch_size", "block_length", "chat_max_new_tokens", "context_length", "dataset_num_proc",
            "decode_tokens", "devices", "draft_prompts", "draft_tokens", "eval_task_limit",
            "eval_accumulation_steps", "gradient_accumulation_steps", "iterations",
            "loss_chunk_size", "max_new_tokens", "max_prompt_length", "num_candidates", "num_chat_prompts",
            "num_prompts", "num_processes", "num_pruned", "num_rounds", "num_rows", "rows_per_file",
            "num_tokens", "per_device_eval_batch_size", "per_device_train_batch_size",
            "num_draws", "prefill_length", "rounds", "save_total_limit", "top_k", "torch_empty_cache_steps",
            "r", "lora_rank",
            "qalora_group_size", "dataloader_prefetch_factor", "max_eval_rows", "max_memory_bytes", "max_parameters",
            "max_active_parameters",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "dataloader_num_workers", "eval_delay", "keep_first_layers", "keep_last_layers", "max_grad_norm",
            "num_fewshot", "warmup_steps", "weight_decay", "ce_weight", "kd_weight", "ridge",
        ),
        _SOME,
    ),
    **dict.fromkeys(
        (
            "adam_epsilon", "eval_steps", "learning_rate", "logging_steps", "lora_alpha", "max_seconds_per_token",
            "neftune_noise_alpha", "num_train_epochs", "original_learning_rate", "save_steps", "task_limit",
            "teacher_learning_rate", "teacher_original_learning_rate", "temperature", "weight",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), Range(least=0, below=1)),
    **dict.fromkeys(("jsd_beta", "tolerance", "label_smoothing_factor"), _SHARE),
    "top_p": Range(above=0, most=1),
    "max_length": Range(least=2),
    "max_steps": Range(least=1, also=-1),
}  # fmt: skip

#: Section of a recipe → old name of one of its settings → its name, for one release. Those of `scores` are also names
#: of `--set` of `score` and `prune`, those of `search` of `search`.
OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    "scores": {"num_samples": "num_rows"},
    "search": {"num_proxied": "num_pruned"},
}

#: Settings whose annotation is narrower or wider than what is understood.
_UNDERSTOOD: Mapping[str, Any] = {
    "intermediate_weight": float | str,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
}
#: Words that YAML 1.1 takes for booleans and YAML 1.2 for text.
_UNCLEAR = ("yes", "no", "on", "off")


def with_new_names(values: Mapping[str, Any], section: str, prefix: str) -> dict[str, Any]:
    """The settings with new names for old ones (`OLD_NAMES`), with a `DeprecationWarning`.

    Args:
        values: settings of the section.
        section: `"scores"` or `"search"`; settings of others have no old names.
        prefix: what stands before a name in a message.

    Raises:
        DataError: if a setting is given under both names.
    """
    names = OLD_NAMES.get(section, {})
    for old, new in names.items():
        if old in values:
            if new in values:
                raise DataError(f"{prefix}{old} is the old name of {prefix}{new}, which is given, too. Leave it out.")
            warn_renamed(f"{prefix}{old}", f"{prefix}{new}")
    return {names.get(name, name): value for name, value in values.items()}


def hints_of(target: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """Setting → annotation, of a function's keyword arguments or a dataclass's fields; Any where it cannot be read.

    The choices that a field's metadata names (as in `TrainingArguments`) become a part of its annotation.
    """
    if dataclasses.is_dataclass(target):
        hints = typing.get_type_hints(target)
        fields = [one for one in dataclasses.fields(target) if one.init]
        names = [one.name for one in fields]
        for one in fields:
            if choices := tuple(one.metadata.get("choices") or ()):
                optional = Literal[None] if type(None) in _options(hints[one.name]) else Literal[choices]
                hints[one.name] = typing.Union[Literal[choices], optional]  # noqa: UP007 (made of values)
    else:
        parameters = inspect.signature(target).parameters.values()
        names = [one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
        hints = {one.name: _annotation(one.annotation, target) for one in parameters}
    return {name: _UNDERSTOOD.get(name, hints[name]) for name in names if name not in without and name[:1] != "_"}


def _annotation(annotation: Any, function: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, inspect.unwrap(function).__globals__)
    except NameError:  # imported for type checkers only: nothing that YAML can hold
        return Any


def require_settings(values: Any, hints: Mapping[str, Any], prefix: str, takes: str) -> None:
    """Refuse unknown settings and impossible values.

    Args:
        values: name → value, as read from YAML.
        hints: name → annotation, see `hints_of`.
        prefix: what stands before a name in a message: `"distill."`, `"--set "`.
        takes: what the names are: `"fields of DistillationConfig"`.

    Raises:
        DataError: naming the first that is wrong.
    """
    where = prefix.rstrip(". ")
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: expected entries `name: value`, got {values!r}.")
    if unknown := sorted(map(str, set(values) - set(hints))):
        known = f": {', '.join(sorted(hints))}" if len(hints) <= 40 else ""
        raise DataError(
            f"{where}: {', '.join(unknown)} is unknown.{did_you_mean(unknown, hints)} Expected {takes}{known}."
        )
    for name, value in values.items():
        require_value(value, hints[name], f"{prefix}{name}")
        if isinstance(value, Mapping):
            _refuse_unclear_words(value, f"{prefix}{name}")


def require_value(value: Any, hint: Any, where: str, name: str | None = None) -> None:
    """Refuse a value that its annotation does not allow, or that lies outside the range of its name.

    Args:
        value: what was given.
        hint: the annotation.
        where: what a message calls it; it ends with the name, unless that is given.
        name: the setting's name.

    Raises:
        DataError: with the value, where it stands and what was expected.

    >>> require_value(0, int | None, "evaluate.num_rows")
    Traceback (most recent call last):
    minitron_hf.errors.DataError: evaluate.num_rows=0: expected at least 1.
    """
    if not _fits(value, hint):
        raise DataError(f"{where}={value!r}: expected {_described(hint)}.{_advice(value, hint)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}={value!r}: expected a finite number.")
    allowed = RANGES.get(name or where.rpartition(".")[2].rpartition(" ")[2])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if allowed is not None and number and not allowed.holds(value):
        raise DataError(f"{where}={value!r}: expected {allowed}.")


def require_choice(value: str, choices: Collection[str], where: str) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        DataError: with what it may have been meant for.
    """
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise DataError(f"{where}={value!r}: expected one of {listed}.{did_you_mean(str(value), choices)}")


def _refuse_unclear_words(values: Mapping[Any, Any], where: str) -> None:
    """Refuse words such as `yes` in free sections: they have no declared types, and any text counts as true."""
    for name, value in values.items():
        if isinstance(value, str) and value.lower() in _UNCLEAR:
            raise DataError(f"{where}.{name}={value}: write true or false.")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{where}.{name}={value!r}: expected a finite number.")
        if isinstance(value, Mapping):
            _refuse_unclear_words(value, f"{where}.{name}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or the annotation itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(part for one in typing.get_args(hint) for part in _options(one)) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, option) for option in _options(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Any, inspect.Parameter.empty):
        return True
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin in (None, type(None)):
        return value is None
    if not isinstance(origin, type):
        return False
    if origin is bool or isinstance(value, bool):
        return origin in (bool, object) and isinstance(value, bool)
    if origin is float:
        return isinstance(value, int | float)
    if issubclass(origin, enum.Enum):
        return value in [one.value for one in origin]
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, Sequence) and origin is not str:
        return isinstance(value, list | tuple) and (not inner or all(_fits(one, inner[0]) for one in value))
    return isinstance(value, origin)


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


def _described(hint: Any) -> str:
    words: list[str] = []
    for option in _options(hint):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is Literal:
            words += map(repr, inner)
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            words += [repr(one.value) for one in origin]
        elif origin in _WORDS or origin is None:
            words.append(_WORDS[origin or type(None)])
        elif dataclasses.is_dataclass(origin) or (isinstance(origin, type) and issubclass(origin, Mapping)):
            words.append("entries")
        elif isinstance(origin, type) and issubclass(origin, Sequence):
            words.append(f"a list of {_described(inner[0])}" if inner else "a list")
    enums = any(isinstance(option, type) and issubclass(option, enum.Enum) for option in _options(hint))
    kept = [word for word in dict.fromkeys(words) if not (enums and word == "text")]
    return " or ".join(kept) or "something else"


def _advice(value: Any, hint: Any) -> str:
    """A hint at the value that was probably meant."""
    wanted = _options(hint)
    if isinstance(value, float) and value.is_integer() and int in wanted:
        return f" Write {int(value)}."
    if isinstance(value, str) and value.lower() in _UNCLEAR and bool in wanted:
        return f" Write {'true' if value.lower() in ('yes', 'on') else 'false'}."
    if isinstance(value, int | float) and str in wanted:
        return f" Write it in quotes: '{value}'."
    choices = [one for option in wanted if typing.get_origin(option) is Literal for one in typing.get_args(option)]
    return did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
