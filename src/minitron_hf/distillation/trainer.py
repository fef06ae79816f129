"""Distillation on a corpus: `DistillationTrainer`, on top of TRL's supervised trainer."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from trl import SFTTrainer

from ..errors import DataError, MismatchError, OutputError, UnsupportedModelError
from ..files import public_name, require_writable, versions, write_json
from ..losses.fused import (
    DenseSignal,
    TeacherSignal,
    base_model_of,
    check_output_head,
    next_token_positions,
    output_head,
)
from ..models import empty_model, load_config, load_model
from ..publishing.card import write_model_card
from ..publishing.hub import push_student_to_hub, write_teacher_metadata
from .batches import (
    CACHED,
    LOG_PROBS,
    LOG_TAIL,
    STATES,
    TOKENS,
    CountsRowsOnce,
    WithCachedTeacher,
    WithRowLengths,
    model_inputs,
    row_of_positions,
)
from .checks import refuse_lone_processes, refuse_pair, refuse_split_model, refuse_wrapped_head
from .config import DistillationConfig, has_fast_bf16, is_fast, trains_on_cpu
from .correction import ConcurrentCorrection, cross_entropy_sum
from .intermediate import PROJECTION, IntermediateLosses, state_pairs, wanted_states
from .parallel import (
    LossRequest,
    distilling_forward,
    forward_of_backbone,
    gathered_model,
    keep_losses_whole,
    offload_layers,
    shard_teacher,
    whole_head,
    whole_projection,
)
from .record import RECORD_NAME, RECORDED_ARGUMENTS, describe_data
from .teacher_cache import TeacherCache, cached_signal, opened

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from huggingface_hub import CommitInfo
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from ..pruning.plan import PruningPlan

logger = logging.getLogger(__name__)

#: How a student came to be; kept beside it wherever it is saved.
ORIGIN_FILES = ("pruning_plan.json", "pruning_plan.safetensors", "pruner_config.json", "scores.safetensors")

#: What is summed over tokens and logged, beside the intermediate losses.
_COLUMNS = ("divergence", "kl", "ce", "agreement")

#: Config fields that the libraries change for training, and that a saved student gets back.
TRAINING_FIELDS = ("use_cache", "output_router_logits", "router_aux_loss_coef")


class DistillationTrainer(CountsRowsOnce, SFTTrainer):
    """Distil on a corpus, unlike TRL's trainer of the same name, which samples from the student and needs prompts.

    The student learns the teacher's distribution at every token of `train_dataset` that counts (all of them, or those
    of the completion or the assistant). Everything else is `trl.SFTTrainer`: datasets, packing, chat templates, PEFT,
    quantised loading, callbacks. The loss runs both output heads over token chunks, so no logits of whole batches
    exist.

    Logs `loss`, `divergence`, `kl`, `ce` and `agreement` (top-1, with the teacher), where they are part of the loss
    also `hidden`, `embedding` and their weight `alpha`, and `eval_…` of each as exact means over the tokens of the
    evaluation set. What it saves is the stock student, the plan it was pruned by, and `distillation.json`.

    Args:
        model: the student: a model, or a path or Hub id.
        teacher_model: the teacher: a model, or a path or Hub id. It is put into evaluation mode, frozen, and moved to
            the training device. It must share the student's vocabulary. None where all data is cached.
        args: a `DistillationConfig`.
        data_collator: see `trl.SFTTrainer`, like all the following but `pruning_plan`.
        train_dataset: corpus; or `load_teacher_cache(folder)`, which holds what the teacher says of one.
        eval_dataset: held-out corpus, or several by name, likewise.
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
            in the folder it was loaded from. After several rounds of pruning, the plans of all from the teacher on, of
            which the last is saved.

    Raises:
        MismatchError: if teacher and student have different vocabularies or are the same object; or a cache was
            written by another teacher, with another tokenizer or other arguments.
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
        teacher_model: str | os.PathLike[str] | PreTrainedModel | Any | None = None,
        args: DistillationConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | TeacherCache | None = None,
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
        pruning_plan: PruningPlan | Sequence[PruningPlan] | None = None,
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
        self._datasets = {"train": _described(train_dataset), "eval": _described(eval_dataset)}
        train_dataset, train_caches = opened(train_dataset, "train_dataset")
        eval_dataset, eval_caches = opened(eval_dataset, "eval_dataset")
        self._caches: list[TeacherCache] = [*train_caches, *eval_caches]
        if teacher_model is not None:
            teacher_config = _config_of(teacher_model, teacher_kwargs)
        elif not train_caches:
            raise MismatchError(
                "There is no teacher: teacher_model is None, and train_dataset is no teacher cache. Pass a teacher, "
                "or load_teacher_cache(folder) as train_dataset."
            )
        else:
            teacher_config = self._caches[0].teacher_config
        refuse_pair(model, teacher_model, student_config, teacher_config, peft_config)
        if isinstance(model, nn.Module):
            _cast_student(model, args, trains_all=peft_config is None and not is_peft_model(model))

        self._stock_fields = {
            name: getattr(student_config.get_text_config(), name)
            for name in TRAINING_FIELDS
            if hasattr(student_config.get_text_config(), name)
        }
        self._student_name: str | None = student_config._name_or_path or None
        for caches, packing in ((train_caches, args.packing), (eval_caches, _eval_packing(args))):
            for cache in caches:
                cache.require_arguments(args, packing=packing)
        self.teacher_model: Any = None
        self._has_teacher = teacher_model is not None
        if pruning_plan is None:
            pruning_plan = getattr(base_model_of(model), "pruning_plan", None)
        if pruning_plan is not None and not isinstance(pruning_plan, Sequence):
            pruning_plan = [pruning_plan]
        self._plans = pruning_plan or ()
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
        refuse_lone_processes(self.accelerator)
        if self.is_fsdp_enabled:
            keep_losses_whole(self.accelerator.state.fsdp_plugin)
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise UnsupportedModelError(
                "Context, sequence and tensor parallelism are not supported in distillation; use DDP, FSDP2 or "
                "DeepSpeed."
            )

        student = base_model_of(self.model)
        refuse_split_model(student, "student")
        refuse_wrapped_head(student)
        # In place of TRL's own fused forward, which computes a cross-entropy alone.
        student.forward = types.MethodType(distilling_forward(type(student)), student)
        # Tokens are always counted: `compute_loss` divides by the count over the accumulated batches.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        if self.padding_free:
            self.data_collator = WithRowLengths(self.data_collator)
        self.data_collator = WithCachedTeacher(self.data_collator)

        self._teacher_name = _name_of(teacher_model) if self._has_teacher else teacher_config._name_or_path or None
        self._teacher_revision = teacher_kwargs.get("revision") or getattr(teacher_config, "_commit_hash", None)
        if self._has_teacher:
            self.teacher_model = self._prepare_teacher(teacher_model, teacher_kwargs)
        else:
            check_output_head(self.model, role="student")
        self._correction = self._teacher_correction()
        self._teacher_loss: Tensor | None = None
        self._intermediate = self._intermediate_losses(student.config, teacher_config)
        self._teacher_vocab_size = teacher_config.get_text_config().vocab_size
        for cache in self._caches:
            cache.require_tokenizer(self.processing_class)
            cache.require_states(wanted_states(self._intermediate.pairs, "teacher"))
        self._columns = (*_COLUMNS, *dict.fromkeys(pair.term for pair in self._intermediate.pairs))
        self._token_sums = {mode: self._no_sums() for mode in ("train", "eval")}

    # ---- Teacher ----

    def _prepare_teacher(self, teacher_model: Any, init_kwargs: dict[str, Any]) -> Any:
        """Load, freeze and place the teacher with the same Accelerate plugin as the student."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not isinstance(teacher_model, nn.Module):
            teacher_model = load_model(teacher_model, **{"dtype": "auto", **init_kwargs})
        elif self.args.teacher_model_init_kwargs:
            logger.warning("teacher_model_init_kwargs are ignored: the teacher is a model already.")
        for cache in self._caches:
            cache.require_teacher(teacher_model)
        teacher_model.requires_grad_(False)
        teacher_model.eval()
        slow = not is_fast(teacher_model.dtype, self.accelerator.device.type == "cpu") and "dtype" not in init_kwargs
        if slow and not getattr(teacher_model, "is_quantized", False):
            logger.info("The teacher is computed in float32: this hardware is slow in %s.", teacher_model.dtype)
            teacher_model.float()
        if sharded and self.args.teacher_offload:
            raise UnsupportedModelError(
                "teacher_offload: FSDP and DeepSpeed split the teacher over the devices. Leave it out, or have the "
                "configuration keep all shards in main memory (fsdp_offload_params, offload_param_device)."
            )
        if not sharded:
            if self.args.teacher_offload:
                offload_layers(teacher_model, self.accelerator.device)
            elif getattr(teacher_model, "hf_device_map", None) is None:
                teacher_model.to(self.accelerator.device)
            check_output_head(self.model, role="student")
            check_output_head(teacher_model, role="teacher")
            return teacher_model
        if self.is_deepspeed_enabled:
            from trl.models.utils import prepare_deepspeed

            return prepare_deepspeed(teacher_model, self.accelerator)
        return shard_teacher(teacher_model, self.accelerator)

    def _teacher_correction(self) -> ConcurrentCorrection | None:
        """What lets the teacher go on learning, if it shall."""
        if self.args.teacher_correction is None:
            return None
        teacher = self.teacher_model
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or getattr(teacher, "hf_device_map", None):
            raise UnsupportedModelError(
                "teacher_correction='concurrent' needs the whole teacher on every device. Use one device or DDP, or "
                "correct the teacher beforehand with correct_teacher."
            )
        if getattr(teacher, "is_quantized", False):
            raise UnsupportedModelError(
                "teacher_correction='concurrent' cannot train a quantised teacher. Load it without "
                "quantization_config, or correct it beforehand with correct_teacher(…, method='lora')."
            )
        assert self.args.teacher_original_learning_rate is not None  # checked by the arguments
        correction = ConcurrentCorrection(teacher, self.args.teacher_original_learning_rate)
        self.add_callback(correction)
        return correction

    def _teacher_signal(
        self, inputs: dict[str, Any], positions: Tensor, targets: Tensor
    ) -> tuple[TeacherSignal, tuple[Tensor, ...]]:
        """What the teacher says about the same inputs at `positions` of the flattened batch, and its states there.

        A teacher that goes on learning has its own loss computed on the way, which `compute_loss` takes up.
        """
        learns = self._correction is not None and self.model.training and torch.is_grad_enabled()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        teacher.eval()
        wanted = wanted_states(self._intermediate.pairs, "teacher")
        extra = {"output_hidden_states": wanted} if wanted else {}
        with torch.set_grad_enabled(learns), self.accelerator.autocast(), forward_of_backbone(teacher):
            # Called through the wrapper, if there is one, whose hooks gather sharded parameters.
            output = self.teacher_model(**inputs, **extra, use_cache=False)
        head = whole_head(output_head(teacher))
        h_NH = output.last_hidden_state.flatten(0, 1).index_select(0, positions).to(head.weight.device)
        states = self._intermediate.teacher_states(output.hidden_states, positions) if wanted else ()
        if learns:
            with self.accelerator.autocast():
                self._teacher_loss = cross_entropy_sum(h_NH, head, targets)
        return DenseSignal(h_NH.detach(), head), tuple(h.detach() for h in states)

    # ---- Data ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        states = [f"{STATES}{index}" for index in wanted_states(self._intermediate.pairs, "teacher")]
        kept = (TOKENS, LOG_PROBS, LOG_TAIL, *states)
        self._signature_columns: Any = list(dict.fromkeys([*(self._signature_columns or ()), *kept]))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows of a dataset; those of a cache are ready."""
        if any(dataset is cache.dataset for cache in self._caches):
            return dataset
        rows, caches = opened(dataset, "The dataset")
        for cache in caches:  # given to `evaluate`
            cache.require_arguments(self.args, packing=_eval_packing(self.args))
            cache.require_tokenizer(self.processing_class)
            cache.require_states(wanted_states(self._intermediate.pairs, "teacher"))
            if self.teacher_model is not None:
                cache.require_teacher(self.accelerator.unwrap_model(self.teacher_model))
            return rows
        if not self._has_teacher:
            raise MismatchError(
                "Rows without a teacher: teacher_model is None, and this dataset is no teacher cache. Pass a teacher, "
                "or load_teacher_cache(folder) for evaluation too."
            )
        return super()._prepare_dataset(dataset, *args, **kwargs)

    # ---- Intermediate losses ----

    def _intermediate_losses(self, student_config: Any, teacher_config: Any) -> IntermediateLosses:
        configs = [config.get_text_config() for config in (student_config, teacher_config)]
        pairs = state_pairs(
            self.args.hidden_loss,
            self.args.embedding_loss,
            self.args.hidden_layers,
            depth=configs[0].num_hidden_layers,
            teacher_depth=configs[1].num_hidden_layers,
        )
        width, teacher_width = (config.hidden_size for config in configs)
        return IntermediateLosses(pairs, width, teacher_width, self.args.intermediate_weight, self._plans)

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """The map to the teacher's width as a module of the student, unless it is one already."""
        student = base_model_of(self.accelerator.unwrap_model(self.model))
        if hasattr(student, PROJECTION):
            yield
            return
        self._intermediate.attach(student)
        try:
            yield
        finally:
            self._intermediate.detach(student)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`."""
        with self._attached():
            return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimiser step, before which the weight of the intermediate losses is set."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._intermediate:
            if self._intermediate.weight is None and self._intermediate.step_sums is None:
                self.model.train()
                with torch.no_grad():  # before the first step there is none to take it from
                    for batch in batches:
                        self._token_losses(self.model_wrapped, self._prepare_inputs(batch))
            self._intermediate.begin_step(self._sum_over_processes)
        return batches, num_items

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(_sum_dtype(values.device)), "sum")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._intermediate:
            self._intermediate.load(Path(resume_from_checkpoint))
        if self._correction is not None:
            self._correction.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled and self._intermediate:
            self._intermediate.load(Path(checkpoint))  # DeepSpeed loads the model itself, and nothing beside it

    # ---- Loss ----

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the tokens that count, from the wrapped student; and their positions in the flattened batch."""
        labels = inputs.get("labels")
        if labels is None:
            raise DataError("A batch has no labels, so no token counts. Use a data collator that returns labels.")
        positions, targets = next_token_positions(labels)
        if CACHED in inputs:
            wanted = [pair.teacher for pair in self._intermediate.pairs]
            signal, states = cached_signal(inputs, positions, self._teacher_vocab_size, wanted)
        else:
            signal, states = self._teacher_signal(model_inputs(inputs), positions, targets)
        names = ("divergence", "jsd_beta", "temperature", "kd_weight", "ce_weight")
        options = {**{name: getattr(self.args, name) for name in names}, "chunk_size": self.args.loss_chunk_size}
        request = LossRequest(signal, positions, targets, options, self._intermediate.pairs, states)
        losses = model(**model_inputs(inputs), distillation=request)
        if self._intermediate:
            extra = torch.stack([losses[term].sum() for term in self._columns[len(_COLUMNS) :]]).sum()
            if model.training:
                scale = self.args.kd_weight * self.args.temperature**2
                self._intermediate.add(scale * losses["divergence"].sum(), extra)
            losses["total"] = losses["total"] + (self._intermediate.weight or 0.0) * extra
        return losses, positions

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
        count: Any
        if num_items_in_batch is None:  # a batch of its own, outside the training loop
            count = max(len(positions), 1)
            if self.model.training:
                count = count * self.current_gradient_accumulation_steps
        else:
            count = torch.as_tensor(num_items_in_batch).clamp(min=1).to(losses["total"].device)
            if self.args.average_tokens_across_devices:
                # The count is that of all processes, over which DDP will take the mean of the gradients.
                count = count / self.accelerator.num_processes
        loss = losses["total"] / count
        if self._teacher_loss is not None:
            (self._teacher_loss / count).backward()
            self._teacher_loss = None
        if self.model.training:
            self._token_sums["train"] += self._sums(losses).sum(0)
        return (loss, losses) if return_outputs else loss

    def _no_sums(self) -> Tensor:
        shape = (len(self._columns) + 1,)
        return torch.zeros(shape, dtype=_sum_dtype(self.accelerator.device), device=self.accelerator.device)

    def _sums(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Every logged loss, and 1, per token: [N, columns + 1], ready to be summed."""
        columns = [losses[name].detach() for name in self._columns]
        columns.append(torch.ones_like(columns[0]))
        return torch.stack([column.to(_sum_dtype(column.device)) for column in columns], 1)

    def _means(self, sums: Tensor) -> dict[str, float]:
        """Logged values from sums over tokens, on the CPU."""
        *values, count = sums.double().cpu().tolist()
        if not count:
            return {}
        means = {name: value / count for name, value in zip(self._columns, values, strict=True)}
        loss = self.args.kd_weight * self.args.temperature**2 * means["divergence"] + self.args.ce_weight * means["ce"]
        if self._intermediate:
            means["alpha"] = self._intermediate.weight or 0.0
            loss += means["alpha"] * sum(means[term] for term in self._columns[len(_COLUMNS) :])
        if self.args.divergence == "forward_kl":
            del means["divergence"]  # the same as `kl`
        return {"loss": loss, **means}

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
            row_of_position, num_rows = row_of_positions(inputs)
            sums = torch.zeros((num_rows, len(self._columns) + 1), dtype=_sum_dtype(loss.device), device=loss.device)
            sums.index_add_(0, row_of_position[positions].to(loss.device), self._sums(losses))
            self._token_sums["eval"] += self.accelerator.gather_for_metrics(sums).sum(0)
            if prediction_loss_only:
                return loss.detach(), None, None
            return loss.detach(), model(**model_inputs(inputs), use_cache=False).logits.detach(), inputs["labels"]

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
        with self._attached():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
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
        """
        output_dir = Path(output_dir or _output_dir(self.args))
        base = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            base = gathered_model(self)
        elif is_peft_model(base) and self.args.should_save:
            base = copy.deepcopy(base).merge_and_unload()
        if not self.args.should_save:
            return
        state_dict = base.state_dict()
        state_dict.pop(f"{PROJECTION}.weight", None)
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
        if self._plans:
            self._plans[-1].save_pretrained(folder)
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
            "teacher_cache": [cache.manifest["settings"] for cache in self._caches] or None,
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
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._correction is not None and self.args.should_save:
            self._correction.save(folder)
        if self._intermediate:
            weight = self._intermediate.next_weight(self._sum_over_processes)
            map_ = whole_projection(self._intermediate.projection)
            if self.args.should_save:
                self._intermediate.save(folder, weight, map_)

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


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@contextlib.contextmanager
def _writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full disk or a forbidden folder raises into one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write to {folder}: {error}. Free space or choose another folder.") from error


def _cast_student(model: Any, args: DistillationConfig, *, trains_all: bool) -> None:
    """Give a half-precision student float32 weights, where training needs them or the hardware is slow without."""
    if getattr(base_model_of(model), "is_quantized", False):
        return
    on_cpu = trains_on_cpu(args.use_cpu)
    slow = {torch.float16} if on_cpu else set()
    if not has_fast_bf16(on_cpu):
        slow.add(torch.bfloat16)
    if model.dtype in slow or (trains_all and args.upcast_student and model.dtype in (torch.float16, torch.bfloat16)):
        logger.info("The student's %s weights are trained in float32.", model.dtype)
        model.float()


def _eval_packing(args: DistillationConfig) -> bool:
    return args.packing if args.eval_packing is None else args.eval_packing


def _described(data: Any) -> dict[str, Any] | None:
    """What the record says of data: of a cache, what it was made from."""
    if isinstance(data, TeacherCache):
        return data.manifest["data"]["given"]
    if isinstance(data, Mapping) and any(isinstance(part, TeacherCache) for part in data.values()):
        data = {name: part.dataset if isinstance(part, TeacherCache) else part for name, part in data.items()}
    return describe_data(data)


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
