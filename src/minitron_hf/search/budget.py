"""Budgets of a search, and the shapes within them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..compat import build_from_config
from ..data import TokenRows
from ..data.images import placeholder_ids
from ..errors import PlanError
from ..evaluation.speed import measure_speed
from ..models import stored_dtype
from ..pruning.surgery import student_class
from ..sizes.shapes import COUNTED, Shape, counted_cost, memory_bytes, require_budgets
from ..sizes.student import student_config
from ..weights import input_device
from .record import SearchRecord

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: The budget that is measured on the machine of the search; the others follow from configs.
MEASURED = "max_seconds_per_token"


def given_budgets(
    max_parameters: float | None = None,
    max_active_parameters: float | None = None,
    max_memory_bytes: float | None = None,
    max_seconds_per_token: float | None = None,
) -> dict[str, float]:
    """The budgets that are given, by their names, the cheapest to check first.

    Raises:
        PlanError: if none is given.
    """
    budgets = {
        "max_parameters": max_parameters,
        "max_active_parameters": max_active_parameters,
        "max_memory_bytes": max_memory_bytes,
        "max_seconds_per_token": max_seconds_per_token,
    }
    given = {name: float(value) for name, value in budgets.items() if value is not None}
    if not given:
        raise PlanError(f"A search needs a budget. Give one or more of {', '.join(budgets)}.")
    return given


def shapes_within_budget(
    model: PreTrainedModel,
    shapes: Sequence[Shape],
    budgets: Mapping[str, float],
    tolerance: float,
    *,
    context_length: int,
    batch_size: int,
    record: SearchRecord,
) -> list[Shape]:
    """The shapes within all budgets that use one of them up to a tolerance; costs that take long stay in the record.

    Args:
        model: the teacher.
        shapes: all shapes.
        budgets: name of every budget → limit.
        tolerance: by how much of every budget a shape may stay below it.
        context_length: tokens of every sequence in the cache that counts as memory.
        batch_size: sequences in that cache.
        record: of the search.
    """
    dtype = stored_dtype(model.config) or model.dtype
    if torch.promote_types(dtype, model.dtype) != model.dtype:
        dtype = model.dtype  # the model was loaded in a narrower dtype
    bytes_of = memory_cost(model.config, context_length=context_length, batch_size=batch_size, dtype=dtype)

    def cost(name: str, shape: Shape) -> float:
        if name in COUNTED:
            return counted_cost(name, shape)
        costs = record.costs.setdefault(name, {})
        if shape.name not in costs:
            if name == "max_memory_bytes":
                costs[shape.name] = bytes_of(shape)
            else:
                costs[shape.name] = seconds_per_token(model, student_config(model.config, shape.request))
            record.save()
        return costs[shape.name]

    return require_budgets(shapes, budgets, tolerance, cost)


def memory_cost(
    config: PretrainedConfig, *, context_length: int, batch_size: int, dtype: torch.dtype
) -> Callable[[Shape], int]:
    """Return a function: shape → what `max_memory_bytes` counts of it, computed once for each shape.

    Args:
        config: the teacher's.
        context_length: tokens of every sequence in the cache.
        batch_size: sequences in it.
        dtype: of weights and cache.
    """
    known: dict[str, int] = {}

    def bytes_of(shape: Shape) -> int:
        if shape.name not in known:
            student = student_config(config, shape.request)
            known[shape.name] = memory_bytes(
                student, shape.num_parameters, context_length=context_length, batch_size=batch_size, dtype=dtype
            )
        return known[shape.name]

    return bytes_of


@torch.no_grad()
def seconds_per_token(model: PreTrainedModel, config: Any) -> float:
    """Median seconds to decode a token, measured with an untrained model of a shape."""
    with torch.device(input_device(model)):
        empty = build_from_config(student_class(model, config), config, model.dtype).eval()
    speed = measure_speed(
        {"model": empty}, _any_rows(config), prefill_length=64, decode_tokens=16, rounds=3, show_progress=False
    )
    return 1 / speed["model"]["decode_tokens_per_second"]["median"]


def _any_rows(config: Any) -> TokenRows:
    """Some tokens, none of which stands for an image."""
    ordinary = sorted(set(range(config.get_text_config().vocab_size)) - set(placeholder_ids(config)))
    return TokenRows((tuple(ordinary[index % len(ordinary)] for index in range(64)),), None)
