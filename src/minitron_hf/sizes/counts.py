"""Counts the parameters of a model, and those of them that one token uses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..families import ArchSpec, is_multimodal, spec_for, text_config
from ..families.tensors import is_quantised, own_parameters
from ..models import count_parameters, empty_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def count_active_parameters(config_or_model: PretrainedConfig | PreTrainedModel) -> int:
    """Number of parameters that one token uses; tied ones count once.

    Of the routed experts of a layer, those that a token is routed to count. Everything else counts whole: embeddings,
    head, shared experts, and the other parts of a wrapper, as in the names of published mixtures of experts. Without
    experts this is `count_parameters`.

    Args:
        config_or_model: see `count_parameters`.

    Raises:
        UnsupportedModelError: if the family has no table, or see `empty_model`.
    """
    config: Any = getattr(config_or_model, "config", config_or_model)
    return active_parameters(spec_for(config), config, _own_shapes(config_or_model).items())


def count_language_model_parameters(config_or_model: PretrainedConfig | PreTrainedModel) -> int:
    """Number of parameters of the language model inside a larger model, its head included; tied ones count once.

    Of a language model alone this is `count_parameters`.

    Args:
        config_or_model: see `count_parameters`.

    Raises:
        UnsupportedModelError: if the family has no table, or see `empty_model`.
    """
    config: Any = getattr(config_or_model, "config", config_or_model)
    others = spec_for(config).unpruned_prefixes
    shapes = _own_shapes(config_or_model)
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith(others))


def _own_shapes(config_or_model: PretrainedConfig | PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, tied ones once."""
    config: Any = getattr(config_or_model, "config", config_or_model)
    counted: Any = (
        empty_model(config) if config is config_or_model or is_quantised(config_or_model) else config_or_model
    )
    return {name: tuple(parameter.shape) for name, parameter in own_parameters(counted)}


def parameter_counts(config_or_model: PretrainedConfig | PreTrainedModel) -> dict[str, int]:
    """All numbers of parameters: `num_parameters`, `num_active_parameters`, `num_parameters_without_embeddings`.

    A family without a table lacks the active ones. A model around a language model has
    `num_language_model_parameters`, too: the others are those of the whole model.
    """
    config: Any = getattr(config_or_model, "config", config_or_model)
    counts = {"num_parameters": count_parameters(config_or_model)}
    with contextlib.suppress(UnsupportedModelError):
        counts["num_active_parameters"] = count_active_parameters(config_or_model)
        if is_multimodal(config):
            counts["num_language_model_parameters"] = count_language_model_parameters(config_or_model)
    counts["num_parameters_without_embeddings"] = count_parameters(config_or_model, embeddings=False)
    return counts


def active_parameters(spec: ArchSpec, config: PretrainedConfig, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """The same for names and shapes of all tensors.

    Args:
        spec: the family.
        config: of the model that has them.
        tensors: names and shapes, tied tensors once.
    """
    return round(sum(math.prod(shape) * active_share(spec, config, name, shape) for name, shape in tensors))


def active_share(spec: ArchSpec, config: PretrainedConfig, name: str, shape: Sequence[int]) -> float:
    """Share of a tensor that one token uses; below 1 only for the weights of routed experts, which are stacked.

    Args:
        spec: the family.
        config: of the model that has the tensor.
        name: of the tensor.
        shape: of the tensor; the first dimension of a routed expert's is that of experts.
    """
    module, located = spec.hook_points.get("experts"), spec.locate(name)
    if module is None or located is None or not located[0].startswith(f"{module}."):
        return 1.0
    return min(1.0, _routed_experts(spec, config) / shape[0])


def _routed_experts(spec: ArchSpec, config: PretrainedConfig) -> float:
    """Number of routed experts that a token uses; the mean where it differs between layers."""
    text = text_config(config)
    fields = [field for axis, field in spec.least if axis == "experts" and field.isidentifier()]
    known = [value for field in (*fields, "num_experts_per_tok", "moe_topk") if (value := getattr(text, field, None))]
    if not known:
        return math.inf
    return known[0] if isinstance(known[0], int) else sum(known[0]) / len(known[0])
