"""Chooses the device and the dtype of models, in one place for the whole package.

Device: an accelerator where there is one, else the CPU. Dtype: that of the stored weights, so that loading rounds
nothing; or float32, which holds every half-precision number, if the hardware is slow in the stored dtype.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from .errors import MESSAGES, DataError, MismatchError

#: Names of dtypes in `TrainingArguments` and on command lines.
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by its name in torch, or by one of `SHORT_NAMES`.

    Raises:
        DataError: if it is no dtype that models are stored and computed in.

    >>> as_dtype("bfloat16")
    torch.bfloat16
    """
    plain = str(name).removeprefix("torch.")
    found = getattr(torch, SHORT_NAMES.get(plain, plain), None)
    if found not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise DataError(f"dtype={name!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def one_dtype(dtype: str | torch.dtype | None, kwargs: dict[str, Any]) -> Any:
    """The dtype in keyword arguments of `from_pretrained`, from which the old name `torch_dtype` is removed.

    Returns:
        A dtype, `"auto"` (the checkpoint's), or None where neither name is given.

    Raises:
        DataError: if there is no such dtype.
        MismatchError: if the two names have different values.
    """
    given = [
        name if name == "auto" else as_dtype(name)
        for name in (dtype, kwargs.pop("torch_dtype", None))
        if name is not None
    ]
    if len(set(given)) > 1:
        raise MismatchError(
            f"dtype={given[0]} and torch_dtype={given[1]} name the same argument. Pass dtype alone, with one value."
        )
    return given[0] if given else None


def as_device(name: str | torch.device) -> torch.device:
    """A device of this machine by its name.

    Raises:
        DataError: if there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DataError(
            f"device={name!r}: expected 'cpu', 'cuda', 'cuda:1' or another name of a torch device."
        ) from None
    if device.type in ("cpu", "meta"):
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 0
    if (device.index or 0) >= count:
        here = f"{count} of its kind" if count else "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise DataError(f"device={str(name)!r}: there is no such device here, only {here}. Choose one of those.")
    return device


def is_launched() -> bool:
    """Whether a launcher has started this process.

    Containers and job managers may set rank 0 of 1 for a single process. It counts as launched only if this package
    started it.
    """
    if "RANK" not in os.environ:
        return False
    return MESSAGES in os.environ or os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")


def training_device(use_cpu: bool = False) -> torch.device:
    """The device that a trainer uses: the CPU if it was asked for, or if there is no accelerator."""
    asked = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t")
    accelerator = None if asked else torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many tokens on a device: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU has when a call returns."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def default_device() -> torch.device:
    """The device of models if none is given.

    With several processes it is the CPU, from which the trainer places or shards the model.
    """
    return torch.device("cpu") if is_launched() else training_device()


def process_device() -> torch.device:
    """The device on which this process computes by itself, without a trainer that places its models.

    Of several processes each has the accelerator of its rank on the machine.
    """
    device = training_device()
    if device.type in ("cpu", "mps") or not is_launched():
        return device
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(device.type, rank % torch.accelerator.device_count())  # a process may see its own alone


def free_memory(device: str | torch.device) -> int:
    """Bytes that are free on a device now; on a CPU, what the system could give without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def has_fast_bf16(device: str | torch.device) -> bool:
    """Whether the hardware has units for products of bfloat16 matrices, instead of emulating them.

    On a CPU without AVX512-BF16, AMX or ARM's BF16 emulated bfloat16 is 50 to 100 times slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return _cpu_has_bf16()
    if kind == "cuda":
        # Since PyTorch 2.4 the plain call counts emulation as support.
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind in ("meta", "mps"):
        return False
    from transformers.utils import is_torch_bf16_gpu_available

    return is_torch_bf16_gpu_available()


def is_fast(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether the hardware has units for a dtype, instead of emulating it."""
    if dtype == torch.bfloat16:
        return has_fast_bf16(device)
    return dtype != torch.float16 or torch.device(device).type not in ("cpu", "meta")


def _cpu_has_bf16() -> bool:
    """Probe the CPU; tests replace this function to simulate another processor."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
