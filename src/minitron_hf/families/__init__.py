"""Model families: one file each, a table and nothing else. A new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError, did_you_mean
from .refused_wrappers import REFUSED, WITHOUT_TABLE
from .spec import FIELD_OF_AXIS, PRUNER_FIELDS, VOCABULARY, VOCABULARY_FIELD, ArchSpec
from .tensors import named_tensors, text_config
from .wrapper import Wrapper
from .wrappers import ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

__all__ = [
    "FIELD_OF_AXIS",
    "PRUNER_FIELDS",
    "VOCABULARY",
    "VOCABULARY_FIELD",
    "WITHOUT_TABLE",
    "ArchSpec",
    "REFUSED",
    "Wrapper",
    "families",
    "named_tensors",
    "register_family",
    "register_wrapper",
    "spec_for",
    "text_config",
    "wrapped_families",
]


#: Modules of this folder that hold no table.
NOT_TABLES = frozenset(
    {
        "axes",
        "base",
        "refused_wrappers",
        "releases",
        "rules",
        "runtimes",
        "spec",
        "state_space",
        "tensors",
        "wrapper",
        "wrappers",
    }
)

#: Other packages offer tables under this group of entry points; each names an `ArchSpec`.
ENTRY_POINTS = "minitron_hf.families"

#: Tables that `register_family` was given in this process.
_REGISTERED: dict[str, ArchSpec] = {}

#: Rows that `register_wrapper` was given in this process.
_REGISTERED_ROWS: dict[str, Wrapper] = {}


def register_wrapper(wrapper: Wrapper) -> None:
    """Register a model that holds a language model, from outside this package, in the current process.

    Args:
        wrapper: its row; the language models that it names have family tables.

    Raises:
        UnsupportedModelError: if its `model_type` has another row already.
    """
    rows = {row.model_type: row for row in (*ROWS, *_REGISTERED_ROWS.values())}
    if rows.get(wrapper.model_type, wrapper) != wrapper:
        raise UnsupportedModelError(
            f"There is a row for model_type {wrapper.model_type!r} already. Give the model type another name."
        )
    _REGISTERED_ROWS[wrapper.model_type] = wrapper
    wrapped_families.cache_clear()


def register_family(spec: ArchSpec) -> None:
    """Register a family table from outside this package.

    This registers the table in the current process. To use it on the command line too, offer it as an entry point of
    the group `minitron_hf.families` in your package.

    Args:
        spec: the table, made of the parts in `minitron_hf.families.base`.

    Raises:
        UnsupportedModelError: if its `model_type` has another table already.
    """
    if families().get(spec.model_type, spec) != spec:
        raise UnsupportedModelError(
            f"There is a family table for model_type {spec.model_type!r} already. Give the model type another name."
        )
    _REGISTERED[spec.model_type] = spec
    families.cache_clear()
    wrapped_families.cache_clear()


@cache
def families() -> Mapping[str, ArchSpec]:
    """All family tables by `model_type`, sorted: those of this package, of entry points, and registered ones."""
    specs = dict(_REGISTERED)
    for entry in entry_points(group=ENTRY_POINTS):
        spec = entry.load()
        specs[spec.model_type] = spec
    for module in pkgutil.iter_modules(__path__):
        if module.name not in NOT_TABLES:
            spec = importlib.import_module(f"{__name__}.{module.name}").SPEC
            specs[spec.model_type] = spec
    return dict(sorted(specs.items()))


@cache
def wrapped_families() -> Mapping[tuple[str, str], ArchSpec]:
    """Tables of models that hold a family's language model, by both `model_type`s: the outer and the inner one."""
    return {
        (wrapper.model_type, text_type): wrapper.around(families()[text_type])
        for wrapper in (*ROWS, *_REGISTERED_ROWS.values())
        for text_type in wrapper.text_types
    }


def spec_for(config: PretrainedConfig) -> ArchSpec:
    """The family table of a config.

    Raises:
        UnsupportedModelError: if the `model_type` has no table; the message lists those that have one.
    """
    model_type, inner = config.model_type, text_config(config)
    if inner is config and model_type in families():
        return families()[model_type].variant(config)
    if inner is not config and (model_type, inner.model_type) in wrapped_families():
        return wrapped_families()[model_type, inner.model_type].variant(inner).with_fixed_layers(config)
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"'{model_type}' models cannot be pruned: {REFUSED[model_type]}. docs/families.md lists those that can."
        )
    if inner is not config:
        held = [text for outer, text in wrapped_families() if outer == model_type]
        known = held or sorted({outer for outer, _ in wrapped_families()})
        what = f"'{model_type}' around" if held else "Supported:"
        raise UnsupportedModelError(
            f"No family table for model_type '{model_type}' around '{inner.model_type}'. {what} {', '.join(known)}"
            f"{' are supported' if held else ''}. Prune the language model by itself, or add a row to "
            "minitron_hf/families/wrappers.py."
        )
    raise UnsupportedModelError(
        f"No family table for model_type '{model_type}'.{did_you_mean(model_type, families())} "
        f"Supported: {', '.join(families())}. "
        "docs/guides/add-a-family.md shows how to add a table, in this package or from outside (register_family)."
    )
