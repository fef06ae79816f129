"""Runs teacher and student inside the wrappers of autocast, DDP, FSDP2, DeepSpeed and PEFT."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.utils import is_peft_model
from torch import Tensor

from ..compat import apply_to_tensors, fsdp2_wrap_policy, gathered_parameters, layer_class_names
from ..errors import UnsupportedModelError
from ..families.tensors import is_quantised
from ..losses.fused import distillation_loss
from ..losses.heads import backbone_output, base_model_of, gathered_head, output_head
from ..losses.signals import DenseSignal, TeacherSignal
from ..models import empty_model
from .adapters import with_adapters
from .intermediate import PROJECTION, StatePair, needed_states, student_distances


@dataclass(frozen=True)
class LossRequest:
    """Arguments of the loss, which the student's forward pass computes inside the wrapped model, where its head is."""

    teacher: TeacherSignal
    positions: Tensor
    targets: Tensor
    options: Mapping[str, Any]
    pairs: tuple[StatePair, ...] = ()
    teacher_states: tuple[Tensor, ...] = ()


def distilling_forward(model_class: Any) -> Callable[..., Any]:
    """The stock forward pass, with an extra argument `distillation` that makes it return losses instead of logits.

    The loss is computed inside the forward pass so that everything which wraps the model sees it: autocast, DDP's
    gradient hooks, FSDP's and DeepSpeed's gathering of the head. It returns a dict of tensors, which all of them can
    walk through. Holds no reference to a model, so that a copy of the model is a working copy.
    """
    stock = model_class.forward

    @functools.wraps(stock)  # `generate` reads the signature
    def forward(self: Any, *args: Any, distillation: LossRequest | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return stock(self, *args, **kwargs)
        wanted = needed_states(distillation.pairs, "student")
        extra = {"output_hidden_states": wanted} if wanted else {}
        # PEFT hands on every argument of its own forward pass, most of them as None.
        given = {name: value for name, value in kwargs.items() if value is not None}
        output = backbone_output(self, *args, **{**given, **extra, "use_cache": False})
        head = output_head(self)
        h_ND = output.last_hidden_state.flatten(0, 1).index_select(0, distillation.positions).to(head.weight.device)
        teacher = distillation.teacher
        heads = [head, teacher.head] if isinstance(teacher, DenseSignal) else [head]
        with gathered_parameters(*(tensor for each in heads for tensor in (each.weight, each.bias))):
            losses = distillation_loss(
                h_ND, gathered_head(head), teacher, distillation.targets, **distillation.options
            )
        found = {name: getattr(losses, name) for name in ("total", "divergence", "kl", "ce", "agreement", "entropy")}
        found["mean_token_accuracy"] = losses.accuracy
        if distillation.pairs:
            found |= student_distances(
                distillation.pairs,
                output.hidden_states,
                distillation.teacher_states,
                distillation.positions,
                getattr(self, PROJECTION, None),
            )
        return found

    return forward


def gathered_projection(projection: Any) -> Tensor | None:
    """The weight of the projection, gathered if it is sharded; to be called on all processes."""
    if projection is None:
        return None
    from torch.distributed.tensor import DTensor

    weight = projection.weight
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    with gathered_parameters(weight):
        return weight.detach().clone()


def is_split(model: Any) -> bool:
    """Whether parameters of a model are split over processes (FSDP2, tensor parallelism)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def refuse_unsharded(trainer: Any) -> None:
    """Refuse to evaluate a student that FSDP2 has not sharded yet: Accelerate shards it with its optimizer.

    Raises:
        UnsupportedModelError: saying when to evaluate.
    """
    if trainer.accelerator.is_fsdp2 and not is_split(trainer.model):
        raise UnsupportedModelError(
            "Evaluation before training: FSDP2 shards the student together with its optimizer, when training begins. "
            "Call evaluate() after train(), or set eval_on_start=True to evaluate before the first step."
        )


@contextlib.contextmanager
def forward_of_backbone(model: Any) -> Iterator[None]:
    """Let calls of `model`, or of what wraps it (PEFT too), return the output of its backbone, without logits."""
    model = base_model_of(model)
    kept = model.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return backbone_output(model, *args, **{name: value for name, value in kwargs.items() if value is not None})

    model.forward = forward
    try:
        yield
    finally:
        if kept is None:
            del model.forward
        else:
            model.forward = kept


def trains_in_parts(trainer: Any) -> bool:
    """Whether the model is trained in parts (FSDP, DeepSpeed, tensor parallelism)."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.get_tp_size() > 1


def saves_shards(trainer: Any) -> bool:
    """Whether FSDP saves the shards of the model in checkpoints, and the stock trainer no weights beside them."""
    return trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def gathered_model(trainer: Any) -> Any | None:
    """The model that was trained in parts (FSDP, DeepSpeed, tensor parallelism), gathered, with its adapter merged.

    To be called on all processes.

    Returns:
        None on the processes that do not write files.
    """
    wrapped = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    state_dict = trainer.accelerator.get_state_dict(wrapped)
    if trainer.get_tp_size() > 1:
        state_dict = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state_dict.items()
        }
    if not trainer.args.should_save:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = base_model_of(model)
    state_dict = {name: value for name, value in state_dict.items() if PROJECTION not in name.split(".")}
    whole: Any
    if is_peft_model(model):
        # Of one process the gathered tensors are those of the model itself, and merging adds to them.
        copied = {name: value.clone() for name, value in state_dict.items()}
        whole = with_adapters(model, copied, base.config).merge_and_unload()
    else:
        whole = empty_model(base.config)
        whole.load_state_dict(state_dict, assign=True)
    whole.tie_weights()
    whole.generation_config = base.generation_config
    return whole


