"""Model families: one file each, a table and nothing else. A new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError, did_you_mean
from . import sound_wrappers, wrappers
from .refused_wrappers import REFUSED, WITHOUT_TABLE
from .spec import FIELD_OF_AXIS, PRUNER_FIELDS, VOCABULARY, VOCABULARY_FIELD, ArchSpec
from .tensors import named_tensors, text_config
from .wrapper import Wrapper

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
    "ROWS",
    "Wrapper",
    "families",
    "flat_families",
    "is_multimodal",
    "named_tensors",
    "register_family",
    "register_wrapper",
    "spec_for",
    "table_of",
    "text_config",
    "wrapped_families",
]


#: A row for every model around a language model.
ROWS = (*wrappers.ROWS, *sound_wrappers.ROWS)

#: Modules of this folder that hold no table.
NOT_TABLES = frozenset(
    {
        "axes",
        "base",
        "refused_wrappers",
        "releases",
        "rules",
        "runtimes",
        "sound_wrappers",
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
    flat_families.cache_clear()


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
    flat_families.cache_clear()


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


@cache
def flat_families() -> Mapping[str, ArchSpec]:
    """Tables of models around a language model whose config has no part for it, by `model_type`."""
    return {
        wrapper.model_type: wrapped_families()[wrapper.model_type, wrapper.text_types[0]]
        for wrapper in (*ROWS, *_REGISTERED_ROWS.values())
        if wrapper.is_flat
    }


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a model holds a language model beside others, so that it reads images or sound, too."""
    return text_config(config) is not config or config.model_type in flat_families()


def table_of(config: PretrainedConfig) -> ArchSpec | None:
    """The table of a config, without its variants; None if there is none."""
    model_type, inner = config.model_type, text_config(config)
    if inner is not config:
        return wrapped_families().get((model_type, inner.model_type))
    return flat_families().get(model_type) or families().get(model_type)


def spec_for(config: PretrainedConfig) -> ArchSpec:
    """The family table of a config.

    Raises:
        UnsupportedModelError: if the `model_type` has no table; the message lists those that have one.
    """
    model_type, inner = config.model_type, text_config(config)
    if (spec := table_of(config)) is not None:
        spec = spec.variant(inner)
        return spec.with_fixed_layers(config) if inner is not config else spec
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
