"""`.eval_results/minitron-hf.yaml`: scores of the student on benchmarks that are registered on the Hub.

A dataset is registered by its file `eval.yaml`, which names the tasks (https://huggingface.co/docs/hub/eval-results).
The list of registered datasets grows, so a push asks the Hub. The model card does not depend on the answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.presets import main_metric
from ..files import remove, write_text
from ..formats import read_artefact
from .card_metadata import is_limited, is_number
from .hub_errors import is_transient, is_unanswered, with_retries

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

#: The file. Others in its folder are of people who measured the student, too.
EVAL_RESULTS_NAME = ".eval_results/minitron-hf.yaml"

#: Task of lm-evaluation-harness → dataset on the Hub and its config, as the task reads it (lm_eval 0.4.9 to 0.4.13).
DATASETS: Mapping[str, tuple[str, str]] = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond"),
    "gsm8k": ("openai/gsm8k", "main"),
    "hellaswag": ("Rowan/hellaswag", "default"),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval"),
    "ifeval": ("google/IFEval", "default"),
    "mmlu": ("cais/mmlu", "all"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "default"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "truthfulqa_mc1": ("truthfulqa/truthful_qa", "multiple_choice"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}


def write_eval_results(run_dir: Path, repo_id: str, api: HfApi) -> None:
    """Write the student's scores on registered benchmarks, or remove the file where there are none.

    Only scores on all documents of a task count, each by the task's main metric, in percent. A dataset about which the
    Hub gives no answer is left out, with a warning.

    Args:
        run_dir: the run folder.
        repo_id: the student's repository, whose `benchmarks.json` is named as the source.
        api: the Hub's client.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    path = run_dir / EVAL_RESULTS_NAME
    entries = []
    for task, metric, measured in main_results(run_dir / "benchmarks.json"):
        dataset, config = DATASETS[task]
        task_id = _registered_task(api, dataset, config)
        if task_id is not None:
            entries.append(
                EvalResultEntry(
                    dataset_id=dataset,
                    task_id=task_id,
                    value=float(f"{100 * measured['value']:.6g}"),
                    source_url=f"https://huggingface.co/{repo_id}/blob/main/benchmarks.json",
                    source_name="benchmarks.json",
                    notes=_notes(task, metric, measured),
                )
            )
    if entries:
        write_text(path, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
    else:
        remove(path, missing_ok=True)


def main_results(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Task, metric and value of the student on tasks that may be registered."""
    found = read_artefact(path) if path.is_file() else {}
    # Documents of the user's own may be others than the benchmark's.
    student = {} if found.get("local_documents") else found.get("models", {}).get("student", {})
    for task, metrics in student.items():
        named = {metric.removesuffix(",none"): measured for metric, measured in metrics.items()}
        metric = main_metric(task, list(named))
        if task in DATASETS and metric is not None:
            measured = named[metric]
            if is_number(measured["value"]) and not is_limited(measured):
                yield task, metric, measured


def _notes(task: str, metric: str, measured: Mapping[str, Any]) -> str:
    """How a score was measured."""
    error = measured.get("stderr")
    parts = [
        f"task {task} of lm-evaluation-harness {measured.get('harness_version') or ''}".rstrip(),
        None if measured.get("num_fewshot") is None else f"{measured['num_fewshot']}-shot",
        f"{metric} in percent",
        f"standard error {100 * error:.2g}" if error is not None and is_number(error) else None,
        "chat template" if measured.get("chat_template") else None,
    ]
    return ", ".join(part for part in parts if part)


def _registered_task(api: HfApi, dataset: str, config: str) -> str | None:
    """Id of the task that a dataset's `eval.yaml` has for a config; None if it is not registered, or nobody knows."""
    import yaml
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        content = with_retries(
            lambda: Path(api.hf_hub_download(dataset, "eval.yaml", repo_type="dataset")).read_text(encoding="utf-8"),
            is_retriable=is_transient,
        )
        tasks = yaml.safe_load(content)["tasks"]
        found = [str(task["id"]) for task in tasks if task.get("config", "default") == config]
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    except Exception as error:
        known = isinstance(error, yaml.YAMLError) or is_transient(error) or is_unanswered(error)
        if not known:
            raise
        logger.warning(
            "Whether %s is a registered benchmark is not known (%s): the scores on it are on the card alone.",
            dataset,
            type(error).__name__,
        )
        return None
    return found[0] if len(found) == 1 else None