def keep_losses_in_float32(plugin: Any) -> None:
    """Keep FSDP2's mixed precision from rounding losses and sums of gradients."""
    policy = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def layers_of(model: Any) -> list[Any]:
    """The layers of a model, by the names of their classes; empty if it does not say what its layers are."""
    classes = layer_class_names(model)
    return [module for module in model.modules() if type(module).__name__ in classes]


def offload_layers(teacher: Any, device: torch.device) -> None:
    """Keep the layers of a frozen model in main memory, and the rest on a device.

    One linear map of one layer is fetched at a time. The head and the embeddings stay on the device: the loss reads
    them.

    Raises:
        UnsupportedModelError: if the model does not name its layers, or something else places its weights.
    """
    if getattr(teacher, "hf_device_map", None) or is_quantised(teacher):
        raise UnsupportedModelError(
            "teacher_offload: the teacher was loaded with a device_map or a quantization_config, which place its "
            "weights. Leave out teacher_offload, or load the teacher without them."
        )
    layers = layers_of(teacher)
    if not layers:
        raise UnsupportedModelError(
            f"teacher_offload: {type(teacher).__name__} does not say what its layers are (_no_split_modules). "
            "Load a quantised teacher, or train from a cache of it."
        )
    teacher.to("cpu")
    if device.type == "cpu":  # without the index that a process may give it, for which tensors would be copied
        device = torch.device("cpu")
    for layer in layers:
        cpu_offload(layer, execution_device=device)
    apply_to_tensors(teacher, lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def shard_teacher(teacher: Any, accelerator: Any) -> Any:
    """Shard the frozen teacher as FSDP shards the student; Accelerate does not shard models in evaluation mode."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UnsupportedModelError(
            "FSDP version 1 hides the teacher's output head from the loss. Set fsdp_version: 2 for accelerate."
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = getattr(accelerator, "torch_device_mesh", None)
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
    }
    if plugin.cpu_offload is not None:
        options["offload_policy"] = plugin.cpu_offload
    chosen = fsdp2_wrap_policy(plugin, teacher)
    for module in list(teacher.modules())[:0:-1]:
        if chosen is not None and chosen(module):
            fully_shard(module, **options)
    return fully_shard(teacher, **options)
