"""Distillation on a corpus: `DistillationTrainer`, on top of TRL's supervised trainer."""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..compat import forget_preparation, without_checkpointing_warning
from ..data.context import shortest_context
from ..data.images import PLACE
from ..errors import DataError, MismatchError
from ..evaluation.callback import MeasurementCallback
from ..files import refuse_own_folder, require_writable
from ..losses.fused import next_token_positions
from ..losses.heads import base_model_of, check_output_head
from ..models import savable_generation_config
from .adapters import disable_peft_card, refuse_split_tie, refuse_unmergeable, save_base_model, source_name
from .arguments import (
    as_distillation_config,
    config_of,
    eval_packing,
    in_training_dtype,
    kwargs_dict,
    refuse_unused_loading_arguments,
    upcast_trained,
)
from .assistant_turns import AssistantTurnsMixin
from .batches import CACHED, LABELS, STATES, RepeatedRowsMixin, model_inputs
from .cache_coding import SIGNAL_COLUMNS
from .checkpoints import CheckpointMixin
from .checks import (
    freeze_embeddings,
    refuse_data_parallel,
    refuse_frozen,
    refuse_frozen_embeddings,
    refuse_injected_adapter,
    refuse_launch,
    refuse_pair,
    refuse_resized,
    refuse_split_model,
    refuse_tensor_parallel,
    refuse_top_k,
    refuse_unknown_tokens,
    refuse_wrapped_head,
)
from .compilation import compile_layers, leave_models_whole
from .config import DistillationConfig
from .cut_vocabulary import KeptTokens, checked_tokenizer, kept_tokens, plans_of, require_own_caches
from .fake_quantization import fake_quantize
from .inputs import TeacherSource, TrainingData
from .intermediate import needed_states
from .intermediate_steps import IntermediateLossMixin
from .packing import require_documents_apart
from .parallel import LossRequest, distilling_forward, keep_losses_in_float32
from .rows import (
    StartTokensMixin,
    choose_rows,
    limit_to_context,
    training_collator,
    try_first_images,
    warn_of_missing_start,
)
from .saving import TRAINING_FIELDS, SavingMixin, output_dir_of
from .split_checkpoints import SplitCheckpointMixin
from .teacher import TeacherMixin
from .teacher_cache import TeacherCache, cached_signal, rows_and_caches
from .token_means import COLUMNS, TokenMeansMixin
from .training_inputs import fingerprint, sampled_data

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback

    from ..pruning.plan import PruningPlan

logger = logging.getLogger(__name__)


