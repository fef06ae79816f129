"""Named sets of benchmark tasks with their numbers of worked examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Name → tasks of lm-evaluation-harness with the number of worked examples in their prompts.
PRESETS: Mapping[str, Mapping[str, int]] = {
    # Sreenivas et al. 2024, table 1, without the task that executes code.
    "minitron": {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5},
    # The same table's task that executes code; needs `confirm_run_unsafe_code`.
    "minitron_code": {"humaneval": 0},
    # Tasks on most of which models below a billion parameters are above chance.
    "small": {
        "lambada_openai": 0,
        "arc_easy": 0,
        "piqa": 0,
        "hellaswag": 0,
        "winogrande": 0,
        "openbookqa": 0,
    },
}

#: The metric of a task that goes into averages: the first of these that it has, else its first mean over documents.
MAIN_METRICS = ("acc_norm", "acc", "exact_match,strict-match", "exact_match")
#: Tasks whose usual metric is another one than `MAIN_METRICS` says.
MAIN_METRIC_OF: Mapping[str, str] = {"winogrande": "acc", "mmlu": "acc"}


def with_presets(tasks: Sequence[str], num_fewshot: int | None = None) -> dict[str, int | None]:
    """Tasks with their numbers of worked examples; names of presets stand for their tasks.

    Args:
        tasks: names or files of tasks, and names of presets.
        num_fewshot: number for all tasks; None: the presets' own, and for other tasks their default.

    >>> with_presets(["minitron_code", "piqa"]), with_presets(["minitron_code"], 2)
    ({'humaneval': 0, 'piqa': None}, {'humaneval': 2})
    """
    found: dict[str, int | None] = {}
    for name in tasks:
        for task, shots in PRESETS.get(name, {name: None}).items():
            found[task] = shots if num_fewshot is None else num_fewshot
    return found


def main_metric(task: str, metrics: Sequence[str]) -> str | None:
    """The metric of a task that goes into averages; None if it has none.

    Args:
        task: its name.
        metrics: its metrics that are means over documents.

    >>> main_metric("arc_challenge", ["acc", "acc_norm"]), main_metric("winogrande", ["acc"]), main_metric("x", ["f1"])
    ('acc_norm', 'acc', 'f1')
    """
    wanted = (MAIN_METRIC_OF.get(task), *MAIN_METRICS, *metrics)
    return next((name for name in wanted if name in metrics), None)
