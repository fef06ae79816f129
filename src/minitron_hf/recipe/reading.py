"""Reads the YAML of recipes and of `--set`."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from ..errors import DataError


class _Loader(yaml.SafeLoader):
    """YAML 1.2: only `true` and `false` are booleans, and no key appears twice.

    PyYAML follows YAML 1.1, where `eval_strategy: no` is False, `1:30` is 90, `2024-01-31` is a date and `1e-4`
    is text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as in the base class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A dict, refused where a key is there twice: PyYAML silently takes the last."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    where = key_node.start_mark
                    raise DataError(
                        f"Line {where.line + 1}: the key {key!r} is there twice. Leave out one of them, or join them."
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts every text into quotes that version 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_yaml(text: str) -> Any:
    """Parse YAML 1.2.

    Raises:
        DataError: if it is not valid, or holds a key twice.

    >>> read_yaml("[1e-4, 2.5e3, 3, 0.5, text, no, 1:30, 1_000, null]")
    [0.0001, 2500.0, 3, 0.5, 'text', 'no', '1:30', 1000, None]
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except DataError:
        raise
    # A word behind an explicit tag (`!!bool maybe`) fails in whatever its constructor tries.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(_yaml_message(error)) from error


def write_yaml(values: Any) -> str:
    """Write YAML that readers of versions 1.1 and 1.2 both read as these values.

    >>> print(write_yaml({"revision": "1e10", "eval_strategy": "no", "seed": 3}), end="")
    revision: '1e10'
    eval_strategy: 'no'
    seed: 3
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _yaml_message(error: Exception) -> str:
    """A YAML error in one line: where, and what."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    what = (problem or str(error).partition("\n")[0]).rstrip(".")
    return f"{f'Line {mark.line + 1}: ' if mark else ''}not valid YAML: {what}."


#: What large numbers may end in.
_SCALES: Mapping[str, float] = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
#: Entries whose numbers may: budgets of parameters, tokens and bytes.
BUDGETS = (
    "max_active_parameters", "max_memory_bytes", "max_parameters", "memory_limit", "num_tokens",
    "target_active_parameters", "target_parameters",
)  # fmt: skip
#: Those of bytes, whose numbers may end in a unit, too.
BYTE_BUDGETS = ("max_memory_bytes", "memory_limit")
_UNITS: Mapping[str, float] = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def read_number(text: str, where: str, *, is_bytes: bool = False) -> int | float:
    """A number above 0 that may end in k, M, B or T, in lower or upper case.

    Args:
        text: the number.
        where: what a message calls it, and what stands between that and the number: `"--tokens "`.
        is_bytes: whether it may end in KB, MB, GB or TB, too.

    Raises:
        DataError: if it is no such number.

    >>> [read_number(text, "--tokens ") for text in ("500K", "0.4m", "50b", "4.5e9", "0.5")]
    [500000, 400000, 50000000000, 4500000000, 0.5]
    >>> read_number("1.5GB", "--max-memory-bytes ", is_bytes=True)
    1500000000
    """
    digits, length = text.strip(), 1
    scale = _SCALES.get(digits[-1:].lower())
    if is_bytes and digits[-2:].lower() in _UNITS:
        scale, length = _UNITS[digits[-2:].lower()], 2
    try:
        number = float(digits if scale is None else digits[:-length]) * (scale or 1)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or (scale is not None and number < 1):
        if is_bytes:
            raise DataError(f"{where}{text}: expected a number of bytes above 0, such as 24GB, 500MB or 4.5e9.")
        raise DataError(
            f"{where}{text}: expected a number above 0, such as 0.5, 400k, 4.5e9 or 4.5B. With k, M, B "
            "or T it must come to 1 or more."
        )
    return round(number) if scale is not None or number.is_integer() else number


def _with_numbers(values: Any, where: str = "") -> Any:
    """The same entries with numbers for the texts that budgets are given by; whole ones are integers (`4.5e9`)."""
    if isinstance(values, list):
        return [_with_numbers(one, f"{where}{number}.") for number, one in enumerate(values, 1)]
    if not isinstance(values, dict):
        return values
    result = {}
    for name, value in values.items():
        if name not in BUDGETS:
            result[name] = _with_numbers(value, f"{where}{name}.")
        elif isinstance(value, str):
            result[name] = read_number(value, f"{where}{name}=", is_bytes=name in BYTE_BUDGETS)
        else:
            result[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return result


def apply_overrides(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `"a.b=value"` entries in nested mappings (the value is YAML); the input is not changed.

    Budgets may end in k, M, B or T, those of bytes in KB, MB, GB or TB, too (`read_number`).

    >>> apply_overrides({"prune": {"hidden_size": 64}}, ["prune.hidden_size=0.5", "controls=[random_init]"])
    {'prune': {'hidden_size': 0.5}, 'controls': ['random_init']}
    """
    result = copy.deepcopy(dict(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise DataError(f"--set {override!r}: expected key=value, for example --set prune.hidden_size=0.75")
        *parents, leaf = key.split(".")
        section: Any = result
        outer = None
        for parent in parents:
            parent, of_list = _key(section, parent, override), isinstance(section, list)
            of_corpora = (outer if of_list else parent) in ("train", "eval", "calibration")
            of_corpora |= parent == "prompts"  # a list of prompts holds texts
            outer = parent
            if isinstance(section, dict) and section.get(parent) is None:
                section[parent] = {}
            elif isinstance(section[parent], str) and of_corpora:
                section[parent] = {"source": section[parent]}
            elif isinstance(section[parent], str) and parent == "teacher":
                section[parent] = {"model": section[parent]}
            section = section[parent]
            if not isinstance(section, dict | list):
                name = parent + 1 if of_list else parent
                raise DataError(f"--set {override!r}: {name} is not a section of the recipe.")
        try:
            section[_key(section, leaf, override)] = read_yaml(text)
        except DataError as error:
            raise DataError(f"--set {override!r}: {error}") from error
    numbers: dict[str, Any] = _with_numbers(result)
    return numbers


def _key(section: Any, name: str, override: str) -> Any:
    """Key or index of an entry in its section. Entries of a list (rounds) count from 1, as their folders do.

    A key of digits is an integer, as YAML reads it (`max_memory.0`).
    """
    if not isinstance(section, list):
        return int(name) if name.isascii() and name.isdigit() else name
    if not name.isdigit() or not 1 <= int(name) <= len(section):
        raise DataError(f"--set {override!r}: {name} is none of the {len(section)} entries, which count from 1.")
    return int(name) - 1
