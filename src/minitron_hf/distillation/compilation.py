"""`torch_compile`: compiles layer by layer, where Transformers compiles whole models.

All layers of one shape share one compilation, so it takes seconds instead of minutes. The loss is not compiled: it
works on chunks of tokens, and their number differs from batch to batch.
"""

from __future__ import annotations

import logging
from typing import Any

from accelerate.utils import DynamoBackend

from ..compat import layer_class_names

logger = logging.getLogger(__name__)


def compile_layers(model: Any, role: str, *, backend: str | None, mode: str | None) -> int:
    """Compile the layers of a model in place. Names of tensors stay, and copies of the model are not compiled.

    Args:
        model: the model; layers that Accelerate moves to a device for each call are left out.
        role: what the warning calls it.
        backend: of `torch.compile`.
        mode: of `torch.compile`.

    Returns:
        The number of compiled layers.
    """
    classes = layer_class_names(model)
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    if not layers:
        logger.warning(
            "torch_compile: the %s, a %s, does not say what its layers are (_no_split_modules). It runs uncompiled.",
            role,
            type(model).__name__,
        )
    placed = [layer for layer in layers if any(hasattr(module, "_hf_hook") for module in layer.modules())]
    if placed:
        logger.warning(
            "torch_compile: the weights of the %s are moved to a device when they are used (teacher_offload, "
            "device_map). It runs uncompiled.",
            role,
        )
        return 0
    for layer in layers:
        layer.compile(backend=backend or "inductor", mode=mode)
    return len(layers)


def leave_models_whole(accelerator: Any) -> None:
    """Keep Accelerate from compiling the models that it prepares as a whole."""
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