class DistillationTrainer(
    TeacherMixin,
    CheckpointMixin,
    SplitCheckpointMixin,
    SavingMixin,
    IntermediateLossMixin,
    TokenMeansMixin,
    RepeatedRowsMixin,
    StartTokensMixin,
    AssistantTurnsMixin,
    SFTTrainer,
):
    """Distil on a corpus, unlike TRL's trainer of the same name, which samples from the student and needs prompts.

    The student learns the teacher's distribution at every token of `train_dataset`, or only at the tokens of the
    completion or the assistant. Datasets, packing, chat templates, PEFT, quantised loading and callbacks
    work as in `trl.SFTTrainer`. The loss applies both output heads to chunks of tokens, so the logits of a whole
    batch are never in memory.

    Logs `loss`, `divergence`, `kl`, `ce` and `agreement` (top-1, with the teacher), in training over the outcomes of
    `top_k` where that is set; `hidden`, `embedding` and their weight `alpha` if they are part of the loss; and TRL's
    `entropy`, `mean_token_accuracy` (top-1, with the true tokens) and `num_tokens`. Evaluation logs `eval_…` of each
    as exact means over the tokens of the evaluation set. Saves the stock student, its pruning plan and
    `distillation.json`.

    Args:
        model: the student: a model, or a path or Hub id.
        teacher_model: the teacher: a model, or a path or Hub id. It is put into evaluation mode, frozen, and moved to
            the training device. It must share the student's vocabulary, or the student's plan has cut it. None if all
            data is cached.
        args: a `DistillationConfig`.
        data_collator: makes batches of rows; by default TRL's collator for the data.
        train_dataset: corpus, with images for a vision-language model; or `load_teacher_cache(folder)`, a corpus with
            precomputed teacher logits.
        eval_dataset: held-out corpus or teacher cache, or several by name.
        processing_class: tokenizer of both models, for images their processor; where the student's plan cuts the
            vocabulary, of either.
        compute_metrics: metrics from the student's logits; costs a second forward pass and [batch, length, vocabulary]
            memory in evaluation.
        callbacks: trainer callbacks.
        optimizers: optimizer and scheduler.
        optimizer_cls_and_kwargs: optimizer class and arguments.
        preprocess_logits_for_metrics: reduces logits before they are gathered for `compute_metrics`.
        quantization_config: quantisation of a student that is loaded from a path or Hub id.
        peft_config: trains an adapter; `save_student` merges it into a stock model.
        formatting_func: function that returns the text of a row.
        pruning_plan: the plan of the student; default: the one that `prune_model` attached to the model, or the one in
            its folder. After several rounds of pruning, the plans of all rounds in order; the last one is saved.

    Raises:
        MismatchError: if teacher and student have different vocabularies or are the same object; or a cache was
            written by another teacher, with another tokenizer or other arguments.
        UnsupportedModelError: if the loss cannot reproduce the model's logits: an adapter on the output head, prompt
            learning, an unknown logit post-processing, `nn.DataParallel`.
    """

    _tag_names = ["trl", "minitron", "knowledge-distillation"]  # noqa: RUF012 (as in the base class)
    _name = "Minitron distillation"
    _paper = {  # noqa: RUF012
        "title": "LLM Pruning and Distillation in Practice: The Minitron Approach",
        "id": "2408.11796",
    }
    #: `compute_loss` divides by the token count of the whole optimizer step.
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
        args = as_distillation_config(args, model)
        refuse_data_parallel(model, args.n_gpu)
        refuse_unused_loading_arguments(args, model, quantization_config)
        kwargs = {"trust_remote_code": args.trust_remote_code, **kwargs_dict(args.model_init_kwargs)}
        student_config = config_of(model, kwargs)
        data = TrainingData.of(train_dataset, eval_dataset)
        teacher = TeacherSource.of(teacher_model, args, data.train_caches)
        plans = plans_of(model, pruning_plan)
        kept = require_own_caches(kept_tokens(model, plans, student_config, teacher.config), data)
        refuse_pair(model, teacher.model, student_config, teacher.config, peft_config, maps_tokens=kept is not None)
        refuse_top_k(args.top_k, teacher.config.get_text_config().vocab_size if kept is None else len(kept.ids))
        limit_to_context(args, student=student_config, teacher=teacher.config)
        model, args = in_training_dtype(model, args, student_config, peft_config, quantization_config)
        data.require_arguments(args, processing_class, student=student_config, teacher=teacher.config)
        self._remember_inputs(model, student_config, teacher, data, plans, kept)
        self._prepare_output_folder(model, args, student_config, peft_config, teacher)
        processing_class = checked_tokenizer(processing_class, model, student_config, teacher, kept, args)
        with without_checkpointing_warning():
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=data.train,
                eval_dataset=data.eval,
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
        choose_rows(self)
        self._prepare_student(student_config, teacher.config)
        self._prepare_teacher_side(teacher)
        self._prepare_losses(teacher.config)
        known = self._teacher_fingerprint or [cache.manifest["settings"]["teacher"] for cache in data.train_caches]
        self._record_inputs(student=fingerprint(self.model), teacher=known, data=sampled_data(data.train))

    # ---- Setting up ----

    def _remember_inputs(
        self,
        model: Any,
        student_config: PretrainedConfig,
        teacher: TeacherSource,
        data: TrainingData,
        plans: Sequence[PruningPlan],
        kept: KeptTokens | None,
    ) -> None:
        """Keep what other methods need of the arguments, also those that the base class calls in its `__init__`."""
        self.teacher_model: Any = None
        self._teacher_fingerprint: str | None = None
        self._has_teacher = teacher.model is not None
        self._teacher_name, self._teacher_revision = teacher.name, teacher.revision
        self._kept = kept
        self._vocab_size = teacher.config.get_text_config().vocab_size if kept is None else len(kept.ids)
        self._caches: list[TeacherCache] = data.caches
        self._datasets = dict(data.described)
        config = student_config.get_text_config()
        self._stock_fields = {name: getattr(config, name) for name in TRAINING_FIELDS if hasattr(config, name)}
        self._student_name = source_name(model)
        self._plans = plans

    def _prepare_output_folder(
        self,
        model: Any,
        args: DistillationConfig,
        student_config: PretrainedConfig,
        peft_config: PeftConfig | None,
        teacher: TeacherSource,
    ) -> None:
        """Refuse a folder that cannot be written, and save a base model that exists in memory only."""
        if args.freeze_embeddings:
            adapted = not isinstance(model, str) and is_peft_model(model)
            refuse_frozen_embeddings(has_adapter=peft_config is not None or adapted)
        folder = output_dir_of(args)
        refuse_own_folder(folder, student=model, teacher=teacher.model)
        require_writable(folder)
        if peft_config is not None:
            refuse_unmergeable(student_config, peft_config)
        if self._student_name is None and (peft_config is not None or is_peft_model(model)):
            save_base_model(model, folder, writes=args.should_save)

    def _prepare_student(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> None:
        """Check the student as the base class has set it up, and have its forward pass compute the loss."""
        refuse_launch(self.accelerator)
        refuse_tensor_parallel(self)
        if self.is_fsdp_enabled:
            keep_losses_in_float32(self.accelerator.state.fsdp_plugin)
        student = base_model_of(self.model)
        refuse_resized(student.config, self._vocab_size)
        refuse_split_model(student, "student")
        refuse_injected_adapter(self.model)
        refuse_wrapped_head(student)
        refuse_split_tie(student)
        refuse_frozen(self.model)
        upcast_trained(self.model, self.args)
        if student.generation_config is not None:
            student.generation_config = savable_generation_config(student.generation_config)
        if self.args.freeze_embeddings:
            freeze_embeddings(self.model)
        disable_peft_card(self.model)
        if method := self.args.fake_quantization:
            fake_quantize(self.model, method, is_split=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        forget_preparation(self.model)  # by another trainer, with whose forward method autocast would be lost
        # Replaces TRL's own fused forward, which computes only a cross-entropy.
        student.forward = types.MethodType(distilling_forward(type(student)), student)
        # Tokens are always counted: `compute_loss` divides by the count over the accumulated batches.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        context = shortest_context(student_config, teacher_config)
        self.data_collator = training_collator(self, context, self._vocab_size)
        try_first_images(self)

    def _prepare_teacher_side(self, teacher: TeacherSource) -> None:
        """Load and place the teacher, try both models on packed rows, and compile them."""
        if self._has_teacher:
            self.teacher_model = self._prepare_teacher(teacher.model, teacher.kwargs)
        else:
            check_output_head(self.model, role="student")
        require_documents_apart(self, student=self.model, teacher=self.teacher_model)
        warn_of_missing_start(self)
        self._compile()
        self._correction = self._teacher_correction()
        self._teacher_loss: Tensor | None = None

    def _prepare_losses(self, teacher_config: PretrainedConfig) -> None:
        """Set up intermediate losses, sums over tokens and measurements; check that the caches hold what they need."""
        self._intermediate = self._intermediate_losses(base_model_of(self.model).config, teacher_config)
        for cache in self._caches:
            cache.require_tokenizer(self.processing_class)
            cache.require_states(needed_states(self._intermediate.pairs, "teacher"))
        self._columns = (*COLUMNS, *dict.fromkeys(pair.term for pair in self._intermediate.pairs))
        self._token_sums = {mode: self._zero_sums() for mode in ("train", "eval")}
        if self.args.eval_tasks:
            measured = MeasurementCallback(
                self,
                tasks=self.args.eval_tasks,
                task_limit=self.args.eval_task_limit,
                include_path=self.args.eval_include_path,
                task_data=self.args.eval_task_data,
            )
            self.add_callback(measured)

    def _compile(self) -> None:
        """With `torch_compile`, compile both models, after the batches of other shapes that the checks tried."""
        if not self.args.torch_compile:
            return
        leave_models_whole(self.accelerator)
        how: Any = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
        compile_layers(base_model_of(self.model), "student", **how)
        if self.teacher_model is not None:
            compile_layers(self.accelerator.unwrap_model(self.teacher_model), "teacher", **how)

    # ---- Data ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        states = [f"{STATES}{index}" for index in needed_states(self._intermediate.pairs, "teacher")]
        kept = ("input_ids", LABELS, *SIGNAL_COLUMNS, *states, PLACE)
        self._signature_columns: Any = list(dict.fromkeys([*(self._signature_columns or ()), *kept]))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        """Make token rows of a dataset; the rows of a cache are ready."""
        if any(dataset is cache.dataset for cache in self._caches):
            return dataset
        rows, caches = rows_and_caches(dataset, "The dataset")
        for cache in caches:  # given to `evaluate`
            cache.require_arguments(self.args, packing=eval_packing(self.args))
            cache.require_tokenizer(self.processing_class)
            cache.require_states(needed_states(self._intermediate.pairs, "teacher"))
            if self.teacher_model is not None:
                cache.require_teacher(self.accelerator.unwrap_model(self.teacher_model))
            return rows
        if not self._has_teacher:
            raise MismatchError(
                "Rows without a teacher: teacher_model is None, and this dataset is not a teacher cache. Pass a "
                "teacher, or load_teacher_cache(folder) for evaluation too."
            )
        prepared = super()._prepare_dataset(dataset, processing_class, *args, **kwargs)
        refuse_unknown_tokens(prepared, self._vocab_size, processing_class)
        return prepared

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.push_checkpoint(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._intermediate:
            self._intermediate.load(Path(resume_from_checkpoint))
        if self._correction is not None:
            self._correction.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled and self._intermediate:
            self._intermediate.load(Path(checkpoint))  # DeepSpeed loads only the model

    # ---- Loss ----

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the tokens that count, and the positions of these tokens in the flattened batch."""
        labels = inputs.get("labels")
        if labels is None:
            raise DataError("A batch has no labels, so no token counts. Use a data collator that returns labels.")
        positions, targets = next_token_positions(labels)
        if CACHED in inputs:
            wanted = [pair.teacher for pair in self._intermediate.pairs]
            signal, states = cached_signal(inputs, positions, self._vocab_size, wanted)
        else:
            signal, states = self._teacher_signal(model_inputs(inputs), positions, targets)
        names = ("divergence", "jsd_beta", "temperature", "kd_weight", "ce_weight")
        options = {**{name: getattr(self.args, name) for name in names}, "chunk_size": self.args.loss_chunk_size}
        request = LossRequest(signal, positions, targets, options, self._intermediate.pairs, states)
        losses = model(**model_inputs(inputs), distillation=request)
        if self._intermediate:
            extra = torch.stack([losses[term].sum() for term in self._columns[len(COLUMNS) :]]).sum()
            if model.training:
                scale = self.args.kd_weight * self.args.temperature**2
                self._intermediate.add(scale * losses["divergence"].sum(), extra)
            losses["total"] = losses["total"] + (self._intermediate.weight or 0.0) * extra
        return losses, positions

    def _restore_progress(self) -> None:
        self._token_sums["train"] = self._zero_sums()  # a batch that did not fit may have left some
        self._teacher_loss = None
        super()._restore_progress()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the token losses divided by the number of tokens in the optimizer step, over all processes.

        This is the only place where token losses are reduced for training.
        """
        losses, positions = self._token_losses(model, inputs)
        count: Any
        if num_items_in_batch is None:  # a single batch, outside the training loop
            count = max(len(positions), 1)
            if self.model.training:
                count = count * self.current_gradient_accumulation_steps
        else:
            count = torch.as_tensor(num_items_in_batch).clamp(min=1).to(losses["total"].device)
            if self.args.average_tokens_across_devices:
                # DDP takes the mean of the gradients over the processes, and the count is over all of them. Processes
                # that share the tensors of a model share its rows.
                count = count / (self.accelerator.num_processes // self.get_tp_size())
        loss = losses["total"] / count
        if self._teacher_loss is not None:
            (self._teacher_loss / count).backward()
            self._teacher_loss = None
        if self.model.training:
            self._token_sums["train"] += self._values_per_token(losses).sum(0)
        return (loss, losses) if return_outputs else loss
