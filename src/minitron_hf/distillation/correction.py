"""Teacher correction: fine-tunes the teacher on the corpus before, or during, distillation (arXiv 2408.11796 §2.1).

A teacher that has never seen the distillation corpus guides the student less well on it. The paper reduced the
student's validation loss by over 6 % by fine-tuning the teacher on the corpus, at a fifth of the peak learning rate
that it was trained with. The choice of what to prune stays the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, TrainerCallback, get_scheduler, set_seed
from trl import SFTConfig, SFTTrainer

from ..compat import on_one_device, trains_on_images, without_checkpointing_warning
from ..data.context import context_length
from ..data.images import ImageCollator, holds_images
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError, MismatchError, UnsupportedModelError, checks_kinds
from ..families import spec_for
from ..files import move_into, refuse_own_folder, replacing_file, replacing_folder, require_writable, versions
from ..formats import write_artefact
from ..hardware import has_fast_bf16, training_device
from ..locks import with_locked_folder
from ..losses.chunks import default_chunk_size
from ..losses.heads import OutputHead, head_logits
from ..models import load_model, load_tokenizer
from ..names import public_name
from ..saving import in_stored_dtype, save_model
from .assistant_turns import AssistantTurnsMixin
from .batches import RepeatedRowsMixin
from .checkpoints import CheckpointMixin
from .checks import refuse_uncorrectable
from .config import checkpointing_field
from .inputs import IMAGE_DEFAULTS, refuse_image_settings
from .packing import require_documents_apart
from .parallel import gathered_model
from .record import describe_data
from .rows import StartTokensMixin, WithinContext, limit_to_context, refuse_empty
from .training_inputs import fingerprint, sampled_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["full", "lora", "norms"]

#: Learning rate of the correction over the peak learning rate of the teacher's own training (arXiv 2408.11796 §3).
LEARNING_RATE_FACTOR = 0.2
#: Warm-up steps (arXiv 2408.11796 §3); a tenth of all steps where that is fewer.
WARMUP_STEPS = 120
#: Rank of the default adapter.
ADAPTER_RANK = 16
RECORD_NAME = "teacher_correction.json"
TEACHER_NAME, STATE_NAME = "corrected_teacher.safetensors", "corrected_teacher_optimizer.pt"


class CorrectionTrainer(CheckpointMixin, RepeatedRowsMixin, StartTokensMixin, AssistantTurnsMixin, SFTTrainer):
    """TRL's supervised trainer, with complete checkpoints, and the same losses in any number of processes."""


@checks_kinds
@with_locked_folder("output_dir")
def correct_teacher(
    teacher: PreTrainedModel | str | os.PathLike[str],
    train_dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    original_learning_rate: float,
    num_tokens: int,
    method: Method = "full",
    processing_class: PreTrainedTokenizerBase | None = None,
    eval_dataset: Any = None,
    max_length: int = 1024,
    peft_config: Any = None,
    **arguments: Any,
) -> Path:
    """Fine-tune the unpruned teacher on the distillation corpus with cross-entropy; resumes an interrupted run.

    Each process uses one device; several take `accelerate launch`.

    Args:
        teacher: a path or Hub id, or a model, which is trained in place.
        train_dataset: corpus, as for `trl.SFTTrainer`.
        output_dir: folder for the checkpoints, then for the corrected teacher and its tokenizer.
        original_learning_rate: peak learning rate of the teacher's own training; a fifth of it is used.
        num_tokens: number of training tokens; Sreenivas et al. 2024 (arXiv 2408.11796) used about 100 billion.
        method: weights to train: `"full"`, all of them; `"lora"`, an adapter, which is merged; `"norms"`, the norms
            only. The paper leaves open which method suffices.
        processing_class: tokenizer; by default the one in the teacher's folder.
        eval_dataset: held-out corpus.
        max_length: tokens of a row; texts are joined into full rows.
        peft_config: config of the adapter; default: LoRA of rank 16 on all linear layers.
        **arguments: fields of `trl.SFTConfig` (`per_device_train_batch_size`, `seed`, …).

    Returns:
        The folder of the corrected teacher, a stock model in the dtype of the given one.

    Raises:
        DataError: if the method is unknown or a number is out of range.
        OutputError: if the folder cannot be written, is the teacher's own, or another run uses it.
        UnsupportedModelError: if the teacher is quantised, or has an adapter.
        MismatchError: if the folder holds a checkpoint of another training.
    """
    _require_request(method, original_learning_rate, num_tokens)
    refuse_own_folder(output_dir, teacher=teacher)
    folder = require_writable(output_dir)
    if processing_class is None and not isinstance(teacher, nn.Module):
        processing_class = load_tokenizer(teacher)
    refuse_other_tokenizers(processing_class, teacher=teacher)
    model = load_model(teacher)
    rate = LEARNING_RATE_FACTOR * original_learning_rate
    images = IMAGE_DEFAULTS if holds_images(train_dataset) else {}
    arguments = {"learning_rate": rate, "max_length": max_length, **images, **arguments}
    if images:
        refuse_image_settings(arguments)
    args = _training_arguments(folder, model, num_tokens, arguments)
    correction = _Correction(model, args, method, original_learning_rate)
    correction.train(train_dataset, eval_dataset, processing_class, peft_config)
    return folder


