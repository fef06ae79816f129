"""Measures a model while it is trained: benchmark tasks, and KL and agreement with a reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..data import DataSource, token_rows
from ..data.tokens import text_tokenizer
from ..errors import DataError, UnsupportedModelError
from ..models import evaluating
from .limits import Limits, require_positive
from .presets import with_presets
from .quality import measure_quality
from .tasks import HarnessSettings, TaskSource, require_tasks, run_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


class MeasurementCallback(TrainerCallback):
    """Measures the model of any `transformers.Trainer` whenever the trainer evaluates.

    The results join the metrics of the evaluation, are logged, and can be `metric_for_best_model`:
    `eval_kl_divergence` and `eval_top1_agreement` with a reference, and `eval_TASK_METRIC`, such as `eval_piqa_acc`.
    Training is not changed: weights, random numbers and modes stay. `DistillationTrainer` measures KL and agreement
    itself, and adds this callback for `DistillationConfig(eval_tasks=…)`.

        trainer.add_callback(MeasurementCallback(trainer, reference=teacher, dataset=texts, tasks=["piqa"]))

    Args:
        trainer: the trainer.
        reference: the model to compare with, such as the teacher; None: no comparison.
        dataset: held-out text, as in `token_rows`; needed with a reference.
        num_rows: stop reading after the document that completes so many rows (`evaluate_models`).
        max_length: longest row, in tokens; default 512, or the models' context if that is shorter.
        tasks: lm-evaluation-harness tasks or presets (the extra `eval`).
        task_limit: number of documents per task; None: all.
        num_fewshot: number of worked examples in the prompts; None: the preset's or the task's own.
        include_path: folder with further task files.
        task_data: folder with documents of stock tasks, to read instead of the Hub.
        batch_size: rows or requests per forward pass.

    Raises:
        DataError: if there is nothing to measure, no text for a reference, a task is unknown, or a setting is out of
            range.
        MissingDependencyError: if there are tasks and no lm-evaluation-harness.
        MismatchError: if the vocabularies of model and reference differ.
        UnsupportedModelError: if the model is split over processes (FSDP, ZeRO-3).
    """

    def __init__(
        self,
        trainer: Any,
        *,
        reference: PreTrainedModel | None = None,
        dataset: DataSource | None = None,
        num_rows: int = 32,
        max_length: int | None = None,
        tasks: Sequence[str] = (),
        task_limit: int | None = 50,
        num_fewshot: int | None = None,
        include_path: str | os.PathLike[str] | None = None,
        task_data: str | os.PathLike[str] | None = None,
        batch_size: int = 8,
    ) -> None:
        require_positive(
            num_rows=num_rows, batch_size=batch_size, **({} if task_limit is None else {"task_limit": task_limit})
        )
        if reference is None and not tasks:
            raise DataError("There is nothing to measure. Pass a reference with a dataset, or tasks.")
        if (reference is None) != (dataset is None):
            raise DataError("A reference needs a dataset of held-out text, and the dataset a reference. Pass both.")
        _refuse_split(trainer)
        self.trainer, self.reference, self.batch_size = trainer, reference, batch_size
        self.rows, self._own_ids = None, dict[str, torch.Tensor]()
        if reference is not None and dataset is not None:
            limits = Limits.of({"reference": reference, "model": self._model}, "reference", maps_tokens=True)
            self._own_ids = dict(limits.spaces.own_ids)
            length = limits.row_length(max_length or min(512, limits.context or 512))
            tokenizer = limits.spaces.tokenizer(trainer.processing_class, {})
            self.rows = token_rows(dataset, tokenizer, max_length=length, num_rows=num_rows, packing=False, overlap=1)
        self.tasks = with_presets(tasks, num_fewshot)
        self.include_path, self.task_data = include_path, task_data
        self.settings = HarnessSettings(
            limit=task_limit, batch_size=batch_size, show_progress=False, options={"bootstrap_iters": 0}
        )
        if tasks:
            require_tasks(tasks, include_path)
        self._measured_at: int | None = None
        self._found = dict[str, float]()

    @property
    def _model(self) -> PreTrainedModel:
        model: PreTrainedModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, once for all datasets that are evaluated at a step."""
        is_first = self._measured_at != state.global_step
        if is_first:
            self._measured_at = state.global_step
            found = [self.measure() if state.is_world_process_zero else {}]
            broadcast_object_list(found)  # the other processes wait, and choose the same best checkpoint
            self._found = found[0]
        if metrics is not None:
            metrics.update(self._found)
        if is_first:
            self.trainer.log(dict(self._found))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure anew from here on: the weights may be those of the best step instead of the last one."""
        self._measured_at = None

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure the model as it is now: name of the logged value → value."""
        model, found = self._model, dict[str, float]()
        if self.reference is not None and self.rows is not None:
            models = {"reference": self.reference, "model": model}
            with evaluating(models.values()):
                quality = measure_quality(models, self.rows, "reference", self.batch_size, False, self._own_ids)[
                    "model"
                ]
            found |= {f"eval_{key}": quality[key]["value"] for key in ("kl_divergence", "top1_agreement")}
        if self.tasks:
            found |= self._task_scores(model)
        return found

    def _task_scores(self, model: PreTrainedModel) -> dict[str, float]:
        tokenizer = text_tokenizer(self.trainer.processing_class)
        found = {}
        names = list(self.tasks)
        with TaskSource.opened(names, self.include_path, self.task_data, show_progress=False) as source:
            for name, shots in self.tasks.items():
                results = run_task(model, tokenizer, source.load(name), self.settings, shots).results
                for task in [name] if name in results else results:  # a file has the name that it gives
                    for metric, measured in results[task].items():
                        found[f"eval_{task}_{metric.replace(',', '_')}"] = measured["value"]
        return found


def _refuse_split(trainer: Any) -> None:
    """Refuse a model of which no process holds all weights.

    Raises:
        UnsupportedModelError: naming the way in which it is split.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    zero3 = plugin is not None and getattr(plugin, "zero_stage", 0) == 3
    ways = {
        "ZeRO-3": zero3,
        "FSDP": getattr(trainer, "is_fsdp_enabled", False),
        "tensor parallelism": trainer.get_tp_size() > 1,
    }
    if way := next((way for way, is_used in ways.items() if is_used), None):
        raise UnsupportedModelError(
            f"The model is split over processes ({way}), so one process cannot measure it "
            "during training. Leave the tasks out, and measure the finished model with `minitron-hf evaluate`."
        )
