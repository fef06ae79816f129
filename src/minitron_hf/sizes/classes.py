"""The stock classes that can hold a student: the teacher's, or another that computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..families import ArchSpec, families

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _equivalent_classes(spec: ArchSpec, config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """Other families whose stock classes hold this model: model type → changes to the config."""
    return {
        model_type: changes
        for model_type, needed, changes in spec.equivalent_classes
        if all(getattr(config, name, None) == value for name, value in needed.items())
    }


def _spec_of_student(spec: ArchSpec, config: PretrainedConfig, model_type: str | None) -> ArchSpec:
    """The table of the stock classes that are to hold the student."""
    if model_type in (None, spec.model_type):
        return spec
    if model_type not in (possible := _equivalent_classes(spec, config)):
        others = f"Only those of {' or '.join(map(repr, possible))} do" if possible else "No others do"
        raise PlanError(
            f"model_type={model_type!r}: its stock classes do not hold this '{spec.model_type}' model unchanged. "
            f"{others}. Leave model_type out to keep the teacher's."
        )
    return families()[str(model_type)]


def config_class(model_type: str) -> type[PretrainedConfig]:
    """The stock config class of a model type."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]
