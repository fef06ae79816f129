"""Checkpoints of a student whose tensors are split over processes (tensor parallelism): they hold whole tensors.

The weights of such a checkpoint are a stock student. The state of the optimizer is gathered, too, so that a run may
resume in any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..models import load_model


class SplitCheckpointMixin(Trainer):
    """Mixin for a trainer that saves whole tensors, and splits them when it resumes; one process changes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs["args"]
        only_model = given.save_only_model
        if getattr(kwargs["model"], "is_distributed_loading_by_transformers", False):
            given.save_only_model = True  # the stock class refuses states of the optimizer, which it does not gather
        try:
            super().__init__(*args, **kwargs)
        finally:
            given.save_only_model = only_model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.get_tp_size() == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        whole = gathered(optimizer.state_dict())  # in all processes, of which one writes
        optimizer.state_dict = lambda: whole
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del optimizer.state_dict

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.get_tp_size() == 1:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target: Any = self.model if model is None else model
        own, whole = target.state_dict(), load_model(resume_from_checkpoint).state_dict()
        target.load_state_dict({name: split_like(value, own[name]) for name, value in whole.items()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.get_tp_size() == 1:
            return
        optimizer: Any = self.optimizer
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = split_like(value, parameter)


def gathered(state: Any) -> Any:
    """The same nested dicts and lists, with whole tensors; to be called in all processes.

    Args:
        state: of an optimizer.
    """
    if isinstance(state, Mapping):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, split over the processes as another one is; to be called in all of them.

    Args:
        value: the whole tensor.
        like: a tensor of this shape; one that is not split leaves `value` as it is.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
