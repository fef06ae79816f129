"""Masks the dropped experts in the router of one layer of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UnsupportedModelError
from .masking import Masking, excluding_experts, swap_tensors
from .plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def excluded_experts(model: PreTrainedModel, plan: PruningPlan, layer: int) -> Iterator[None]:
    """Let the router of a layer choose among the experts that a plan keeps, for the duration of the context.

    Args:
        model: the teacher.
        plan: made for it.
        layer: index of a layer that stays.

    Raises:
        UnsupportedModelError: if the router is offloaded; on leaving, if scores of experts were to be masked and none
            were seen.
    """
    masking, replacements = Masking(model, plan), dict[str, Tensor]()
    routers: list[tuple[Tensor, Tensor]] = []
    for name, (pattern, own) in masking.located.items():
        if own == layer and masking.is_of_router(pattern, layer):
            if masking.tensors[name].is_meta:
                raise UnsupportedModelError(
                    f"{name} is offloaded, and repair masks the experts that are cut in the router. Load the teacher "
                    "into memory, or prune its folder with prune_checkpoint."
                )
            routers += masking.mask_router(name, pattern, layer, replacements)
    with ExitStack() as stack:
        swap_tensors(f"{masking.spec.layers_path}.{layer}", masking.modules, replacements, stack)
        with excluding_experts(model, routers, "repair"):
            yield
