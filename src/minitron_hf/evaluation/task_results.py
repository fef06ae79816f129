"""What lm-evaluation-harness returns, as task → metric → value, and as values on every document."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import json_values
from .means import mean_and_error


@dataclass(frozen=True)
class TaskScores:
    """What one model made of a task.

    Attributes:
        results: task or group → metric → value, standard error and conditions.
        values: task → metric → value on every document, for the metrics that are means over documents.
        responses: task → what the model answered to every document, as the harness filters it.
        members: group → its tasks.
        weighted: group → metric → whether its tasks count by their documents.
    """

    results: dict[str, dict[str, dict[str, Any]]]
    values: dict[str, dict[str, list[float]]]
    responses: dict[str, list[Any]]
    members: dict[str, list[str]]
    weighted: dict[str, dict[str, bool]]

    @classmethod
    def of(cls, results: Mapping[str, Any], weighted: Mapping[str, Mapping[str, bool]], template: bool) -> TaskScores:
        """Read what `lm_eval.simple_evaluate` returns.

        Args:
            results: with samples.
            weighted: group → metric → whether its tasks count by their documents.
            template: whether a chat template was applied.
        """
        found = _named_results(results, template)
        values = {name: _document_values(samples, found[name]) for name, samples in results["samples"].items()}
        for name, samples in results["samples"].items():
            _add_chance(found[name], results["configs"].get(name, {}), samples)
        subtasks = results.get("group_subtasks", {})
        return cls(
            results=found,
            values=values,
            responses={name: _responses(samples) for name, samples in results["samples"].items()},
            members={group: _parts(results, group) for group, inside in subtasks.items() if inside},
            weighted={group: dict(metrics) for group, metrics in weighted.items()},
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


def harness_version() -> str:
    """Version of lm-evaluation-harness."""
    return importlib.metadata.version("lm_eval")


def _conditions(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Conditions under which a task, or all tasks of a group, was measured."""
    counts = [results.get("n-samples", {}).get(name) for name in _parts(results, task)]
    known = counts if counts and None not in counts else []
    return {
        "num_documents": sum(count["effective"] for count in known) if known else None,
        "num_documents_in_task": sum(count["original"] for count in known) if known else None,
        "num_fewshot": results.get("n-shot", {}).get(task),
        "task_version": results.get("versions", {}).get(task),
        "harness_version": harness_version(),
    }


def _parts(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group and of the groups in it; a task itself."""
    inside = results.get("group_subtasks", {}).get(task) or []
    return [part for name in inside for part in _parts(results, name)] if inside else [task]


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


def _document_values(samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Metric → value on every document, in their order, for the metrics whose mean is the reported value."""
    found: dict[str, list[float]] = {}
    for metric, measured in results.items():
        name, _, filtered = metric.partition(",")
        rows = sorted(
            (one for one in samples if one["filter"] == (filtered or "none")), key=lambda one: int(one["doc_id"])
        )
        values = [one.get(name) for one in rows]
        if not values or not all(isinstance(value, bool | int | float) for value in values):
            continue
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
        mean, _ = mean_and_error(numbers, [1] * len(numbers))
        if abs(mean - measured["value"]) <= 1e-9 * max(1.0, abs(mean)):
            found[metric] = numbers
    return found


def _responses(samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Answers by document, of the first filter. Prompts and documents are left out: they belong to the benchmark."""
    first = samples[0]["filter"] if samples else None
    rows = sorted((one for one in samples if one["filter"] == first), key=lambda one: int(one["doc_id"]))
    return [json.loads(json.dumps(json_values(one["filtered_resps"]), default=str)) for one in rows]


def _add_chance(results: Mapping[str, dict[str, Any]], config: Mapping[str, Any], samples: Sequence[Any]) -> None:
    """Add the accuracy of guessing to the accuracies of a multiple-choice task with one right answer.

    None where it is not known: where the task computes its accuracy itself, has several right answers, or asks for
    more than the choices.
    """
    if config.get("output_type") != "multiple_choice" or not samples:
        return
    metrics = [one.get("metric") for one in config.get("metric_list") or ()]
    is_known = not (config.get("process_results") or config.get("multiple_target") or "acc_mutual_info" in metrics)
    shares = [1 / len(one["filtered_resps"]) for one in samples]
    for metric in {"acc", "acc_norm"} & results.keys():
        results[metric]["chance"] = round(sum(shares) / len(shares), 6) if is_known else None
