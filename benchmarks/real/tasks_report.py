"""The table of benchmark tasks: every arm beside the teacher, document by document, from the files of `tasks.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_hf.evaluation.means import mean_and_error
from minitron_hf.files import read_json

from .intervals import paired_difference

#: Folder inside the folder of results, and the name of the teacher's file there.
FOLDER, TEACHER = "tasks", "teacher"


class TaskScores:
    """The scores of the models of one teacher on tasks.

    Args:
        found: contents of the files of `tasks.py`.
        digest: of the teacher's weights.
        computed_in: dtype of all models.
    """

    def __init__(self, found: Sequence[Mapping[str, Any]], digest: str, computed_in: str) -> None:
        # Model and task → documents' digest → result.
        self.known: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
        self.tasks: list[str] = []
        for one in found:
            is_other = one["model"] == TEACHER and one["digest"] != digest
            if one["computed_in"] == computed_in and not is_other:
                for name, result in one["tasks"].items():
                    self.known.setdefault((one["model"], name), {})[result["documents"]] = result
                    self.tasks += [name] if name not in self.tasks else []

    @classmethod
    def read(cls, folder: Path, digest: str, computed_in: str) -> TaskScores:
        """The files of a folder, which need not exist."""
        return cls([read_json(path) for path in sorted(folder.glob("*.json"))], digest, computed_in)

    def rows(self, models: Sequence[str]) -> Iterator[tuple[str, int, list[str]]]:
        """Task, number of models that have it, and cells: accuracy, chance, difference to the teacher, documents.

        Args:
            models: names of one arm's students, one for each seed; or of the teacher.
        """
        for task in self.tasks:
            per_model = [found for model in models if (found := self.known.get((model, task)))]
            if not per_model:
                continue
            teacher = self.known.get((TEACHER, task), {})
            # The most documents, if possible some that the teacher has read, too.
            shared = set.intersection(*map(set, per_model))
            if not shared:
                continue
            best = max(shared, key=lambda one: (one in teacher, per_model[0][one]["num_documents"]))
            results = [found[best] for found in per_model]
            other = teacher.get(best) if models != [TEACHER] else None
            yield task, len(results), _cells(results, other)

    def at_chance(self) -> list[str]:
        """The tasks at which the teacher is no better than chance: the 95 % interval of its accuracy includes it."""
        names = []
        for task in self.tasks:
            if results := self.known.get((TEACHER, task)):
                result = max(results.values(), key=lambda one: one["num_documents"])
                accuracy = result["accuracy"]
                if accuracy["value"] - 1.96 * (accuracy["stderr"] or 0.0) <= result["chance"]:
                    names.append(task)
        return names


def _cells(results: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any] | None) -> list[str]:
    correct = [_values(result) for result in results]
    ones = [1] * len(correct[0])
    value, error = mean_and_error([statistics.fmean(column) for column in zip(*correct)], ones)
    difference = ""
    if teacher is not None:
        found = paired_difference(correct, [_values(teacher)] * len(correct), ones)
        difference = f"{found.value:+.3f} ± {found.error:.3f}"
    accuracy = f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
    return [accuracy, f"{results[0]['chance']:.2f}", difference, f"{len(ones):,}"]


def _values(result: Mapping[str, Any]) -> list[float]:
    return [float(digit) for digit in result["correct"]]


def tasks_table(scores: TaskScores, arms: Sequence[tuple[list[str], Sequence[str]]]) -> list[str]:
    """Markdown lines: the teacher, then every arm, one line for each task.

    Args:
        scores: of all models.
        arms: cells that name an arm (arm, tokens), and the names of its models.
    """
    lines = [
        "| arm | tokens | seeds | task | accuracy | chance | difference to the teacher | documents |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for head, models in (([TEACHER, ""], [TEACHER]), *arms):
        for task, num_models, cells in scores.rows(models):
            seeds = "" if models == [TEACHER] else str(num_models)
            lines.append(f"| {' | '.join([*head, seeds, task, *cells])} |")
    return lines


def tasks_section(scores: TaskScores, arms: Sequence[tuple[list[str], Sequence[str]]]) -> list[str]:
    """The table with its heading and what to know about it; empty without scores."""
    table = tasks_table(scores, arms)
    if len(table) == 2:
        return []
    text = (
        "Accuracy ± standard error over the documents, by lm-evaluation-harness. The difference is that of pairs, "
        "document by document, so that its error is smaller than those of the two accuracies."
    )
    if names := scores.at_chance():
        text += f" The teacher is not above chance at {', '.join(names)}: a difference there says nothing."
    return ["## Tasks", "", text, "", *table, ""]
