"""Model families: one file each, a table and nothing else. A new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .spec import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec
from .tensors import named_tensors, text_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

__all__ = [
    "FIELD_OF_AXIS",
    "PRUNER_FIELDS",
    "ArchSpec",
    "families",
    "named_tensors",
    "spec_for",
    "text_config",
    "wrapped_families",
]


#: Modules of this folder that hold no table.
NOT_TABLES = frozenset({"axes", "base", "spec", "state_space", "tensors"})


@cache
def families() -> Mapping[str, ArchSpec]:
    """All family tables by `model_type`, sorted."""
    specs = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in NOT_TABLES:
            spec = importlib.import_module(f"{__name__}.{module.name}").SPEC
            specs[spec.model_type] = spec
    return dict(sorted(specs.items()))


@cache
def wrapped_families() -> Mapping[tuple[str, str], ArchSpec]:
    """The tables of models that hold a family's language model, by their `model_type` and that of what they hold."""
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
            f"No family table for model_type '{model_type}'. Supported: {', '.join(families())}. "
            "CONTRIBUTING.md shows how to add a family (one file with its table)."
        ) from None
