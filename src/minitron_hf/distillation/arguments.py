"""Resolves the trainer's arguments: models or their names, dtypes, tokenizers."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import TrainingArguments

from ..compat import commit_hash
from ..errors import ArgumentError, DataError, MismatchError
from ..families import is_multimodal
from ..families.tensors import is_quantised
from ..hardware import is_fast, one_dtype, training_device
from ..losses.heads import base_model_of
from ..models import load_config, load_processor, load_tokenizer, plain_model, stored_dtype
from .config import DistillationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

#: Dtypes in which small updates are lost.
HALF_PRECISION = (torch.float16, torch.bfloat16)


def in_training_dtype(
    model: Any, args: DistillationConfig, config: PretrainedConfig, peft_config: Any, quantization_config: Any
) -> tuple[Any, DistillationConfig]:
    """Give a half-precision student float32 weights, if training needs them or the hardware is slow in half precision.

    Returns:
        The model, without another trainer's wrappers, or its path; and the arguments, for a path with the dtype in
        which TRL loads the model.
    """
    if isinstance(model, nn.Module):
        model = plain_model(model)
        trains_all = peft_config is None and not is_peft_model(model)
        if not is_quantised(base_model_of(model)) and _needs_float32(model.dtype, args, trains_all):
            logger.info("The student's %s weights are trained in float32.", model.dtype)
            model.float()
        return model, args
    kwargs = kwargs_dict(args.model_init_kwargs)
    dtype = one_dtype(kwargs.pop("dtype", None), kwargs) or torch.float32  # TRL's default
    loaded = stored_dtype(config) if dtype == "auto" else dtype
    quantized = quantization_config or kwargs.get("quantization_config") or hasattr(config, "quantization_config")
    if loaded is not None and not quantized and _needs_float32(loaded, args, peft_config is None):
        logger.info("The student's %s weights are trained in float32.", loaded)
        dtype = torch.float32
    args = copy.copy(args)
    args.model_init_kwargs = {**kwargs, "dtype": dtype}
    return model, args


def upcast_trained(student: Any, args: DistillationConfig) -> None:
    """Give float32 weights to half-precision modules that are trained whole beside an adapter (`modules_to_save`).

    Only they become float32 where autocast joins them with the others, else the whole student does. Of quantised
    students TRL sets the dtype.

    Args:
        student: with its adapter, before it is wrapped for training.
        args: of the training.
    """
    if not args.upcast_student or is_quantised(base_model_of(student)):
        return
    halves = [one for one in student.parameters() if one.requires_grad and one.dtype in HALF_PRECISION]
    if halves and not (args.bf16 or args.fp16):
        student.float()
    for parameter in halves:
        parameter.data = parameter.data.float()


def _needs_float32(dtype: torch.dtype, args: DistillationConfig, trains_all: bool) -> bool:
    upcast = trains_all and args.upcast_student and dtype in HALF_PRECISION
    return upcast or not is_fast(dtype, training_device(args.use_cpu))


def as_distillation_config(args: Any, student: Any) -> DistillationConfig:
    """Arguments of TRL or of Transformers as a `DistillationConfig`; arguments that only it has get their defaults.

    Args:
        args: as given to the trainer; None for an output folder named after the student.
        student: a model, or a path or Hub id.

    Raises:
        MismatchError: if they are not training arguments.
        DataError: if distillation does not support one of them (`DistillationConfig`).
    """
    if args is None:
        return DistillationConfig(f"{Path(model_name(student) or 'student').name}-distilled")
    if isinstance(args, DistillationConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise MismatchError(f"args is a {type(args).__name__}, expected a DistillationConfig.")
    values = args.to_dict()
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}  # `to_dict` hides them
    if values.get("router_aux_loss_coef") is None:  # `SFTConfig` takes the model's own; it is not part of our loss
        values.pop("router_aux_loss_coef", None)
    return DistillationConfig(**values)


def eval_packing(args: DistillationConfig) -> bool:
    return args.packing if args.eval_packing is None else args.eval_packing


def refuse_unused_loading_arguments(args: DistillationConfig, model: Any, quantization_config: Any) -> None:
    """Refuse arguments for loading a student that is loaded already.

    Raises:
        MismatchError: naming them.
    """
    if isinstance(model, nn.Module) and (args.model_init_kwargs or quantization_config is not None):
        raise MismatchError(
            "model_init_kwargs and quantization_config say how a student is loaded, and this one is a model "
            "already. Leave them out, or pass the student's path or Hub id."
        )


def config_of(model: Any, kwargs: dict[str, Any]) -> Any:
    """The config of a model, or of a path or Hub id, with the keyword arguments of `from_pretrained`.

    Raises:
        ArgumentError: if it is something else.
    """
    if isinstance(model, nn.Module):
        return model.config
    if not isinstance(model, str | os.PathLike):
        raise ArgumentError(f"Expected a model, or the path or Hub id of one, not a {type(model).__name__}.")
    named = {key: kwargs[key] for key in ("revision", "token", "trust_remote_code") if key in kwargs}
    return load_config(model, **named)


def model_name(model: Any) -> str | None:
    """Path or Hub id that a model was loaded from; None for a model that exists in memory only."""
    config = getattr(model, "config", None)
    return os.fspath(model) if config is None else config.name_or_path or None


def processing_class_of(teacher_config: Any, trust_remote_code: bool) -> Any:
    """The tokenizer or processor of the teacher, for a student that exists in memory only."""
    # Without trust_remote_code, Transformers would ask on the terminal.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (commit := commit_hash(teacher_config)) is not None:
        options["revision"] = commit  # a teacher of a branch or tag has the tokenizer of that commit
    name = teacher_config.name_or_path or None
    if name is None:
        raise DataError("processing_class is None, and neither model was loaded from a folder or the Hub. Pass it.")
    if not is_multimodal(teacher_config):
        return load_tokenizer(name, **options)
    return load_processor(name, **options)


def kwargs_dict(kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """A copy of a dict argument; the base class has parsed JSON already."""
    if isinstance(kwargs, str):
        raise MismatchError(f"Expected a dict of keyword arguments, got the string {kwargs!r}.")
    return dict(kwargs or {})
