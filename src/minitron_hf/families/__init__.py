"""Model families: one file each, a table and nothing else. A new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError, did_you_mean
from .spec import FIELD_OF_AXIS, PRUNER_FIELDS, VOCABULARY, VOCABULARY_FIELD, ArchSpec
from .tensors import named_tensors, text_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

__all__ = [
    "FIELD_OF_AXIS",
    "PRUNER_FIELDS",
    "VOCABULARY",
    "VOCABULARY_FIELD",
    "ArchSpec",
    "families",
    "named_tensors",
    "register_family",
    "spec_for",
    "text_config",
    "wrapped_families",
]


#: Modules of this folder that hold no table.
NOT_TABLES = frozenset({"axes", "base", "releases", "rules", "runtimes", "spec", "state_space", "tensors"})

#: Other packages offer tables under this group of entry points; each names an `ArchSpec`.
ENTRY_POINTS = "minitron_hf.families"

#: Tables that `register_family` was given in this process.
_REGISTERED: dict[str, ArchSpec] = {}


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
        (wrapper.model_type, model_type): spec.inside(wrapper)
        for model_type, spec in families().items()
        for wrapper in spec.wrappers
    }


def spec_for(config: PretrainedConfig) -> ArchSpec:
    """The family table of a config.

    Raises:
        UnsupportedModelError: if the `model_type` has no table; the message lists those that have one.
    """
    model_type = config.model_type
    inner = text_config(config)
    try:
        if inner is not config:
            return wrapped_families()[model_type, inner.model_type].variant(inner)
        return families()[model_type].variant(config)
    except KeyError:
        if inner is not config:
            known = sorted(f"{outer} ({text})" for outer, text in wrapped_families())
            raise UnsupportedModelError(
                f"No family table for model_type '{model_type}' around '{inner.model_type}'. Supported: "
                f"{', '.join(known)}. Prune the language model by itself, or add a wrapper to its family's table."
            ) from None
        raise UnsupportedModelError(
            f"No family table for model_type '{model_type}'.{did_you_mean(model_type, families())} "
            f"Supported: {', '.join(families())}. "
            "docs/guides/add-a-family.md shows how to add a table, in this package or from outside (register_family)."
        ) from None
