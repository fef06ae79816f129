"""Checks for unsupported combinations of teacher, student and adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn

from ..compat import has_injected_adapter, is_target_module
from ..errors import DistributedError, DivergedError, MismatchError, UnsupportedModelError
from ..families import table_of
from ..families.axes import dimension_axes
from ..families.tensors import is_quantised
from ..locks import launched_processes
from ..losses.heads import base_model_of


def refuse_pair(
    student: Any,
    teacher: Any,
    student_config: Any,
    teacher_config: Any,
    peft_config: Any,
    *,
    maps_tokens: bool = False,
) -> None:
    """Refuse a student and a teacher that cannot be distilled, before either is loaded.

    Args:
        student: a model, or a path or Hub id.
        teacher: a model, or a path or Hub id.
        student_config: the student's config.
        teacher_config: the teacher's config.
        peft_config: of the adapter to be trained, or None.
        maps_tokens: whether it is known which of the teacher's tokens the student has.

    Raises:
        MismatchError: if the vocabularies differ, or the models share weights.
        UnsupportedModelError: if a model is split over devices, or the loss would not see the adapter.
    """
    if not maps_tokens:
        _refuse_unequal_vocabularies(student_config, teacher_config)
    refuse_split_model(student, "student")
    refuse_split_model(teacher, "teacher")
    if isinstance(teacher, nn.Module):
        refuse_virtual_tokens(teacher)
    if isinstance(student, nn.Module):
        _refuse_shared_model(student, teacher)
        refuse_injected_adapter(student)
        _refuse_unseen_adapters(student, peft_config)
    elif peft_config is not None:
        _refuse_prompt_learning(peft_config)


def refuse_top_k(top_k: int | None, vocab_size: int, *, where: str = "") -> None:
    """Refuse a `top_k` of `DistillationConfig` that does not fit the models.

    Args:
        top_k: as given; None compares whole distributions.
        vocab_size: number of the teacher's tokens that the student has.
        where: what stands before the argument's name.

    Raises:
        MismatchError: naming what to do.
    """
    if top_k is None:
        return
    if top_k > vocab_size:
        raise MismatchError(
            f"{where}top_k={top_k}: the vocabulary has {vocab_size} tokens. Lower it, or leave it out."
        )


def refuse_uncorrectable(teacher: Any) -> None:
    """Refuse a teacher that is quantised or has an adapter; correction trains and saves plain weights.

    Raises:
        UnsupportedModelError: naming what to do.
    """
    if is_peft_model(teacher):
        raise UnsupportedModelError(
            "The teacher to be corrected has an adapter. Merge it first: teacher = teacher.merge_and_unload()."
        )
    if is_quantised(teacher):
        raise UnsupportedModelError(
            "The teacher to be corrected is quantised, and correction saves plain weights. Load it without "
            "quantization_config; method='lora' or 'norms' needs little memory beside the weights."
        )


def refuse_not_finite(values: Iterable[float], step: int) -> None:
    """Refuse to continue with a loss that is NaN or infinite: the weights are lost and must not be saved.

    Raises:
        DivergedError: if one of the values is not finite.
    """
    if not all(map(math.isfinite, values)):
        raise DivergedError(
            f"The loss is not finite at step {step}, or in a step since the last log: training has diverged, or a "
            "model gives logits that are not finite. Resume from the last checkpoint with a lower learning_rate, with "
            "warmup_steps or a lower max_grad_norm, or check both models in float32 (bf16=False)."
        )


def refuse_nan_weights(model: nn.Module) -> None:
    """Refuse to publish weights with NaN.

    Raises:
        DivergedError: naming the first such weight.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise DivergedError(
                f"The student's weight {name!r} holds NaN: training has diverged. Resume from an earlier "
                "checkpoint with a lower learning_rate."
            )


def _refuse_unequal_vocabularies(student: Any, teacher: Any) -> None:
    sizes = {role: config.get_text_config().vocab_size for role, config in (("s", student), ("t", teacher))}
    if sizes["s"] != sizes["t"]:
        raise MismatchError(
            f"The student's vocabulary has {sizes['s']} tokens, the teacher's {sizes['t']}. Distillation compares "
            "probabilities token by token, so both need one tokenizer and equally many embedding rows. Use a teacher "
            "of the same family, or, where the tokenizer is the same and one embedding is only padded, "
            f"student.resize_token_embeddings({sizes['t']}). A student whose vocabulary was cut needs its "
            "pruning_plan.json beside it, which save_model writes."
        )


def refuse_resized(student_config: Any, other: int) -> None:
    """Refuse a student whose vocabulary TRL has changed while it set up training.

    Args:
        student_config: its config now.
        other: number of tokens that are compared.

    Raises:
        MismatchError: naming the remedy.
    """
    size = student_config.get_text_config().vocab_size
    if size != other:
        raise MismatchError(
            f"chat_template_path brings a tokenizer, to which the student's vocabulary was resized: {size} tokens, "
            f"and the teacher's has {other}. {RESIZE_BOTH.format(size=size)} Or pass a template without tokens of "
            "its own (a .jinja file)."
        )


