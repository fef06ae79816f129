"""Muon on the matrices of a model and AdamW on the rest, as one optimizer that the Trainer can use and resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on hidden matrices, `torch.optim.AdamW` on embeddings, output head, norms and biases.

    Muon's updates are scaled to the root mean square of AdamW's (`adjust_lr_fn="match_rms_adamw"`), so that both take
    the same learning rate.

    Args:
        model: a Transformers causal language model.
        lr: peak learning rate of both.
        weight_decay: of both.
    """

    def __init__(self, model: Any, lr: float, weight_decay: float = 0.0) -> None:
        matrices, others = split_parameters(model)
        settings = {"lr": lr, "weight_decay": weight_decay}
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
            torch.optim.AdamW(others, **settings),
        )
        # The groups are those of the parts: a scheduler that sets a rate here sets it there.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def split_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable matrices that are neither embeddings nor output head; and all other trainable parameters."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    tables |= set() if head is None else {head.weight}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim == 2 and parameter not in tables]
    chosen = set(matrices)
    return matrices, [parameter for parameter in trainable if parameter not in chosen]
