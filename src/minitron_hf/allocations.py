"""Counts the operations and the bytes of tensors of a piece of code, on any device and also without values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .compat import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    TorchDispatchMode,
    grouped_products,
    operator_of,
    tree_leaves,
)


class AllocationCounter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of living storages whenever an operation makes a new one."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.flops = 0
        self.moments: list[int] = []
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (flops := _FLOPS.get(operator_of(func))) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
                self.moments.append(self.live)
        return output


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _grouped_flops(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * rows.numel() * weights.shape[-1]


def _grouped_backward_flops(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _grouped_flops(rows, weights)


#: FLOPs of operations; PyTorch's table lacks grouped products and attention on a CPU.
_FLOPS: Mapping[Any, Any] = {
    **flop_registry,
    **dict(zip(grouped_products(), (_grouped_flops, _grouped_backward_flops))),
    CPU_ATTENTION: _attention_flops,
    CPU_ATTENTION_BACKWARD: _attention_backward_flops,
}
