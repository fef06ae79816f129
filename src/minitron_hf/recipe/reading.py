"""Reads the YAML of recipes and of `--set`."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import DataError


class _Loader(yaml.SafeLoader):
    """YAML that reads `1e-4` as the number everyone means (YAML 1.1, PyYAML's, wants `1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Parse YAML.

    >>> read_yaml("[1e-4, 2.5e3, 3, 0.5, text]")
    [0.0001, 2500.0, 3, 0.5, 'text']
    """
    return yaml.load(text, Loader=_Loader)


def apply_overrides(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `"a.b=value"` entries in nested mappings (the value is YAML); the input is not changed.

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
        for parent in parents:
            parent = _key(section, parent, override)
            if isinstance(section, dict) and section.get(parent) is None:
                section[parent] = {}
            elif isinstance(section[parent], str) and parent in ("train", "eval", "calibration"):
                section[parent] = {"source": section[parent]}
            section = section[parent]
            if not isinstance(section, dict | list):
                raise DataError(f"--set {override!r}: {parent} is not a section of the recipe.")
        section[_key(section, leaf, override)] = read_yaml(text)
    return result


def _key(section: Any, name: str, override: str) -> Any:
    """Where an entry is in its section; those of a list (rounds) are counted from 1, as their folders are."""
    if not isinstance(section, list):
        return name
    if not name.isdigit() or not 1 <= int(name) <= len(section):
        raise DataError(f"--set {override!r}: {name} is none of the {len(section)} entries, which count from 1.")
    return int(name) - 1
