"""Benchmarks on a model card: the table, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import markdown as md
from .card_metadata import benchmark_values, is_limited
from .card_tables import _model_order, _model_title


def _benchmark_table(benchmarks: Mapping[str, Any], average: Mapping[str, Any] | None = None) -> list[list[str]]:
    """A row per task and metric; each compared model has a second column with its difference to the reference.

    Args:
        benchmarks: the entry `models` of `benchmarks.json`.
        average: its entry `average`.
    """
    cells: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    has_chance = any("chance" in measured for *_, measured in benchmark_values(benchmarks))
    for model, task, metric, measured in benchmark_values(benchmarks):
        shots, count, chance = (measured.get(key) for key in ("num_fewshot", "num_documents", "chance"))
        documents = "–" if count is None else md.count(count)
        documents += f" of {md.count(measured['num_documents_in_task'])}" if is_limited(measured) else ""
        guessed = "–" if chance is None else f"{chance:.2g}"
        row = (task, metric, "–" if shots is None else str(shots), documents, *([guessed] if has_chance else []))
        cells.setdefault(row, {})[model] = measured
    names = _model_order(dict.fromkeys(name for row in cells.values() for name in row))
    compared = {name for row in cells.values() for name, measured in row.items() if measured.get("difference")}
    titles = [
        title for name in names for title in _with_difference(_model_title(name), "Difference", name in compared)
    ]

    def row_of(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return [
            cell
            for name in names
            for cell in _with_difference(
                md.measured(found.get(name)), md.difference(found.get(name, {}).get("difference")), name in compared
            )
        ]

    header = ["Task", "Metric", "Shots", "Documents", *(["Chance"] if has_chance else [])]
    rows = [[*row, *row_of(found)] for row, found in cells.items()]
    if average:
        count = len(next(iter(average.values()))["metrics"])
        rows.append([f"Average of {count} tasks", *[""] * (len(header) - 1), *row_of(average)])
    return [[*header, *titles], *rows]


def _with_difference(cell: str, difference: str, compared: bool) -> list[str]:
    return [cell, difference] if compared else [cell]


def _benchmarked(benchmarks: Mapping[str, Any], average: Mapping[str, Any], is_local: bool = False) -> str:
    """Sentences on how the benchmarks were measured; empty if that was not recorded.

    Args:
        benchmarks: the entry `models` of `benchmarks.json`.
        average: its entry `average`.
        is_local: whether documents were read from a local folder.
    """
    found = [measured for *_, measured in benchmark_values(benchmarks)]
    versions = sorted({measured["harness_version"] for measured in found if measured.get("harness_version")})
    if not versions:
        return ""
    sentences = [f"Measured with lm-evaluation-harness {' and '.join(versions)}."]
    if any(measured.get("chat_template") for measured in found):
        sentences.append("The chat template was applied.")
    if is_local:
        sentences.append("Documents were read from a local folder and may be others than the Hub's.")
    if any(is_limited(measured) for measured in found):
        sentences.append("A value that was measured on a part of the documents cannot be compared with other values.")
    if any(measured.get("difference") for measured in found):
        sentences.append(
            "± is the standard error. Differences to the teacher are paired, document by document. One within twice "
            "its error may be chance."
        )
    if (share := (average.get("student") or {}).get("share")) is not None:
        metrics = ", ".join(f"{task} ({metric})" for task, metric in average["student"]["metrics"].items())
        above = average["student"].get("share_above_chance")
        kept = md.measured(share, 100, " %")
        rest = f", and {md.measured(above, 100, ' %')} of what the average is above that of guessing" if above else ""
        sentences.append(f"The student keeps {kept} of the teacher's average over these tasks{rest}: {metrics}.")
    return " ".join(sentences)
