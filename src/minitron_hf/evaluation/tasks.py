"""Benchmarks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, MissingDependencyError, did_you_mean
from ..models import evaluating, load_tokenizer
from .loading import common_device, load_for_inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_tasks(
    model: PreTrainedModel | str | os.PathLike[str],
    tasks: str | Sequence[str],
    *,
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    add_bos_token: bool | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score a model on tasks of lm-evaluation-harness (the extra `eval`).

    Args:
        model: a model, or the path or Hub id of one.
        tasks: names of tasks or groups, or paths of task files.
        processing_class: tokenizer, or the path or Hub id of one; default the tokenizer at the path `model`.
        limit: number of documents per task, or their fraction below 1, for a quick look.
        num_fewshot: number of worked examples in the prompt; None: the task's own.
        batch_size: requests per forward pass.
        include_path: folders with further task files.
        add_bos_token: whether prompts start with the beginning-of-text token; None: the tokenizer decides.
        dtype: dtype of a model that is loaded here; by default the stored one, or float32 where the hardware is slow
            in that.
        device: device of a model that is loaded here.
        **kwargs: passed on to `lm_eval.simple_evaluate` (`random_seed`, `apply_chat_template`, …).

    Returns:
        `{task: {metric: {"value": …, "stderr": …, …}}}`. A metric behind a filter other than `none` is named
        `"metric,filter"`, as in the harness; `stderr` is None where the harness gives none. Every metric holds its
        conditions: `num_documents` of the `num_documents_in_task`, `num_fewshot`, `task_version`, `harness_version`,
        and `chat_template` where one was applied; None where the harness does not report it.

    Raises:
        MissingDependencyError: without lm-evaluation-harness.
        DataError: if a task is unknown, or there is no tokenizer.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = require_tasks(names, include_path)
    if processing_class is None:
        if not isinstance(model, str | os.PathLike):
            raise DataError("A model object needs its tokenizer. Pass processing_class=tokenizer.")
        processing_class = model
    tokenizer = load_tokenizer(processing_class)
    model = load_for_inference(model, dtype, common_device({"model": model}, device))
    settings = {"tasks": names, "task_manager": manager, "limit": limit, "num_fewshot": num_fewshot, **kwargs}
    wrapping = {"tokenizer": tokenizer, "batch_size": batch_size, "add_bos_token": add_bos_token}
    return _named_results(_run_harness(model, wrapping, settings), bool(kwargs.get("apply_chat_template")))


def _run_harness(model: PreTrainedModel, wrapping: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """What `lm_eval.simple_evaluate` returns.

    Args:
        model: the model.
        wrapping: arguments of the harness's model class.
        settings: arguments of `simple_evaluate`.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with evaluating([model]):
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, **wrapping), **{"log_samples": False, "bootstrap_iters": 1000, **settings}
        )


def _named_results(results: Mapping[str, Any], with_template: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Task → metric → value, standard error and the conditions of the measurement."""
    template = {"chat_template": True} if with_template else {}
    return {
        task: {
            metric: {**measured, **_conditions(results, task), **template}
            for metric, measured in _task_metrics(values).items()
        }
        for task, values in results["results"].items()
    }


def _conditions(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Conditions under which a task, or all tasks of a group, was measured."""
    counts = [results.get("n-samples", {}).get(name) for name in _parts(results, task)]
    known = counts if counts and None not in counts else []
    return {
        "num_documents": sum(count["effective"] for count in known) if known else None,
        "num_documents_in_task": sum(count["original"] for count in known) if known else None,
        "num_fewshot": results.get("n-shot", {}).get(task),
        "task_version": results.get("versions", {}).get(task),
        "harness_version": importlib.metadata.version("lm_eval"),
    }


def _parts(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group and of the groups in it; a task itself."""
    inside = results.get("group_subtasks", {}).get(task) or []
    return [part for name in inside for part in _parts(results, name)] if inside else [task]


def require_tasks(
    names: Sequence[str], include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
) -> Any:
    """The harness's index of tasks, which holds all the names.

    Args:
        names: names of tasks or groups, or paths of task files.
        include_path: folders with further task files.

    Raises:
        MissingDependencyError: without lm-evaluation-harness.
        DataError: if a task or a folder is unknown.
    """
    try:
        from lm_eval.models import huggingface  # noqa: F401 (its dependencies may be missing too)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"Benchmarks need lm-evaluation-harness ({error}). Run: pip install 'minitron-hf[eval]'"
        ) from error

    folders = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"include_path: the folder {str(folder)!r} does not exist.")
    paths = [str(folder) for folder in folders]
    # The harness takes ten seconds to index its own 15,000 tasks, which the given folders may make unnecessary.
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths or None)
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known and not os.path.exists(name)]:
        raise DataError(
            f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}.{did_you_mean(unknown, known)} "
            "`lm-eval ls tasks` lists its tasks; name folders of your own with include_path."
        )
    return manager


def _task_metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`{"acc,none": x, "acc_stderr,none": y, …}` → `{"acc": {"value": x, "stderr": y}}`."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        found[metric if filtered == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return found
