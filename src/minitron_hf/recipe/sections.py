"""Builds the sections of a recipe from mappings. Unknown, missing and mistyped entries are refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from ..errors import DataError, did_you_mean
from .rules import OLD_NAMES, require_value, with_new_names

#: Entries that may be paths of this machine, where `~` is the user's home.
_PATHS = ("model", "source", "output_dir", "config", "include_path", "task_data")


def built_section(cls: Any, values: Any, where: str) -> Any:
    """Build a (nested) dataclass from mappings.

    Args:
        cls: the dataclass. Its `shorthand` is the entry that a text alone stands for.
        values: entries, nested as the dataclasses are.
        where: the section, for messages; empty: the recipe itself.

    Raises:
        DataError: naming unknown, missing and mistyped entries.
    """
    if isinstance(values, str) and (entry := getattr(cls, "shorthand", None)) is not None:
        values = {entry: values}
    if not isinstance(values, Mapping):
        raise DataError(f"{where or 'The recipe'}: expected a section with entries, got {values!r}.")
    hints = get_type_hints(cls)
    names = {field.name: field for field in fields(cls)}
    if unknown := sorted(map(str, set(values) - set(names))):
        raise DataError(
            f"{where or 'The recipe'} has no entry {', '.join(unknown)}.{did_you_mean(unknown, names)} "
            f"Expected: {', '.join(names)}."
        )
    built: dict[str, Any] = {}
    for name, value in values.items():
        options = getattr(hints[name], "__args__", (hints[name],))
        nested = next((option for option in (hints[name], *options) if is_dataclass(option)), None)
        at = f"{where}.{name}" if where else name
        lists = [option for option in (hints[name], *options) if getattr(option, "__origin__", None) is list]
        if nested is not None and isinstance(value, list) and lists:
            built[name] = [built_section(nested, one, f"{at}.{number}") for number, one in enumerate(value, 1)]
        elif nested is not None and value is not None and hints[name] not in lists:
            built[name] = built_section(nested, value, at)
        else:
            require_value(value, hints[name], at)
            value = with_new_names(value, name, f"{at}.") if name in OLD_NAMES and value is not None else value
            built[name] = _text(value, name, at) if isinstance(value, str) else value
    try:
        return cls(**built)
    except TypeError as error:
        missing = str(error).split("argument")[-1].lstrip("s: ")
        raise DataError(f"{where or 'The recipe'} lacks {missing}. Expected: {', '.join(names)}.") from error


def _text(value: str, name: str, where: str) -> str:
    """Refuse empty text; expand `~` in paths."""
    if not value.strip():
        raise DataError(f"{where}={value!r}: expected text. Leave the entry out for its default.")
    return os.path.expanduser(value) if name in _PATHS else value
