"""Loads models for inference: on one device, in a dtype that is fast there, in evaluation mode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MismatchError
from ..models import load_for_compute

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_for_inference(
    model_or_path: PreTrainedModel | str | os.PathLike[str], dtype: str | torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """Load a model onto a device, by default in its stored dtype where the hardware is fast in that, else in float32.

    A model object is returned as it is.
    """
    return load_for_compute(model_or_path, dtype=dtype, device=device)


def common_device(models: Mapping[str, Any], device: str | torch.device | None) -> torch.device:
    """The device of the model objects; for paths alone the one asked for, else CUDA if there is one."""
    found = {name: model.device for name, model in models.items() if not isinstance(model, str | os.PathLike)}
    if device is not None:
        wanted = torch.device(device)
        found["device="] = torch.device("cuda", torch.cuda.current_device()) if str(wanted) == "cuda" else wanted
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {where}" for name, where in found.items())
        raise MismatchError(f"The models are on different devices ({listed}). Move them to one device.")
    if found:
        return next(iter(found.values()))
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
