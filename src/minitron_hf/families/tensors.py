"""The parameters and saved buffers of a model, by name, and the config of its language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model inside a wrapper; a language model's own config as it is."""
    return getattr(config, "text_config", None) or config


def named_tensors(model: PreTrainedModel, *, tied: bool = False) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: parameters and saved buffers by name.

    Args:
        model: the model.
        tied: list tied parameters under each of their names, instead of once.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}
    return {**(parameters if tied else dict(own_parameters(model))), **buffers}


def own_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, tied ones once, although offloading gives each of them a placeholder of its own."""
    tied = getattr(model, "all_tied_weights_keys", {})
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        stored = tied.get(name, name)
        if not parameter.is_meta or stored not in seen:
            yield name, parameter
        seen.add(stored)


def is_quantised(model: Any) -> bool:
    """Whether the weights are stored in a packed form instead of as plain values.

    A model that was read from a GGUF file and dequantised calls itself quantised, and is not: its weights are plain.
    """
    if not getattr(model, "is_quantized", False):
        return False
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    packed = any(str(tensor.dtype) == "torch.uint8" for tensor in (*model.parameters(), *model.buffers()))
    return packed or getattr(method, "value", method) != "gguf"
