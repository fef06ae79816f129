"""Distillation on a corpus: `DistillationConfig` and `DistillationTrainer`, on top of TRL's supervised trainer."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import re
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from trl import SFTConfig, SFTTrainer

from .artifacts import digest, public_name, require_writable, versions, write_json
from .card import write_model_card
from .errors import DataError, MismatchError, OutputError, UnsupportedModelError
from .hub import push_student_to_hub, write_teacher_metadata
from .losses import (
    DenseSignal,
    TeacherSignal,
    base_model_of,
    check_output_head,
    distillation_loss,
    next_token_positions,
    output_head,
)
from .models import empty_model, load_config, load_model

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from huggingface_hub import CommitInfo
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from .planning import PruningPlan

logger = logging.getLogger(__name__)

RECORD_NAME = "distillation.json"

#: How a student came to be; kept beside it wherever it is saved.
ORIGIN_FILES = ("pruning_plan.json", "pruning_plan.safetensors", "pruner_config.json", "scores.safetensors")

#: Config fields that the libraries change for training, and that a saved student gets back.
TRAINING_FIELDS = ("use_cache", "output_router_logits", "router_aux_loss_coef")

#: Arguments that `distillation.json` records: those that shape the result.
RECORDED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "max_length",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "temperature",
    "kd_weight",
    "ce_weight",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


@dataclass
class DistillationConfig(SFTConfig):
    """Arguments of `DistillationTrainer`: those of `trl.SFTConfig`, the ones below, and defaults that fit the machine.

    Loss of a token: `kd_weight * T² * KL(teacher ‖ student) + ce_weight * cross-entropy`, see
    `losses.distillation_loss`.

    Where no value is given, `bf16` is on only where the hardware has it, `activation_checkpointing` only on an
    accelerator, and `dataloader_pin_memory` only with one. TRL turns all three on everywhere; on a CPU without
    bfloat16 units that costs 50 to 100 times the speed.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012 (as in the base class)

    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the divergence. Minitron found 1 best."}
    )
    kd_weight: float = field(
        default=1.0, metadata={"help": "Weight of the divergence KL(teacher || student), times temperature squared."}
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy with the true tokens. Minitron uses none."}
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits exist at one time. If not set, chosen from the vocabulary size."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the teacher (`revision`, "
            "`dtype`, `quantization_config`, ...), used when the teacher is given as a path or Hub id. The dtype is "
            "that of the checkpoint, or float32 where the hardware is slow in that."
        },
    )
    upcast_student: bool = field(
        default=True,
        metadata={
            "help": "Train a half-precision student in float32 weights (small updates are lost in half precision). "
            "`save_student(dtype=...)` writes it in half precision again."
        },
    )

    # Defaults of the base classes that are changed.
    learning_rate: float = field(
        default=1e-4, metadata={"help": "The initial learning rate for AdamW. 1e-4 is the peak that Minitron used."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Whether to use bf16 mixed precision. If not set, only where the hardware computes in it."},
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Deprecated name of `activation_checkpointing`."}
    )
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Whether to pin memory in data loaders. If not set, only with an accelerator."},
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Whether and how to count the tokens seen: 'all', 'non_padding' or 'no'."},
    )
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Not supported: the teacher's distribution is the only supervision of a mixture of experts."
        },
    )

    def __post_init__(self) -> None:
        on_cpu = _trains_on_cpu(self.use_cpu)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _has_fast_bf16(on_cpu)
        if self.bf16 and on_cpu:
            self.use_cpu = True  # the base class refuses bf16 on a machine without accelerator unless told so
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = not on_cpu
        # Transformers 5 renamed the field; the old name still works but warns.
        renamed = "activation_checkpointing" in {f.name for f in fields(self)}
        name = "activation_checkpointing" if renamed else "gradient_checkpointing"
        if self.gradient_checkpointing is None and getattr(self, name) is None:
            setattr(self, name, not on_cpu)
        super().__post_init__()

        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a number above 0.")
        if self.kd_weight < 0 or self.ce_weight < 0 or self.kd_weight + self.ce_weight == 0:
            raise ValueError(
                f"kd_weight={self.kd_weight}, ce_weight={self.ce_weight}: expected numbers of at least 0, one above."
            )
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size={self.loss_chunk_size}: expected at least 1 token, or None.")
        # What would silently do nothing here, or replace the forward pass that the loss lives in.
        if self.loss_type != "nll":
            raise ValueError(f"loss_type={self.loss_type!r}: distillation has its own loss; leave loss_type as 'nll'.")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: the teacher's distribution is the target; leave it at 0.")
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel: Liger replaces the forward pass that computes this loss. Its layer kernels are "
                'available as model_init_kwargs={"use_kernels": True}; the loss is fused already.'
            )
        if self.router_aux_loss_coef != 0:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: not supported in distillation; leave it at 0.0."
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value!r} would upload optimizer states; expected 'end' "
                "or 'every_save'."
            )


