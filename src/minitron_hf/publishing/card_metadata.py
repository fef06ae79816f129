"""The YAML block of a model card, with the student's results as a model-index.

Scores on registered benchmarks are also published in `.eval_results/`, see `eval_results`. All results are in the card
and its model-index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..names import is_repo_id
from .markdown import short_digest

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

#: Quality metrics of `evaluation.json`: key → (row title, title in the model-index, factor for display, unit).
METRICS: dict[str, tuple[str, str, float, str]] = {
    "loss": ("Loss, nats per token", "Cross-entropy (nats per token)", 1.0, ""),
    "perplexity": ("Perplexity, per token", "Perplexity", 1.0, ""),
    "bits_per_byte": ("Bits per byte", "Bits per byte", 1.0, ""),
    "kl_divergence": (
        "KL(teacher ‖ model), nats per token",
        "KL divergence from the teacher (nats per token)",
        1.0,
        "",
    ),
    "top1_agreement": ("Top-1 agreement with the teacher", "Top-1 agreement with the teacher", 100.0, " %"),
}

#: Settings of a benchmark that go into the model-index.
BENCHMARK_ARGUMENTS = ("num_fewshot", "num_documents", "chat_template", "task_version", "harness_version")

#: Ids that the Hub accepts for a dataset in a model-index.
_DATASET_ID = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)


def metadata(run: Mapping[str, Any], teacher: Mapping[str, Any], title: str) -> str:
    """The YAML block, without its `---` lines."""
    from huggingface_hub import ModelCardData

    distillation = run["distillation"]
    datasets = [*(teacher["datasets"] or [])]
    trained_on = ((distillation or {}).get("data") or {}).get("train") or {}
    # `datasets` names local files after their builder ("json"): only an `owner/name` is a dataset of the Hub.
    names = [part["name"] for part in trained_on.get("parts") or [trained_on] if part.get("name")]
    datasets[:0] = [name for name in names if "/" in name and is_repo_id(name)]
    tags = ["minitron"]
    tags += ["pruned"] if run["pruning_plan"] else []
    tags += ["knowledge-distillation", "trl"] if distillation else []
    results = _eval_results(run)
    data = ModelCardData(
        language=teacher["language"] or None,
        license=teacher["license"],
        license_name=teacher["license_name"],
        license_link=teacher["license_link"],
        library_name="transformers",
        pipeline_tag=run["loading"]["task"],
        tags=tags,
        datasets=list(dict.fromkeys(datasets)) or None,
        base_model=(base := teacher["hub_id"] or teacher["base_model"]),
        metrics=sorted({"perplexity"} & {result.metric_type for result in results}) or None,
        model_name=title if results else None,
        eval_results=results or None,
        # The Hub knows finetune, adapter, quantized and merge; a student is a finetune of its teacher.
        base_model_relation="finetune" if base else None,
    )
    return data.to_yaml(line_break="\n")


def _eval_results(run: Mapping[str, Any]) -> list[EvalResult]:
    """Finite results of the student, for the model-index."""
    from huggingface_hub import EvalResult

    results: list[EvalResult] = []

    def add(metric: str, title: str, measured: Mapping[str, Any], **dataset: Any) -> None:
        if is_number(measured["value"]):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    metric_type=metric,
                    metric_name=title,
                    metric_value=_significant(measured["value"]),
                    **dataset,
                )
            )

    evaluation = run["evaluation"]
    if evaluation and "student" in evaluation["models"]:
        data = evaluation["data"]
        metrics = evaluation["models"]["student"]["metrics"]
        for key, (_, title, _, _) in METRICS.items():
            if metrics.get(key):
                add(
                    key,
                    title,
                    metrics[key],
                    dataset_type=_dataset_type(data.get("name")),
                    dataset_name=dataset_name(data),
                    dataset_args={"digest": data["digest"], "num_tokens": data["num_tokens"]},
                )
    for model, task, metric, measured in benchmark_values(run["benchmarks"] or {}):
        if model == "student" and not is_limited(measured):
            arguments = {key: measured[key] for key in BENCHMARK_ARGUMENTS if measured.get(key) is not None}
            arguments |= {"local_documents": True} if run["local_documents"] else {}
            add(
                metric,
                metric,
                measured,
                dataset_type=_dataset_type(task),
                dataset_name=task,
                dataset_args=arguments or None,
            )
    return results


def is_number(value: float | None) -> bool:
    """Whether a value is a finite number. Files hold null for other values."""
    return value is not None and math.isfinite(value)


def is_limited(measured: Mapping[str, Any]) -> bool:
    """Whether a benchmark was measured on a part of its documents. Its value then cannot be compared with others."""
    count, whole = measured.get("num_documents"), measured.get("num_documents_in_task")
    return count is not None and whole is not None and count < whole


def benchmark_values(benchmarks: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (model, task, metric, result of `evaluate_tasks`) from `benchmarks.json`.

    Args:
        benchmarks: the entry `models` of the file, `{model: {task: {metric: …}}}`.
    """
    for model, tasks in benchmarks.items():
        for task, metrics in tasks.items():
            for metric, measured in metrics.items():
                # lm-evaluation-harness names the filter after a comma, also where there is none.
                yield model, task, metric.removesuffix(",none"), measured


def _dataset_type(name: str | None) -> str:
    """Id of a dataset in a model-index. A name that is not a Hub id is changed into a legal one.

    >>> _dataset_type("roneneldan/TinyStories"), _dataset_type("/data/my stories.jsonl"), _dataset_type(None)
    ('roneneldan/TinyStories', 'my-stories.jsonl', 'text')
    """
    if not name:
        return "text"
    if _DATASET_ID.fullmatch(name):
        return name
    return re.sub(r"[^\w.-]+", "-", re.split(r"[\\/]", name)[-1], flags=re.ASCII).strip("-") or "text"


def dataset_name(data: Mapping[str, Any]) -> str:
    """Name of the evaluation data for readers, without local paths."""
    name = data.get("name")
    if not name:
        return f"held-out text {short_digest(data['digest'])}"
    return name if _DATASET_ID.fullmatch(name) else re.split(r"[\\/]", name)[-1]


def _significant(value: float) -> float:
    """Round to six significant digits; fewer would not distinguish close models."""
    return float(f"{value:.6g}")
