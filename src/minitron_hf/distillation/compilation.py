"""`torch_compile`: compiles layer by layer, where Transformers compiles whole models.

All layers of one shape share one compilation, so it takes seconds instead of minutes. The loss is not compiled: it
works on chunks of tokens, and their number differs from batch to batch.
"""

from __future__ import annotations

import logging
from typing import Any

from accelerate.utils import DynamoBackend
from torch import nn

from ..compat import offload_hooks
from .parallel import layers_of

logger = logging.getLogger(__name__)


def compile_layers(model: Any, role: str, *, backend: str | None, mode: str | None) -> int:
    """Compile the layers of a model in place. Names of tensors stay, and copies of the model are not compiled.

    Args:
        model: the model. One whose layers Accelerate fetches for each call is left as it is.
        role: what the warning calls it.
        backend: of `torch.compile`.
        mode: of `torch.compile`.

    Returns:
        The number of compiled layers.
    """
    layers = layers_of(model)
    if not layers:
        logger.warning(
            "torch_compile: the %s, a %s, does not say what its layers are (_no_split_modules). It runs uncompiled.",
            role,
            type(model).__name__,
        )
    if any(_is_offloaded(module) for layer in layers for module in layer.modules()):
        logger.warning(
            "torch_compile: the weights of the %s are moved to a device when they are used (teacher_offload, "
            "device_map). It runs uncompiled.",
            role,
        )
        return 0
    for layer in layers:
        layer.compile(backend=backend or "inductor", mode=mode)
    return len(layers)


def _is_offloaded(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in offload_hooks(module))


def leave_models_whole(accelerator: Any) -> None:
    """Keep Accelerate from compiling the models that it prepares as a whole."""
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
