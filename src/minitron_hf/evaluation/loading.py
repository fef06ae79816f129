"""Loads models for inference: on one device, in a dtype whose rounding is small."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ..data import TokenRows
from ..data.images import holds_images
from ..errors import DataError, HubError, MismatchError
from ..hardware import as_device, process_device
from ..models import load_for_compute, load_processor, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_for_inference(
    model_or_path: PreTrainedModel | str | os.PathLike[str], dtype: str | torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """Load a model onto a device, by default in its stored dtype, or in float32 where the hardware is slow in that.

    A model object keeps the dtype and device that it has.
    """
    return load_for_compute(model_or_path, dtype=dtype, device=device)


def load_processing_class(processing_class: Any, data: Any) -> Any:
    """A tokenizer, for data with images a processor, of a path or Hub id; an object is returned as it is."""
    if not isinstance(processing_class, str | os.PathLike):
        return processing_class
    return load_processor(processing_class) if holds_images(data) else load_tokenizer(processing_class)


def load_reader(source: Any, data: Any) -> Any:
    """The tokenizer or processor in a model's folder; None if there is none, and data of token ids need none.

    Raises:
        HubError: if it cannot be read, and the data are texts or conversations.
        DataError: if there is none, and they are.
    """
    try:
        return load_processing_class(source, data)
    except (DataError, HubError):
        if _holds_text(data):
            raise
        return None


def _holds_text(data: Any) -> bool:
    columns = getattr(data, "column_names", None) or ()
    if data is None or isinstance(data, TokenRows | DataLoader) or "input_ids" in columns:
        return False
    first = data[0] if isinstance(data, list | tuple) and data else None
    return not isinstance(first, list | tuple) or not all(isinstance(token, int) for token in first)


@contextlib.contextmanager
def in_float32(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Compute models in float32 for the duration of the context; quantised models keep their dtype."""
    tensors = [
        (tensor, tensor.dtype)
        for model in models
        if not getattr(model, "is_quantized", False)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    try:
        for tensor, _ in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)  # exact: the values came from this dtype


def common_device(models: Mapping[str, Any], device: str | torch.device | None) -> torch.device:
    """The device of the model objects; for paths alone the given device, else `hardware.process_device`.

    Raises:
        MismatchError: if the models are on several devices.
    """
    found = {name: model.device for name, model in models.items() if not isinstance(model, str | os.PathLike)}
    if device is not None:
        found["device="] = _indexed(as_device(device))
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {where}" for name, where in found.items())
        raise MismatchError(f"The models are on different devices ({listed}). Move them to one device.")
    return next(iter(found.values())) if found else _indexed(process_device())


def _indexed(device: torch.device) -> torch.device:
    """The device with its index, as models name theirs."""
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())
