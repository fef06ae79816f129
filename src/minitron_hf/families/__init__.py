"""Model families: one file each, a table and nothing else. A new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .base import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, named_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

__all__ = ["FIELD_OF_AXIS", "PRUNER_FIELDS", "ArchSpec", "families", "named_tensors", "spec_for"]


@cache
def families() -> Mapping[str, ArchSpec]:
    """All family tables by `model_type`, sorted."""
    specs = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            spec = importlib.import_module(f"{__name__}.{module.name}").SPEC
            specs[spec.model_type] = spec
    return dict(sorted(specs.items()))


def spec_for(config: PretrainedConfig) -> ArchSpec:
    """The family table of a config.

    Raises:
        UnsupportedModelError: if the `model_type` has no table; the message lists those that have one.
    """
    model_type = config.model_type
    try:
        return families()[model_type].variant(config)
    except KeyError:
        raise UnsupportedModelError(
            f"No family table for model_type '{model_type}'. Supported: {', '.join(families())}. "
            "CONTRIBUTING.md shows how to add a family (one file with its table)."
        ) from None
