"""Products of hidden states with an output head, and their scale, soft cap and temperature, in given memory."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_logits(z: Tensor, scale: float, softcap: float | None, temperature: float, out: Tensor) -> Tensor:
    """`softcap(scale * z) / T` in the dtype of `out`; `z` itself if that changes nothing, else written to `out`."""
    if softcap is not None:
        return torch.mul(z.to(out.dtype), scale / softcap, out=out).tanh_().mul_(softcap / temperature)
    if scale == temperature:
        return z if z.dtype == out.dtype else out.copy_(z)
    return torch.mul(z.to(out.dtype), scale / temperature, out=out)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """`hidden @ weightᵀ + bias` in the memory of `buffer` if its shape fits, else in new memory."""
    shape = (hidden.shape[0], weight.shape[0])
    out = buffer[: shape[0]] if buffer.dim() == 2 and buffer.shape[0] >= shape[0] else hidden.new_empty(shape)
    torch.mm(hidden, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def compute_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """Precision of the matrix products: autocast's, if it is on, else the weight's."""
    if torch.is_autocast_enabled(device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return weight.dtype