def refuse_unknown_tokens(rows: Any, vocab_size: int, processing_class: Any) -> None:
    """Refuse rows with tokens for which the models have no embedding, before training starts.

    The rows are read only if the tokenizer has such tokens: tokenizers of a few models have more tokens than there
    are embeddings, and no text contains them.

    Args:
        rows: a dataset of token rows; `WithKnownTokens` checks streams.
        vocab_size: rows of both embeddings.
        processing_class: tokenizer or processor.

    Raises:
        MismatchError: naming the token and the remedy.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size <= vocab_size or not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    batches = rows.select_columns(["input_ids"]).with_format("numpy").iter(1024)
    largest = max((int(max(row)) for batch in batches for row in batch["input_ids"] if len(row)), default=-1)
    if largest >= vocab_size:
        raise MismatchError(
            f"The data holds the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the models have "
            f"embeddings of {vocab_size} tokens; the tokenizer has {size}. {RESIZE_BOTH.format(size=size)}"
        )


RESIZE_BOTH = "Resize both: student.resize_token_embeddings({size}) and teacher.resize_token_embeddings({size})."


def refuse_split_model(model: Any, role: str) -> None:
    """Refuse a model whose layers were loaded onto several devices."""
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"The {role} is split over {', '.join(map(str, devices))}; the loss needs both heads on one device. "
            "Load it with device_map=None; to shard both models, use `accelerate launch` with FSDP2 or DeepSpeed."
        )


def refuse_data_parallel(model: Any, num_gpus: int) -> None:
    """Refuse a model that the Trainer would replicate over several GPUs in one process.

    Raises:
        UnsupportedModelError: saying how to launch.
    """
    if isinstance(model, nn.Module) and not getattr(model, "hf_device_map", None):
        refuse_several_gpus(num_gpus, "Launch with `accelerate launch` or `torchrun`")


def refuse_several_gpus(num_gpus: int, remedy: str) -> None:
    """Refuse to train on several GPUs in one process.

    Raises:
        UnsupportedModelError: naming the remedy.
    """
    if num_gpus > 1:
        raise UnsupportedModelError(
            f"One process sees {num_gpus} GPUs, for which the Trainer would use nn.DataParallel; its replicas "
            f"do not run this loss. {remedy}, or set CUDA_VISIBLE_DEVICES."
        )


def refuse_frozen(student: Any) -> None:
    """Refuse a student without trainable parameters, such as a model that was a teacher before.

    Raises:
        UnsupportedModelError: naming the remedy.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UnsupportedModelError(
            "All parameters of the student are frozen, as those of a teacher are. Call student.requires_grad_(True)."
        )


def freeze_embeddings(student: Any) -> None:
    """Exclude token embeddings and output head from training (`DistillationConfig.freeze_embeddings`).

    Raises:
        UnsupportedModelError: see `refuse_frozen_embeddings`.
    """
    refuse_frozen_embeddings(has_adapter=is_peft_model(student))
    for table in (student.get_input_embeddings(), student.get_output_embeddings()):
        table.requires_grad_(False)
    # Some models have a second table, with the inputs that each token has in every layer.
    if (spec := table_of(student.config)) is not None:
        for name, parameter in student.named_parameters(remove_duplicate=False):
            dimensions = spec.dimensions[name] if name in spec.outer else ()
            if any(axis.endswith("vocab") for dimension in dimensions for axis in dimension_axes(dimension)):
                parameter.requires_grad_(False)


def refuse_frozen_embeddings(*, has_adapter: bool) -> None:
    """Refuse `freeze_embeddings` where it would have no effect.

    Raises:
        UnsupportedModelError: if an adapter is trained.
    """
    if has_adapter:
        raise UnsupportedModelError(
            "freeze_embeddings with an adapter: the adapter is trained, and embeddings and head are frozen already. "
            "Leave it out."
        )


def refuse_launch(accelerator: Any) -> None:
    """Refuse a launch that Accelerate has silently changed, or whose parallelism is not supported.

    Raises:
        DistributedError: if every process would train alone, or no model would be split.
        UnsupportedModelError: if context or sequence parallelism is on, or tensor parallelism beside another one.
    """
    processes = launched_processes()
    if processes > 1 and accelerator.num_processes == 1:
        raise DistributedError(
            f"{processes} processes were launched, and each would train alone, because this machine has no "
            "accelerators. Set use_cpu=True, or ACCELERATE_USE_CPU=true before launching."
        )
    for plugin in ("FSDP", "DEEPSPEED"):
        wanted = os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() == "true"
        if wanted and getattr(accelerator.state, f"{plugin.lower()}_plugin", None) is None:
            raise DistributedError(
                f"{plugin} was asked for, but Accelerate splits models over accelerators only, and {processes} "
                f"processes were launched on {accelerator.device.type}. Launch with the configuration ddp."
            )
    parallelism = accelerator.parallelism_config
    if parallelism is None:
        return
    for name, is_on in (("Context", parallelism.cp_enabled), ("Sequence", parallelism.sp_enabled)):
        if is_on:
            raise UnsupportedModelError(
                f"{name} parallelism splits every row over the processes, and the loss compares whole rows of teacher "
                "and student. Use DDP, FSDP2, DeepSpeed or tensor parallelism, or a smaller max_length."
            )
    if parallelism.tp_enabled and parallelism.tp_size != accelerator.num_processes:
        raise UnsupportedModelError(
            f"Tensor parallelism over {parallelism.tp_size} of {accelerator.num_processes} processes: together with "
            "data parallelism it is not supported in distillation. Use tp_size alone, or DDP, FSDP2 or DeepSpeed."
        )