def _trains_on_cpu(use_cpu: bool) -> bool:
    if use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        return True
    return not torch.accelerator.is_available()


def _has_fast_bf16(on_cpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself, instead of emulating it."""
    if on_cpu:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    from transformers.utils import is_torch_bf16_gpu_available

    return is_torch_bf16_gpu_available() and not torch.backends.mps.is_available()


@dataclass(frozen=True)
class _LossRequest:
    """What the student's forward pass needs to compute the loss where its head is: inside the wrapped model."""

    teacher: TeacherSignal
    positions: Tensor
    targets: Tensor
    options: Mapping[str, Any]


def _distilling_forward(model_class: Any) -> Callable[..., Any]:
    """The stock forward pass, with an extra argument `distillation` that makes it return losses instead of logits.

    The loss is computed inside the forward pass so that everything which wraps the model sees it: autocast, DDP's
    gradient hooks, FSDP's and DeepSpeed's gathering of the head. It returns a dict of tensors, which all of them can
    walk through. Holds no reference to a model, so that a copy of the model is a working copy.
    """
    stock = model_class.forward

    @functools.wraps(stock)  # `generate` reads the signature
    def forward(self: Any, *args: Any, distillation: _LossRequest | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return stock(self, *args, **kwargs)
        h_BTD = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        head = output_head(self)
        h_ND = h_BTD.flatten(0, 1).index_select(0, distillation.positions).to(head.weight.device)
        with _gathered_heads(head, distillation.teacher.head):
            losses = distillation_loss(
                h_ND, _whole(head), distillation.teacher, distillation.targets, **distillation.options
            )
        return {"total": losses.total, "kl": losses.kl, "ce": losses.ce, "agreement": losses.agreement}

    return forward


def _whole(head: Any) -> Any:
    """The head with FSDP2's sharded parameters gathered."""
    from dataclasses import replace

    from torch.distributed.tensor import DTensor

    whole = {
        name: value.full_tensor()
        for name, value in (("weight", head.weight), ("bias", head.bias))
        if isinstance(value, DTensor)
    }
    return replace(head, **whole) if whole else head


def _gathered_heads(*heads: Any) -> contextlib.AbstractContextManager[None]:
    """Under DeepSpeed ZeRO-3, the heads' parameters gathered for a direct access."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*(tensor for head in heads for tensor in (head.weight, head.bias)))


class DistillationTrainer(SFTTrainer):
    """Distil on a corpus, unlike TRL's trainer of the same name, which samples from the student and needs prompts.

    The student learns the teacher's distribution at every token of `train_dataset` that counts (all of them, or those
    of the completion or the assistant). Everything else is `trl.SFTTrainer`: datasets, packing, chat templates, PEFT,
    quantised loading, callbacks. The loss runs both output heads over token chunks, so no logits of whole batches
    exist.

    Logs `loss`, `kl`, `ce` and `agreement` (top-1, with the teacher), and `eval_loss`, `eval_kl`, `eval_ce` and
    `eval_agreement` as exact means over the tokens of the evaluation set. What it saves is the stock student, the
    plan it was pruned by, and `distillation.json`.

    Args:
        model: the student: a model, or a path or Hub id.
        teacher_model: the teacher: a model, or a path or Hub id. It is put into evaluation mode, frozen, and moved to
            the training device. It must share the student's vocabulary.
        args: a `DistillationConfig`.
        data_collator: see `trl.SFTTrainer`, like all the following but `pruning_plan`.
        train_dataset: corpus.
        eval_dataset: held-out corpus, or several by name.
        processing_class: tokenizer of both models.
        compute_metrics: metrics from the student's logits; costs a second forward pass and [batch, length, vocabulary]
            memory in evaluation.
        callbacks: trainer callbacks.
        optimizers: optimizer and scheduler.
        optimizer_cls_and_kwargs: optimizer class and arguments.
        preprocess_logits_for_metrics: reduces logits before they are gathered for `compute_metrics`.
        quantization_config: for a student that is loaded here.
        peft_config: trains an adapter; `save_student` merges it into a stock model.
        formatting_func: row → text.
        pruning_plan: how the student was made; by default the one that `prune_model` attached to the model, or the one
            in the folder it was loaded from.

    Raises:
        MismatchError: if teacher and student have different vocabularies or are the same object.
        UnsupportedModelError: if the loss would not see all that the model does: an adapter on the output head, prompt
            learning, an unknown logit post-processing, `nn.DataParallel`.
    """

    _tag_names = ["minitron", "knowledge-distillation"]  # noqa: RUF012 (as in the base class)
    _name = "Minitron distillation"
    _paper = {  # noqa: RUF012
        "title": "LLM Pruning and Distillation in Practice: The Minitron Approach",
        "id": "2408.11796",
    }
    #: The loss is divided by the token count of the whole optimiser step already.
    loss_is_scaled_for_ga: bool = True  # type: ignore[assignment]

    args: DistillationConfig
    model: Any
    hub_model_id: Any

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel | Any,
        teacher_model: str | os.PathLike[str] | PreTrainedModel | Any,
        args: DistillationConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        pruning_plan: PruningPlan | None = None,
    ) -> None:
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DistillationConfig(f"{Path(name or 'student').name}-distilled")
        if not isinstance(args, DistillationConfig):
            raise MismatchError(f"args is a {type(args).__name__}, expected a DistillationConfig.")

        if args.n_gpu > 1 and isinstance(model, nn.Module) and not getattr(model, "hf_device_map", None):
            raise UnsupportedModelError(
                f"One process sees {args.n_gpu} GPUs, for which the Trainer would use nn.DataParallel; its replicas "
                "do not run this loss. Launch with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
            )
        student_kwargs = _as_dict(args.model_init_kwargs)
        teacher_kwargs = {"trust_remote_code": args.trust_remote_code, **_as_dict(args.teacher_model_init_kwargs)}
        student_config = _config_of(model, {"trust_remote_code": args.trust_remote_code, **student_kwargs})
        teacher_config = _config_of(teacher_model, teacher_kwargs)
        _refuse_unequal_vocabularies(student_config, teacher_config)
        _refuse_split_model(model, "student")
        _refuse_split_model(teacher_model, "teacher")
        if isinstance(model, nn.Module):
            _refuse_shared_model(model, teacher_model)
            _refuse_unseen_adapters(model, peft_config)
            _cast_student(model, args, trains_all=peft_config is None and not is_peft_model(model))
        elif peft_config is not None:
            _refuse_prompt_learning(peft_config)

        self._stock_fields = {
            name: getattr(student_config.get_text_config(), name)
            for name in TRAINING_FIELDS
            if hasattr(student_config.get_text_config(), name)
        }
        self._student_name: str | None = student_config._name_or_path or None
        self._datasets = {"train": _describe_data(train_dataset), "eval": _describe_data(eval_dataset)}
        self._plan = pruning_plan if pruning_plan is not None else getattr(base_model_of(model), "pruning_plan", None)
        require_writable(_output_dir(args))

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise UnsupportedModelError(
                "Context, sequence and tensor parallelism are not supported in distillation; use DDP, FSDP2 or "
                "DeepSpeed."
            )

        student = base_model_of(self.model)
        _refuse_split_model(student, "student")
        _refuse_wrapped_head(student)
        # In place of TRL's own fused forward, which computes a cross-entropy alone.
        student.forward = types.MethodType(_distilling_forward(type(student)), student)
        # Tokens are always counted: `compute_loss` divides by the count over the accumulated batches.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        if self.padding_free:
            self.data_collator = _WithRowLengths(self.data_collator)

        self._teacher_name = _name_of(teacher_model)
        self._teacher_revision = teacher_kwargs.get("revision") or getattr(teacher_config, "_commit_hash", None)
        self.teacher_model = self._prepare_teacher(teacher_model, teacher_kwargs)
        self._token_sums = {mode: self._no_sums() for mode in ("train", "eval")}

    # ---- Teacher ----

    def _prepare_teacher(self, teacher_model: Any, init_kwargs: dict[str, Any]) -> Any:
        """Load, freeze and place the teacher with the same Accelerate plugin as the student."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not isinstance(teacher_model, nn.Module):
            teacher_model = load_model(teacher_model, **{"dtype": "auto", **init_kwargs})
        elif self.args.teacher_model_init_kwargs:
            logger.warning("teacher_model_init_kwargs are ignored: the teacher is a model already.")
        teacher_model.requires_grad_(False)
        teacher_model.eval()
        slow = not self._is_fast(teacher_model.dtype) and "dtype" not in init_kwargs
        if slow and not getattr(teacher_model, "is_quantized", False):
            logger.info("The teacher is computed in float32: this hardware is slow in %s.", teacher_model.dtype)
            teacher_model.float()
        if not sharded:
            if getattr(teacher_model, "hf_device_map", None) is None:
                teacher_model.to(self.accelerator.device)
            check_output_head(self.model, role="student")
            check_output_head(teacher_model, role="teacher")
            return teacher_model
        if self.is_deepspeed_enabled:
            from trl.models.utils import prepare_deepspeed

            return prepare_deepspeed(teacher_model, self.accelerator)
        return _shard_teacher(teacher_model, self.accelerator)

    def _is_fast(self, dtype: torch.dtype) -> bool:
        on_cpu = self.accelerator.device.type == "cpu"
        if dtype == torch.bfloat16:
            return _has_fast_bf16(on_cpu)
        return dtype != torch.float16 or not on_cpu

    @torch.no_grad()
    def _teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> TeacherSignal:
        """What the teacher says about the same inputs, at `positions` of the flattened batch."""
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        teacher.eval()
        with self.accelerator.autocast(), _forward_of_backbone(teacher):
            # Called through the wrapper, if there is one, whose hooks gather sharded parameters.
            h_BTD = self.teacher_model(**inputs, use_cache=False).last_hidden_state
        head = _whole(output_head(teacher))
        return DenseSignal(h_BTD.flatten(0, 1).index_select(0, positions).to(head.weight.device), head)

    # ---- Loss ----

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the tokens that count, from the wrapped student; and their positions in the flattened batch."""
        labels = inputs.get("labels")
        if labels is None:
            raise DataError("A batch has no labels, so no token counts. Use a data collator that returns labels.")
        model_inputs = {key: value for key, value in inputs.items() if key not in ("labels", "row_lengths")}
        positions, targets = next_token_positions(labels)
        request = _LossRequest(
            self._teacher_signal(model_inputs, positions),
            positions,
            targets,
            {
                "temperature": self.args.temperature,
                "kd_weight": self.args.kd_weight,
                "ce_weight": self.args.ce_weight,
                "chunk_size": self.args.loss_chunk_size,
            },
        )
        return model(**model_inputs, distillation=request), positions

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the token losses over the number of tokens of the optimiser step, all processes included.

        This is the only place where token losses are reduced for training.
        """
        losses, positions = self._token_losses(model, inputs)
        if num_items_in_batch is None:  # a batch of its own, outside the training loop
            loss = losses["total"] / max(len(positions), 1)
            if self.model.training:
                loss = loss / self.current_gradient_accumulation_steps
        else:
            loss = losses["total"] / torch.as_tensor(num_items_in_batch).clamp(min=1).to(losses["total"].device)
            if self.args.average_tokens_across_devices:
                # The count is that of all processes, over which DDP will take the mean of the gradients.
                loss = loss * self.accelerator.num_processes
        if self.model.training:
            self._token_sums["train"] += _sums(losses).sum(0)
        return (loss, losses) if return_outputs else loss

    def _no_sums(self) -> Tensor:
        return torch.zeros(4, dtype=_sum_dtype(self.accelerator.device), device=self.accelerator.device)

    def _means(self, sums: Tensor) -> dict[str, float]:
        """Logged values from sums over tokens, on the CPU."""
        kl, ce, agreement, count = sums.double().cpu().tolist()
        if not count:
            return {}
        loss = self.args.kd_weight * self.args.temperature**2 * kl + self.args.ce_weight * ce
        return {"loss": loss / count, "kl": kl / count, "ce": ce / count, "agreement": agreement / count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the divergence, cross-entropy and agreement since the last log to the training loss."""
        if "loss" in logs:  # the training loop logs its loss on all processes
            means = self._means(self.accelerator.reduce(self._token_sums["train"], "sum"))
            self._token_sums["train"] = self._no_sums()
            logs.update((key, value) for key, value in means.items() if key != "loss")
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One evaluation batch: token sums per row, and logits only where something asks for them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, positions = self._token_losses(model, inputs)
            loss = losses["total"] / max(len(positions), 1)
            # Rows, because the processes get equally many: the last batch repeats rows, which the gathering drops.
            row_of_position, num_rows = _rows(inputs)
            sums = torch.zeros((num_rows, 4), dtype=_sum_dtype(loss.device), device=loss.device)
            sums.index_add_(0, row_of_position[positions].to(loss.device), _sums(losses))
            self._token_sums["eval"] += self.accelerator.gather_for_metrics(sums).sum(0)
            if prediction_loss_only:
                return loss.detach(), None, None
            model_inputs = {key: value for key, value in inputs.items() if key not in ("labels", "row_lengths")}
            return loss.detach(), model(**model_inputs, use_cache=False).logits.detach(), inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over the tokens of the evaluation set, instead of means of batch means."""
        self._token_sums["eval"] = self._no_sums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._means(self._token_sums["eval"])
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{key}": value for key, value in means.items()}}
        return output._replace(metrics=metrics)

    # ---- What is saved ----

    @contextlib.contextmanager
    def _stock_config(self) -> Iterator[None]:
        """The student's config as it was before the libraries set it up for training."""
        config = base_model_of(self.accelerator.unwrap_model(self.model)).config.get_text_config()
        changed = {name: getattr(config, name) for name in self._stock_fields}
        try:
            for name, value in self._stock_fields.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in changed.items():
                setattr(config, name, value)

    def save_model(self, output_dir: str | os.PathLike[str] | None = None, _internal_call: bool = False) -> None:
        """Save the student (or its adapter) in its training dtype, with its plan and `distillation.json`.

        `save_student` writes the stock student to publish: adapters merged, in the dtype asked for.
        """
        output_dir = os.fspath(output_dir or _output_dir(self.args))
        with self._stock_config(), _writing(output_dir):
            super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._save_origin(Path(output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_student(
        self, output_dir: str | os.PathLike[str] | None = None, *, dtype: torch.dtype | str | None = None
    ) -> None:
        """Save the stock student: plain weights that `AutoModelForCausalLM.from_pretrained` loads, adapters merged.

        To be called on all processes.

        Args:
            output_dir: default: the output folder of the run.
            dtype: of the saved weights, for example that of the teacher's checkpoint. None: the training dtype.

        Raises:
            OutputError: if the folder cannot be written.
            UnsupportedModelError: if an adapter was trained on sharded weights, which cannot be merged here.
        """
        output_dir = Path(output_dir or _output_dir(self.args))
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UnsupportedModelError(
                    "An adapter trained with FSDP or DeepSpeed cannot be merged here. Save it with save_model(), then "
                    "merge it in one process: peft.AutoPeftModelForCausalLM.from_pretrained(dir).merge_and_unload()."
                )
            base = copy.deepcopy(model).merge_and_unload() if self.args.should_save else None
            state_dict = base.state_dict() if base is not None else None
        else:
            base, state_dict = model, self.accelerator.get_state_dict(self.model)
        if not self.args.should_save or base is None or state_dict is None:
            return
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        with self._stock_config():
            config = copy.deepcopy(base.config)
            for name, value in self._stock_fields.items():
                setattr(config.get_text_config(), name, value)
            student: Any = empty_model(config)
        student.load_state_dict(state_dict, assign=True)
        student.tie_weights()
        student.generation_config = base.generation_config
        require_writable(output_dir)
        with _writing(output_dir):
            student.to(dtype=dtype or student.dtype).save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (output_dir / name).unlink(missing_ok=True)  # loaders would put the adapter on top of the merged weights
        self._save_origin(output_dir)

    def _save_origin(self, folder: Path) -> None:
        """Write the plan and the training record into `folder`."""
        if self._plan is not None:
            self._plan.save_pretrained(folder)
        source = Path(self._student_name) if self._student_name else None
        if source is not None and source.is_dir() and source.resolve() != folder.resolve():
            for name in ORIGIN_FILES:
                if (source / name).is_file() and not (folder / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        write_json(folder / RECORD_NAME, self.distillation_record())

    def distillation_record(self) -> dict[str, Any]:
        """What `distillation.json` holds: teacher, arguments, data and everything that was logged."""
        arguments = self.args.to_dict()
        model = self.accelerator.unwrap_model(self.model)
        peft = None
        if is_peft_model(model):
            peft = {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in model.peft_config[model.active_adapter].to_dict().items()
                if isinstance(value, bool | int | float | str | set | list)
            }
        history = self.state.log_history
        return {
            "format": 1,
            "versions": versions(),
            "teacher": {"name_or_path": public_name(self._teacher_name), "revision": self._teacher_revision},
            "student": {"name_or_path": public_name(self._student_name)},
            "arguments": {name: arguments.get(name) for name in RECORDED_ARGUMENTS},
            "data": self._datasets,
            "num_processes": self.accelerator.num_processes,
            "peft": peft,
            "global_step": self.state.global_step,
            "num_input_tokens_seen": int(self.state.num_input_tokens_seen),
            "train_runtime": next(
                (entry["train_runtime"] for entry in history[::-1] if "train_runtime" in entry), None
            ),
            "log_history": history,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Without TRL's card: ours is made from the finished run, in `push_to_hub` or `create_model_card`.
        super(SFTTrainer, self)._save_checkpoint(model, trial)

    # ---- Card and Hub ----

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Write the model card from the files of the output folder; the arguments of TRL's method are not needed."""
        if self.is_world_process_zero():
            self._save_teacher_metadata()
            write_model_card(_output_dir(self.args))

    def _save_teacher_metadata(self) -> None:
        folder = Path(_output_dir(self.args))
        if self._teacher_name and not (folder / "teacher.json").is_file():
            write_teacher_metadata(folder, self._teacher_name, revision=self._teacher_revision)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Any:
        """Save the stock student into the output folder and publish it with everything that is known of it.

        Args:
            commit_message: of the one commit.
            blocking: False uploads in the background and returns a `Future`.
            token: default: `args.hub_token`, or the stored one.
            revision: branch; default `args.hub_revision`.
            private: whether a new repository is private; default `args.hub_private_repo`, or True.
            **kwargs: accepted for compatibility with `Trainer.push_to_hub`.

        Raises:
            HubError: if the Hub refuses, or cannot be reached.
            OutputError: if the output folder cannot be written.
        """
        from huggingface_hub import HfApi

        self.save_student()
        if not self.is_world_process_zero():
            return None
        self._save_teacher_metadata()
        options: dict[str, Any] = {
            "private": self._private(private),
            "token": token or self.args.hub_token,
            "commit_message": commit_message,
            "revision": revision or self.args.hub_revision,
        }
        folder = _output_dir(self.args)
        repo_id = self.args.hub_model_id or Path(folder).resolve().name
        if blocking:
            return push_student_to_hub(folder, repo_id, **options)
        return HfApi().run_as_future(push_student_to_hub, folder, repo_id, **options)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, private unless said otherwise."""
        super().init_hf_repo(token=token, private=self._private(private))

    def _private(self, private: bool | None) -> bool:
        return next(value for value in (private, self.args.hub_private_repo, True) if value is not None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` would upload the whole output folder, working files included.
        if self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            if is_peft_model(self.accelerator.unwrap_model(self.model)):
                return  # an adapter alone is no student; the merged one is pushed at the end
            push_student_to_hub(
                checkpoint_folder,
                self.hub_model_id,
                private=self._private(None),
                token=self.args.hub_token,
                commit_message=f"Training in progress, step {self.state.global_step}",
                revision=self.args.hub_revision,
            )


@dataclass
class _WithRowLengths:
    """A collator that also says how long each row of a flattened batch is, so that tokens can be told by row."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        batch["row_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch


def _rows(inputs: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Row of every position of the flattened batch, int64 [B * T], and the number of rows."""
    labels = inputs["labels"]
    lengths = inputs.get("row_lengths")
    if lengths is None:
        num_rows, length = labels.shape
        return torch.arange(num_rows, device=labels.device).repeat_interleave(length), num_rows
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths), len(lengths)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _sums(losses: Mapping[str, Tensor]) -> Tensor:
    """KL, cross-entropy, agreement and 1 per token: [N, 4], ready to be summed."""
    kl = losses["kl"].detach()
    columns = [kl, losses["ce"].detach(), losses["agreement"], torch.ones_like(kl)]
    return torch.stack([column.to(_sum_dtype(kl.device)) for column in columns], 1)


@contextlib.contextmanager
def _forward_of_backbone(model: Any) -> Iterator[None]:
    """Let calls of `model`, or of what wraps it, return the output of its backbone, without logits."""
    kept = model.__dict__.get("forward")
    model.forward = lambda *args, **kwargs: model.base_model(*args, **kwargs)
    try:
        yield
    finally:
        if kept is None:
            del model.forward
        else:
            model.forward = kept


@contextlib.contextmanager
def _writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full disk or a forbidden folder raises into one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write to {folder}: {error}. Free space or choose another folder.") from error


def _shard_teacher(teacher: Any, accelerator: Any) -> Any:
    """Shard the frozen teacher as FSDP shards the student; Accelerate leaves models in evaluation mode whole."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UnsupportedModelError(
            "FSDP version 1 hides the teacher's output head from the loss. Set fsdp_version: 2 for accelerate."
        )
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = getattr(accelerator, "torch_device_mesh", None)
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
    }
    if plugin.cpu_offload is not None:
        options["offload_policy"] = plugin.cpu_offload
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, teacher)
    for module in list(teacher.modules())[:0:-1]:
        if chosen is not None and chosen(module):
            fully_shard(module, **options)
    return fully_shard(teacher, **options)


def _cast_student(model: Any, args: DistillationConfig, *, trains_all: bool) -> None:
    """Give a half-precision student float32 weights, where training needs them or the hardware is slow without."""
    if getattr(base_model_of(model), "is_quantized", False):
        return
    on_cpu = _trains_on_cpu(args.use_cpu)
    slow = {torch.float16} if on_cpu else set()
    if not _has_fast_bf16(on_cpu):
        slow.add(torch.bfloat16)
    if model.dtype in slow or (trains_all and args.upcast_student and model.dtype in (torch.float16, torch.bfloat16)):
        logger.info("The student's %s weights are trained in float32.", model.dtype)
        model.float()


def _refuse_unequal_vocabularies(student: Any, teacher: Any) -> None:
    sizes = {role: config.get_text_config().vocab_size for role, config in (("s", student), ("t", teacher))}
    if sizes["s"] != sizes["t"]:
        raise MismatchError(
            f"The student's vocabulary has {sizes['s']} tokens, the teacher's {sizes['t']}. Distillation compares "
            "probabilities token by token, so both need one tokenizer and equally many embedding rows. Use a teacher "
            "of the same family, or, where the tokenizer is the same and one embedding is only padded, "
            f"student.resize_token_embeddings({sizes['t']})."
        )


def _refuse_split_model(model: Any, role: str) -> None:
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"The {role} is split over {', '.join(map(str, devices))}; the loss needs both heads on one device. "
            "Load it with device_map=None; to shard both models, use `accelerate launch` with FSDP2 or DeepSpeed."
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
    """Adapters that the loss would not see, because it reads the backbone's states and the head's weight."""
    if is_peft_model(model):
        _refuse_prompt_learning(model.peft_config[model.active_adapter])
        _refuse_wrapped_head(base_model_of(model))
    if peft_config is None:
        return
    _refuse_prompt_learning(peft_config)
    if getattr(peft_config, "target_modules", None):
        from peft.tuners.tuners_utils import check_target_module_exists

        head = model.get_output_embeddings()
        name = next((name for name, module in model.named_modules() if module is head), None)
        if peft_config.target_modules != "all-linear" and name and check_target_module_exists(peft_config, name):
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


def _refuse_wrapped_head(student: Any) -> None:
    from peft.utils.other import ModulesToSaveWrapper

    head = student.get_output_embeddings()
    if not isinstance(head, nn.Linear | ModulesToSaveWrapper):
        raise UnsupportedModelError(_ADAPTED_HEAD.format(name=f"lm_head, a {type(head).__name__}"))


def _describe_data(data: Any) -> dict[str, Any] | None:
    """Rows and fingerprint of a dataset, as it was given; null where it does not know them (streams)."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        parts = {name: _describe_data(part) for name, part in data.items()}
        counts = [None if part is None else part["num_rows"] for part in parts.values()]
        return {
            "name": ", ".join(map(str, parts)),
            "num_rows": None if None in counts else sum(count for count in counts if count is not None),
            "fingerprint": digest({name: part and part["fingerprint"] for name, part in parts.items()}),
        }
    info = getattr(data, "info", None)
    return {
        "name": _hub_id_of(info) or getattr(info, "dataset_name", None),
        "num_rows": len(data) if hasattr(data, "__len__") else None,
        "fingerprint": getattr(data, "_fingerprint", None),
    }


def _hub_id_of(info: Any) -> str | None:
    """Hub id of the repository that a dataset was read from, as its list of downloaded files tells."""
    sources = getattr(info, "download_checksums", None) or {}
    found = (re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources)
    return next((match[1] for match in found if match), None)


def _config_of(model: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(model, nn.Module):
        return model.config
    named = {key: kwargs[key] for key in ("revision", "token", "trust_remote_code") if key in kwargs}
    return load_config(model, **named)


def _name_of(model: Any) -> str | None:
    config = getattr(model, "config", None)
    return os.fspath(model) if config is None else config._name_or_path or None


def _as_dict(kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dict-valued argument; strings of JSON are parsed by the base class already."""
    if isinstance(kwargs, str):
        raise MismatchError(f"Expected a dict of keyword arguments, got the string {kwargs!r}.")
    return dict(kwargs or {})


def _output_dir(args: DistillationConfig) -> str:
    assert args.output_dir is not None  # the base class fills it in
    return args.output_dir
