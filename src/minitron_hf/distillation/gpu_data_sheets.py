"""Published memory, speed and bandwidth of accelerators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Data sheet of one device.

    Attributes:
        memory: bytes.
        flops: dense bfloat16 products with float32 sums, FLOP/s. None: unknown, and no speed is estimated.
        bandwidth: to the other devices of the same machine, bytes/s in one direction.
        type: as PyTorch names it. On a CPU everything is in float32, and one process trains.
    """

    memory: float
    flops: float | None = None
    bandwidth: float | None = None
    type: str = "cuda"


#: NVIDIA's data sheets; where they print FLOP/s with sparsity, half of it.
DEVICES: Mapping[str, Device] = {
    "h200": Device(141e9, 989e12, 450e9),
    "h100": Device(80e9, 989e12, 450e9),
    "a100": Device(80e9, 312e12, 300e9),
    "a100-40gb": Device(40e9, 312e12, 300e9),
    "l40s": Device(48e9, 362e12, 32e9),
    "l4": Device(24e9, 121e12, 32e9),
}
