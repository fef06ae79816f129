"""Lets a model whose tensors are on disk compute, with the tensors of few layers in memory at a time.

The model is one of `open_checkpoint`, or such a model in another dtype or basis. A model in memory is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compat import build_from_config, no_init_weights
from ..families import named_tensors, spec_for
from ..hardware import is_fast
from ..weights import set_tensor, tensor_values
from .stored_tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_stored(model: nn.Module) -> bool:
    """Whether some of a model's tensors are on disk."""
    return any(isinstance(tensor, LazyTensor) for tensor in model.parameters())


def in_memory(tensor: Tensor) -> Tensor:
    """A tensor with its numbers in memory."""
    return tensor.read() if isinstance(tensor, LazyTensor) else tensor


def read_tensor(model: PreTrainedModel, name: str) -> Tensor:
    """`tensor_values`, read from disk where the tensor lies there."""
    return in_memory(tensor_values(model, name).detach())


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose tensors are on disk, with them in another dtype: the same as `model.to(dtype)` of a loaded one."""
    with no_init_weights():
        other: PreTrainedModel = build_from_config(type(model), model.config, dtype)
    for name in named_tensors(model):
        values = tensor_values(model, name).detach()
        set_tensor(other, name, values.to(dtype) if values.is_floating_point() else values.clone())
    other.tie_weights()
    other.generation_config = model.generation_config
    return other.eval()


def for_compute(
    model: PreTrainedModel, device: str | torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model whose tensors are on disk, in the dtype in which `load_for_compute` would load it.

    Args:
        model: as it is stored.
        device: where it computes.
        dtype: None: as stored, or float32 where the device is slow in that.
    """
    if dtype is None:
        dtype = model.dtype if is_fast(model.dtype, device) else torch.float32
    return model if dtype == model.dtype else in_dtype(model, dtype)


@contextmanager
def tensors_in_memory(
    modules: Iterable[nn.Module], device: str | torch.device | None = None, *, recurse: bool = True
) -> Iterator[None]:
    """Read the tensors of some modules that are on disk, for the duration of the context.

    Args:
        modules: any modules.
        device: for all of their tensors; None: those that are read go to the CPU, and others stay where they are.
        recurse: whether to read the tensors of the modules in them, too.
    """
    with ExitStack() as stack:
        for owner in (part for module in modules for part in (module.modules() if recurse else [module])):
            parameters = dict(owner.named_parameters(recurse=False))
            for leaf, tensor in (*parameters.items(), *owner.named_buffers(recurse=False)):
                values = in_memory(tensor.detach()).to(tensor.device if device is None else device)
                if values.device == tensor.device and not isinstance(tensor, LazyTensor):
                    continue
                stack.callback(setattr, owner, leaf, tensor)
                setattr(owner, leaf, nn.Parameter(values, requires_grad=False) if leaf in parameters else values)
        yield


@contextmanager
def computing(
    model: PreTrainedModel, device: str | torch.device | None = None, *, layers: bool = True
) -> Iterator[None]:
    """Let a model compute, if its tensors are on disk, for the duration of the context.

    The tensors of a layer are read for every call of it, those of the input embeddings at once, and all others before
    their module is called first.

    Args:
        model: any model.
        device: for the tensors; None: the CPU.
        layers: whether layers are read; otherwise the caller does so (`tensors_in_memory`).
    """
    if not is_stored(model):
        yield
        return
    blocks: list[Any] = list(model.get_submodule(spec_for(model.config).layers_path).children())
    inside = {part for block in blocks for part in block.modules()}
    read: dict[nn.Module, ExitStack] = {}
    with ExitStack() as stack:

        def once(module: nn.Module, _: Any) -> None:
            if module not in read:
                read[module] = stack
                stack.enter_context(tensors_in_memory([module], device, recurse=False))

        def before(block: nn.Module, _: Any) -> None:
            if block not in read:
                read[block] = ExitStack()
                read[block].enter_context(tensors_in_memory([block], device))

        def after(block: nn.Module, _: Any, __: Any) -> None:
            if block in read:
                read.pop(block).close()

        embeddings: Any = model.get_input_embeddings()
        stack.enter_context(tensors_in_memory([embeddings], device))
        for module in model.modules():
            if module not in inside:
                stack.callback(module.register_forward_pre_hook(once).remove)
        for block in blocks if layers else ():
            stack.callback(block.register_forward_pre_hook(before).remove)
            stack.callback(block.register_forward_hook(after, always_call=True).remove)
        yield
