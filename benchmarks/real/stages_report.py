"""Writes the table of what every stage costs, from the files of `stages.py`, into a page of the documentation.

Run from the repository root, in seconds:

    python -m benchmarks.real.stages_report benchmarks/results/real/stages-*.json --page docs/guides/what-it-costs.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_hf.files import read_json

from .report import write_page

#: Of the page, between its two lines.
REGION = "benchmarks/real/stages"


def table(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the table: a row per stage, two columns per file.

    Args:
        measured: files of `stages.py`, of the same budgets.

    Raises:
        ValueError: if the files have different budgets, so that their columns cannot be compared.
    """
    first = _budget(measured[0])
    for other in measured[1:]:
        if _budget(other) != first:
            raise ValueError(f"The files have different budgets: {first} and {_budget(other)}. Measure them alike.")
    dtypes = [one["settings"]["dtype"] for one in measured]
    heads = [f"{dtype}, {what}" for dtype in dtypes for what in ("seconds", "MB at the peak")]
    rows = [f"| stage | tokens | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for name in measured[0]["stages"]:
        cells = [cell for one in measured for cell in _cells(one["stages"].get(name))]
        rows.append(f"| {name} | {_tokens(name, first)} | {' | '.join(cells)} |")
    return rows


def _budget(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one["settings"].items() if name != "dtype"}


def _cells(stage: Mapping[str, Any] | None) -> list[str]:
    if stage is None:
        return ["not measured", ""]
    if "error" in stage:
        return ["failed", ""]
    return [f"{stage['seconds']:.1f}", f"{stage['bytes_peak'] / 1e6:,.0f}"]


def _tokens(stage: str, budget: Mapping[str, Any]) -> str:
    """What a stage reads: calibration rows, steps of training, or held-out rows."""
    rows, length = budget["rows"], budget["max_length"]
    if stage.startswith("score depth"):
        return f"4 × {length}"
    if stage.startswith(("score", "repair")):
        return f"{rows} × {length}"
    if stage.startswith("evaluate"):
        return f"{budget['eval_rows']} × {2 * length}"
    if stage.startswith(("distil", "correct")):
        return f"{budget['steps']} × {budget['batch_size']} × {length}"
    return "200 documents" if stage == "cache" else ""


def text(measured: Sequence[Mapping[str, Any]]) -> str:
    """The region: what was measured where, and the table."""
    threads = measured[0]["settings"]["threads"]
    machines = [one["machine"] or "machine not named" for one in measured]
    where = machines[0]
    if len(set(machines)) > 1:
        pairs = zip(measured, machines, strict=True)
        where = "; ".join(f"{one['settings']['dtype']} on {name}" for one, name in pairs)
    lines = [
        f"{where}; {'one thread' if threads == 1 else f'{threads} threads'}; one run.",
        "",
        *table(measured),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of stages.py, one per dtype")
    parser.add_argument("--page", type=Path, help="Markdown page whose generated region is replaced; default: print")
    arguments = parser.parse_args()
    region = text([read_json(file) for file in arguments.files])
    if arguments.page:
        write_page(arguments.page, region, REGION)
    else:
        print(region)


if __name__ == "__main__":
    main()
