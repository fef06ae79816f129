"""The one probe of devices and of the dtypes that they compute fast."""

from __future__ import annotations

import torch


def compute_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """The dtype to compute in on a device: bfloat16 where its hardware has it, else float32.

    On a CPU without AVX512-BF16, AMX or ARM's BF16 emulated bfloat16 is 50 to 100 times slower than float32.

    Args:
        device: None means a CUDA device where there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if kind == "cuda":
        # Since PyTorch 2.4 the plain call counts emulation as support.
        supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        supported = _cpu_has_bfloat16()
    else:
        supported = False
    return torch.bfloat16 if supported else torch.float32


def _cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())
