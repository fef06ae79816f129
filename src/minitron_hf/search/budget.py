"""Budgets of a search, and the shapes within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..compat import build_from_config
from ..data import TokenRows
from ..errors import PlanError
from ..evaluation.speed import measure_speed
from ..models import stored_dtype
from ..sizes.shapes import Shape, memory_bytes, require_budget
from ..sizes.student import student_config
from ..weights import input_device
from .record import SearchRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def single_budget(
    max_parameters: float | None = None,
    max_memory_bytes: float | None = None,
    maxseconds_per_token: float | None = None,
) -> dict[str, float]:
    """The one budget that is given, by its name.

    Raises:
        PlanError: if several are given, or none.
    """
    budgets = {"max_parameters": max_parameters, "max_memory_bytes": max_memory_bytes}
    budgets["maxseconds_per_token"] = maxseconds_per_token
    given = {name: float(value) for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise PlanError(f"Give exactly one budget of {', '.join(budgets)}; got {', '.join(given) or 'none'}.")
    return given


def shapes_within_budget(
    model: PreTrainedModel,
    shapes: Sequence[Shape],
    budget: Mapping[str, float],
    tolerance: float,
    context_length: int,
    record: SearchRecord,
) -> list[Shape]:
    """The shapes that use a budget within a tolerance; what was measured for it stays in the record.

    Args:
        model: the teacher.
        shapes: all shapes.
        budget: name of the budget → limit.
        tolerance: by how much of the budget a shape may stay below it.
        context_length: tokens in the cache that counts as memory.
        record: of the search.
    """
    [(name, limit)] = budget.items()
    costs = record.costs
    dtype = stored_dtype(model.config) or model.dtype
    if torch.promote_types(dtype, model.dtype) != model.dtype:
        dtype = model.dtype  # the model was loaded in a narrower dtype

    def cost(shape: Shape) -> float:
        if name == "max_parameters":
            return shape.num_parameters
        if shape.name not in costs:
            config = student_config(model.config, shape.request)
            if name == "max_memory_bytes":
                costs[shape.name] = memory_bytes(
                    config, shape.num_parameters, context_length=context_length, batch_size=1, dtype=dtype
                )
            else:
                costs[shape.name] = seconds_per_token(model, config)
            record.save()
        return costs[shape.name]

    return require_budget(shapes, name, limit, tolerance, cost)


@torch.no_grad()
def seconds_per_token(model: PreTrainedModel, config: Any) -> float:
    """Median seconds to decode a token, measured with an untrained model of a shape."""
    with torch.device(input_device(model)):
        empty = build_from_config(type(model), config, model.dtype).eval()
    speed = measure_speed(
        {"model": empty}, _any_rows(config), prefill_length=64, decode_tokens=16, rounds=3, show_progress=False
    )
    return 1 / speed["model"]["decode_tokens_per_second"]["median"]


def _any_rows(config: Any) -> TokenRows:
    return TokenRows((tuple(index % config.vocab_size for index in range(64)),), None)