def _require_request(method: str, original_learning_rate: float, num_tokens: int) -> None:
    if method not in get_args(Method):
        raise DataError(f"method={method!r}: expected one of {', '.join(get_args(Method))}.")
    for name, value in (("original_learning_rate", original_learning_rate), ("num_tokens", num_tokens)):
        if not value > 0:
            raise DataError(f"{name}={value!r}: expected a number above 0.")


def _training_arguments(
    output_dir: Path, model: PreTrainedModel, num_tokens: int, arguments: Mapping[str, Any]
) -> SFTConfig:
    """Arguments of the trainer: defaults that fit the machine, and as many steps as the tokens need."""
    device = training_device(bool(arguments.get("use_cpu", False)))
    on_cpu = device.type == "cpu"
    defaults = {
        "lr_scheduler_type": "cosine",
        "packing": True,
        "packing_strategy": "wrapped",
        "bf16": has_fast_bf16(device),
        "use_cpu": on_cpu,
        checkpointing_field(): not on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": 0.05,
        "save_steps": 0.25,
        "save_total_limit": 1,
        "report_to": "none",
    }
    args = on_one_device(SFTConfig(str(output_dir), **{**defaults, **arguments}))
    limit_to_context(args, teacher=model.config)
    args.max_steps = math.ceil(num_tokens / _tokens_per_step(args))
    args.warmup_steps = arguments.get("warmup_steps", min(WARMUP_STEPS, args.max_steps // 10))
    return args


def _tokens_per_step(args: Any) -> int:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
    return rows * args.max_length


@dataclass(frozen=True)
class _Correction:
    """One correction of a teacher.

    Attributes:
        model: the teacher.
        args: of the trainer.
        method: what is trained.
        original_learning_rate: for the record.
    """

    model: PreTrainedModel
    args: SFTConfig
    method: Method
    original_learning_rate: float

    def train(self, train_dataset: Any, eval_dataset: Any, processing_class: Any, peft_config: Any) -> None:
        """Train the teacher, from the last checkpoint if there is one, and save it; see `correct_teacher`."""
        stored = self.model.dtype
        self._make_trainable()
        refuse_empty(train_dataset, "train")
        described = describe_data(train_dataset)
        trainer = self._trainer(train_dataset, eval_dataset, processing_class, peft_config)
        trainer.train_or_resume()
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trained = gathered_model(trainer)
        if trainer.is_world_process_zero():
            trained = trained.merge_and_unload() if is_peft_model(trained) else trained
            self._save(trained, stored, processing_class, described, trainer.state.log_history)
        trainer.accelerator.wait_for_everyone()  # the others would find a folder without the teacher

    def _make_trainable(self) -> None:
        refuse_uncorrectable(self.model)
        self.model.float()  # small updates are lost in half precision
        self.model.requires_grad_(True)  # a model that was a teacher before is frozen
        if self.method == "norms":
            train_norms_only(self.model)

    def _trainer(self, train_dataset: Any, eval_dataset: Any, processing_class: Any, peft_config: Any) -> Any:
        if self.method == "lora" and peft_config is None:
            from peft import LoraConfig

            alpha = 2 * ADAPTER_RANK
            peft_config = LoraConfig(
                r=ADAPTER_RANK, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        set_seed(self.args.seed)  # for an adapter, which is made before the trainer seeds itself
        with without_checkpointing_warning():
            trainer: Any = CorrectionTrainer(
                model=self.model,
                args=self.args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config if self.method == "lora" else None,
            )
        trainer.remove_callback(PrinterCallback)  # without bars it would print every log
        require_documents_apart(trainer, teacher=trainer.model)
        if trains_on_images(trainer):
            trainer.data_collator = ImageCollator.around(trainer.data_collator, processing_class, self.model.config)
        trainer.data_collator = WithinContext(trainer.data_collator, context_length(self.model.config))
        weights = fingerprint(trainer.model)
        trainer._record_inputs(teacher=weights, data=sampled_data(train_dataset), method=self.method)
        return trainer

    def _save(self, trained: Any, dtype: torch.dtype, processing_class: Any, data: Any, log: Any) -> None:
        """Save the corrected teacher with its record into the output folder."""
        folder = Path(str(self.args.output_dir))
        trained.requires_grad_(True)
        trained.config.use_cache = True
        vars(trained.config).pop("auto_map", None)  # names files of the teacher's folder
        with replacing_folder(folder / "unfinished") as temporary:
            save_model(in_stored_dtype(trained, dtype), temporary, processing_class)
            record = {
                "versions": versions(),
                "teacher": public_name(trained.config.name_or_path),
                "method": self.method,
                "original_learning_rate": self.original_learning_rate,
                "learning_rate": self.args.learning_rate,
                "num_tokens": self.args.max_steps * _tokens_per_step(self.args),
                "data": data,
                "log_history": log,
            }
            write_artefact(temporary / RECORD_NAME, record)
        move_into(folder / "unfinished", folder)


def train_norms_only(model: PreTrainedModel) -> None:
    """Freeze all parameters but the weights and biases of the norms in the family's table.

    Raises:
        UnsupportedModelError: if the family is unknown, or its norms have no weights.
    """
    spec = spec_for(model.config)
    norms = {
        pattern.rpartition(".")[0]
        for pattern, dimensions in spec.dimensions.items()
        if pattern.endswith(".weight") and len(dimensions) == 1 and "norm" in pattern.lower()
    } | {name.rpartition(".")[0] for name in spec.residual_norms}
    model.requires_grad_(False)
    found = False
    for name, parameter in model.named_parameters():
        located = spec.locate(name)
        if located is not None and located[0].rpartition(".")[0] in norms:
            parameter.requires_grad_(True)
            found = True
    if not found:
        raise UnsupportedModelError(
            f"The norms of '{spec.model_type}' models have no weights. Use method='lora' or 'full'."
        )


def cross_entropy_sum(hidden_NH: Tensor, head: OutputHead, labels_N: Tensor) -> Tensor:
    """Sum of the cross-entropy over tokens, with the head applied to a chunk of tokens at a time.

    Args:
        hidden_NH: [N, H], hidden states after the final norm.
        head: the output head.
        labels_N: int64 [N], the true next tokens.
    """

    def of_chunk(states: Tensor, labels: Tensor) -> Tensor:
        logits = head_logits(states, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    size = default_chunk_size(hidden_NH.shape[0], head.vocab_size, hidden_NH.device)
    sums: list[Tensor] = [
        checkpoint(of_chunk, states, labels, use_reentrant=False)
        for states, labels in zip(hidden_NH.split(size), labels_N.split(size))
    ]
    return torch.stack(sums).sum() if sums else hidden_NH.sum() * 0


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over all processes.

    Batches without images have no gradients of what reads images. They count as zeros where another process has some;
    where none has, there is still none, so that the optimizer leaves these weights as they are.
    """
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    there = there.to(parameters[0].device)
    torch.distributed.all_reduce(there)
    for parameter, count in zip(parameters, there.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


class ConcurrentCorrection(TrainerCallback):
    """Trains the teacher by cross-entropy on the batches that the student learns from.

    The teacher has its own AdamW and the schedule of the student, at a fifth of the peak learning rate of its own
    training. Each process holds the whole teacher; gradients are averaged before each step.

    Args:
        teacher: trained in place, in float32 weights.
        original_learning_rate: the peak learning rate that it was trained with.
    """

    def __init__(self, teacher: PreTrainedModel, original_learning_rate: float) -> None:
        self.teacher = teacher
        self.learning_rate = LEARNING_RATE_FACTOR * original_learning_rate
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self.resume_from: Path | None = None
        teacher.float().requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained."""
        return (parameter for parameter in self.teacher.parameters() if parameter.requires_grad)

    def load(self, folder: Path) -> None:
        """Load the teacher from a checkpoint; the optimizer is loaded when training begins.

        Raises:
            MismatchError: if the checkpoint has no corrected teacher.
        """
        if not (folder / TEACHER_NAME).is_file() or not (folder / STATE_NAME).is_file():
            raise MismatchError(
                f"The checkpoint {folder} has no corrected teacher: it was written without teacher correction. "
                "Resume with the arguments of that run, or start again."
            )
        load_weights(self.teacher, folder / TEACHER_NAME)
        self.resume_from = folder

    def save(self, folder: Path) -> None:
        """Write the teacher and the state of its optimizer into a checkpoint."""
        assert self.optimizer is not None
        with replacing_file(folder / TEACHER_NAME) as temporary:
            save_weights(self.teacher, os.fspath(temporary))
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        with replacing_file(folder / STATE_NAME) as temporary:
            torch.save(state, temporary)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the optimizer; after a resume, with the state of the checkpoint."""
        self.optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.get_warmup_steps(state.max_steps),
            num_training_steps=state.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if self.resume_from is not None:
            stored = torch.load(self.resume_from / STATE_NAME, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(stored["optimizer"])
            self.scheduler.load_state_dict(stored["scheduler"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a step of the teacher's optimizer, after the student's."""
        assert self.optimizer is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            average_gradients(list(self.parameters()))
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(list(self.parameters()), args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
