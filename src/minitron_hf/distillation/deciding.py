"""Which arguments of a training decide its result, and which its speed, its memory or its log alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Arguments that decide the speed, the memory or the log of a training, but not the student.
RUNNING_ARGUMENTS = frozenset(
    {
        "activation_checkpointing", "gradient_checkpointing", "gradient_checkpointing_kwargs", "teacher_offload",
        "per_device_eval_batch_size", "eval_accumulation_steps", "loss_chunk_size", "torch_compile",
        "dataset_num_proc", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
        "dataloader_pin_memory", "disable_tqdm", "logging_steps", "logging_strategy", "logging_first_step",
    }
)  # fmt: skip
#: Further ones, where no evaluation decides anything (`load_best_model_at_end`, `reduce_lr_on_plateau`).
_EVALUATION = frozenset(
    {
        "eval_steps", "eval_strategy", "eval_on_start", "save_steps", "save_total_limit", "max_eval_rows",
        "eval_tasks", "eval_task_limit", "eval_task_data", "eval_include_path",
    }
)  # fmt: skip
#: How the rows of a step are split over batches; only their number decides.
_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps")
_ROWS = "rows_in_a_step"


def deciding_arguments(arguments: Mapping[str, Any], num_processes: int = 1) -> dict[str, Any]:
    """The arguments that a training's result depends on, with the number of rows in a step.

    Args:
        arguments: fields of the trainer's config.
        num_processes: number of processes that train.
    """
    left_out = {*_free(arguments), *_BATCHES}
    kept = {name: value for name, value in arguments.items() if name not in left_out}
    return {**kept, _ROWS: _rows(arguments) * num_processes}


def with_recorded_running(settings: Any, recorded: Any) -> Any:
    """Settings with those of a record where they decide only how a training runs, so that both have one digest.

    A training that was killed goes on with smaller batches in evaluation, or with checkpointing of activations.
    Records of earlier versions hold such arguments; some have the sizes of batches in one process instead of the rows
    in a step.

    Args:
        settings: of a stage, or a part of them; what `deciding_arguments` made is found at any depth.
        recorded: those that it began with.
    """
    if not isinstance(settings, Mapping) or not isinstance(recorded, Mapping):
        return settings
    if _ROWS not in settings:
        return {name: with_recorded_running(value, recorded.get(name)) for name, value in settings.items()}
    taken = set(_free(settings))
    same = dict(settings)
    if _ROWS not in recorded and settings[_ROWS] == _rows(recorded):
        del same[_ROWS]
        taken |= {*_BATCHES}
    return same | {name: value for name, value in recorded.items() if name in taken}


def _free(arguments: Mapping[str, Any]) -> frozenset[str]:
    """Names of the arguments that do not decide the result beside these."""
    decides = arguments.get("load_best_model_at_end") or arguments.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    return RUNNING_ARGUMENTS if decides else RUNNING_ARGUMENTS | _EVALUATION


def _rows(arguments: Mapping[str, Any]) -> int:
    """Rows in a step of one process."""
    rows: int = arguments.get(_BATCHES[0], 8) * arguments.get(_BATCHES[1], 1)
    return rows