def refuse_tensor_parallel(trainer: Any) -> None:
    """Refuse what tensor parallelism is not supported with.

    Raises:
        UnsupportedModelError: naming it.
    """
    if trainer.get_tp_size() == 1:
        return
    args = trainer.args
    wanted = {
        "an adapter": is_peft_model(trainer.model),
        "teacher_correction": args.teacher_correction,
        "teacher_offload": args.teacher_offload,
        "hidden_loss": args.hidden_loss,
        "embedding_loss": args.embedding_loss,
        "load_best_model_at_end": args.load_best_model_at_end,
        "eval_tasks": args.eval_tasks,
    }
    if names := [name for name, value in wanted.items() if value]:
        raise UnsupportedModelError(
            f"Tensor parallelism with {', '.join(names)} is not supported in distillation. Leave it out, "
            "or use DDP, FSDP2 or DeepSpeed."
        )


def _refuse_shared_model(model: Any, teacher: Any) -> None:
    if isinstance(teacher, nn.Module):
        parameters = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in parameters for parameter in teacher.parameters()):
            raise MismatchError(
                "The teacher shares weights with the student, so it would change while the student learns from it. "
                "Pass a copy, or load the teacher a second time."
            )


def _refuse_unseen_adapters(model: Any, peft_config: Any) -> None:
    """Refuse adapters that the loss would not see: it reads the backbone's states and the head's weight."""
    if is_peft_model(model):
        _refuse_prompt_learning(model.peft_config[model.active_adapter])
        refuse_wrapped_head(base_model_of(model))
    if peft_config is not None:
        refuse_adapter(model, peft_config)


def refuse_adapter(model: Any, peft_config: Any) -> None:
    """Refuse an adapter that could not be merged, or that the loss would not see.

    Raises:
        UnsupportedModelError: saying what to use instead.
    """
    _refuse_prompt_learning(peft_config)
    if getattr(peft_config, "target_modules", None):
        head = model.get_output_embeddings()
        name = next((name for name, module in model.named_modules() if module is head), None)
        if peft_config.target_modules != "all-linear" and name and is_target_module(peft_config, name):
            raise UnsupportedModelError(_ADAPTED_HEAD.format(name=name))


_ADAPTED_HEAD = (
    "An adapter on the output head ({name}) is not supported: the loss reads the head's weight, so the adapter would "
    "never be trained. Take it out of target_modules, or train the whole head with modules_to_save=['{name}']."
)


def _refuse_prompt_learning(peft_config: Any) -> None:
    if getattr(peft_config, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"{peft_config.peft_type.value} learns virtual tokens in front of the text, which shift every position "
            "and cannot be merged into a stock model. Use LoRA (peft.LoraConfig) instead."
        )


def refuse_virtual_tokens(teacher: Any) -> None:
    """Refuse a teacher whose adapter puts virtual tokens into the rows: its states lie at other positions.

    The keys and values of prefix tuning take no positions of the rows.

    Raises:
        UnsupportedModelError: if it is adapted so.
    """
    if not is_peft_model(teacher):
        return
    adapter = teacher.peft_config[teacher.active_adapter]
    if getattr(adapter, "is_prompt_learning", False) and adapter.peft_type.value != "PREFIX_TUNING":
        raise UnsupportedModelError(
            f"The teacher has {adapter.peft_type.value}, which puts virtual tokens in front of the text, so its "
            "states lie at other positions than the student's. Use a teacher without it, or with another adapter."
        )


def refuse_injected_adapter(student: Any) -> None:
    """Refuse a student into which Transformers put an adapter: it could be trained, but not merged.

    Raises:
        UnsupportedModelError: saying what to use instead.
    """
    if has_injected_adapter(base_model_of(student)) and not is_peft_model(student):
        raise UnsupportedModelError(
            "The student has an adapter that Transformers added (`add_adapter`, or a folder with "
            "adapter_config.json). Pass the model without it and peft_config=, or "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )


def refuse_wrapped_head(student: Any) -> None:
    """Refuse an output head that an adapter has wrapped."""
    from peft.utils import ModulesToSaveWrapper

    head = student.get_output_embeddings()
    if not isinstance(head, nn.Linear | ModulesToSaveWrapper):
        raise UnsupportedModelError(_ADAPTED_HEAD.format(name=f"lm_head, a {type(head).__name__}"))
