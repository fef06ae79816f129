"""Output heads: the weight, bias, scale and soft cap that turn hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.images import holds_pixels
from ..errors import UnsupportedModelError
from ..families import ArchSpec, families, table_of
from ..families.rules import PLAIN_LOGITS, LogitRules
from ..scoring.logits import run_backbone


@dataclass(frozen=True)
class OutputHead:
    """Map from hidden states after the final norm to logits: `softcap(scale * (hidden @ weightᵀ + bias))`.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits.
        softcap: `c` of `c * tanh(logits / c)`, applied last; None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]


def finite_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A head's bias, of which -inf (tokens that cannot be, such as padding of the vocabulary) becomes finite.

    The probability stays 0, and 0 * (log p - log q) is 0 then, as it should be, not NaN.
    """
    lowest = max(-1e30, torch.finfo(dtype).min / 2)
    return None if bias is None else bias.detach().to(dtype).clamp(min=lowest)


def base_model_of(model: Any) -> Any:
    """The Transformers model inside a PEFT model; other models are returned as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _family(config: Any) -> ArchSpec | None:
    """The family table of a model's config, if there is one."""
    inner = config.get_text_config()
    family = table_of(config) or families().get(inner.model_type)
    return None if family is None else family.variant(inner)


def _logit_rules(config: Any) -> LogitRules:
    """Scale, soft cap and transformation that the stock class of a config applies to its logits.

    Without a family table none is assumed; `check_output_head` refuses a model that has one.
    """
    family = _family(config)
    return PLAIN_LOGITS if family is None else family.logits


def backbone_output(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Output of a causal language model without its output head.

    Args:
        model: a Transformers model.
        *args: arguments of its forward pass.
        **kwargs: keyword arguments of its forward pass.

    Returns:
        The backbone's output; its `last_hidden_state` is what the output head's weight multiplies.
    """
    backbone, config = model.base_model, model.config
    if backbone is model and holds_pixels(kwargs):
        # No part of the model but the whole reads images.
        output = run_backbone(model, {name: value for name, value in kwargs.items() if name != "use_cache"}).output
    else:
        if backbone is model and (family := _family(config)) is not None:
            # Llama 4's text model has another name for its base model than the attribute that holds it.
            backbone = model.get_submodule(family.layers_path.rpartition(".")[0])
        output = backbone(*args, **kwargs)
    if module := _logit_rules(config).transformed_by:
        output.last_hidden_state = model.get_submodule(module)(output.last_hidden_state)
    return output


def output_head(model: torch.nn.Module) -> OutputHead:
    """Describe the output head of a causal language model, logit scale and softcap included.

    Args:
        model: a Transformers causal language model, or a PEFT model around one.

    Raises:
        UnsupportedModelError: if the model has no linear output head.
    """
    base = base_model_of(model)
    layer = base.get_output_embeddings()
    if layer is None and (family := _family(base.config)) is not None and family.input_writers:
        # A whole language model inside a larger one, which does not pass its head on.
        layer = base.get_submodule(family.layers_path.partition(".")[0]).get_output_embeddings()
    weight = getattr(layer, "weight", None)
    # DeepSpeed ZeRO-3 leaves an empty tensor between uses, and its shape in `ds_shape`.
    if not isinstance(weight, Tensor) or len(getattr(weight, "ds_shape", weight.shape)) != 2:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no linear output head (get_output_embeddings() returned "
            f"{type(layer).__name__}); distillation needs a causal language model with one."
        )
    if not weight.is_floating_point() or "torchao" in type(weight.data).__module__:
        raise UnsupportedModelError(
            f"The output head of {type(base).__name__} is quantised ({type(weight).__name__}, {weight.dtype}), and "
            "the loss multiplies by its weight. Leave it out of the quantisation: modules_to_not_convert=['lm_head'], "
            "or llm_int8_skip_modules=['lm_head'] for bitsandbytes."
        )
    config = base.config.get_text_config()
    rules = _logit_rules(base.config)
    return OutputHead(weight, getattr(layer, "bias", None), rules.scale(config), rules.cap(config))


def head_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """Logits [..., V] of hidden states [..., H]; the fused loss computes the same chunk by chunk."""
    logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def gathered_head(head: OutputHead) -> OutputHead:
    """The head with parameters that are split over processes gathered, by FSDP2 or tensor parallelism.

    Under FSDP2 every process has other rows, and gradients are averaged. Under tensor parallelism all processes have
    the same rows and compute the same gradient of the whole head, of which each keeps its part.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    def gathered(value: DTensor) -> Tensor:
        names = value.device_mesh.mesh_dim_names or ("",) * value.device_mesh.ndim
        return value.full_tensor(grad_placements=[Replicate() if name == "tp" else Partial("avg") for name in names])

    whole = {
        name: gathered(value)
        for name, value in (("weight", head.weight), ("bias", head.bias))
        if isinstance(value, DTensor)
    }
    return OutputHead(whole.get("weight", head.weight), whole.get("bias", head.bias), head.scale, head.softcap)


@torch.no_grad()
def check_output_head(model: torch.nn.Module, *, role: str = "model") -> None:
    """Prove on a few tokens that `head_logits(backbone(tokens), output_head(model))` are the model's own logits.

    A family with another computation between the final norm and its logits would be distilled wrongly without any
    other sign.

    Args:
        model: the causal language model, before it is wrapped for distributed training.
        role: name of the model in the message.

    Raises:
        UnsupportedModelError: if they differ.
    """
    base = base_model_of(model)
    head = gathered_head(output_head(model))
    was_training = base.training
    base.eval()
    try:
        num_rows = base.get_input_embeddings().weight.shape[0]
        device = base.get_input_embeddings().weight.device
        tokens = (torch.arange(1, 5, device=device) % num_rows)[None]
        expected = base(input_ids=tokens, use_cache=False).logits
        hidden = backbone_output(base, input_ids=tokens, use_cache=False).last_hidden_state
        found = head_logits(hidden.to(head.weight.device), head)
    finally:
        base.train(was_training)
    # Half precision keeps 8 (bfloat16) to 11 bits, and the models round between the steps that we merge.
    # A bias of -inf excludes a token and says nothing about the size of the other logits.
    largest = expected.float().abs().nan_to_num(nan=0.0, posinf=0.0).max().clamp(min=1)
    tolerance = 16 * torch.finfo(found.dtype).eps * float(largest)
    in_float64 = found.cpu().double(), expected.cpu().double()  # MPS has no float64
    if found.shape != expected.shape or not torch.allclose(*in_float64, rtol=0, atol=tolerance):
        raise UnsupportedModelError(
            f"The {role} ({type(base).__name__}, model_type {base.config.get_text_config().model_type!r}) computes "
            "its logits from its last hidden states in a way this package does not know: its head, logit scale and "
            "softcap give other logits than the model itself. Distillation would learn from wrong probabilities."
        )
