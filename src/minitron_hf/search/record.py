"""`search.json`: results of a search, and the table that shows them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import OutputError
from ..evaluation.means import with_error
from ..files import require_writable
from ..formats import read_artefact, write_artefact
from ..privacy import public_settings
from ..progress import one_progress_bar
from ..pruning.candidates import SEARCH_NAME, Candidate
from ..sizes.shapes import Shape

CANDIDATES_DIR = "candidates"

T = TypeVar("T")


class RateColumn(ProgressColumn):
    """Units of a second."""

    def render(self, task: Task) -> Text:
        """The rate so far; empty before the first unit."""
        return Text("" if task.speed is None else f"{task.speed:,.3g} {task.fields['unit']}/s")


def stored_settings(folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings of the search that was done in a folder; empty without one."""
    path = None if folder is None else Path(folder) / SEARCH_NAME
    return read_artefact(path)["settings"] if path is not None and path.is_file() else {}


class SearchRecord:
    """Results so far: on disk, and as a table on the terminal.

    Args:
        folder: where `search.json` and unfinished students go; None keeps the results in memory.
        inputs: digest of everything that the results depend on.
        settings: recorded beside the results.
        show_progress: show the table as it fills, and a progress bar below it.

    Raises:
        OutputError: if the folder holds another search, or a folder of the students' name that no search wrote.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, inputs: str, settings: Mapping[str, Any], show_progress: bool
    ) -> None:
        self.folder = None if folder is None else require_writable(folder)
        self.inputs, self.settings = inputs, settings
        self.candidates: list[Candidate] = []
        #: Name of a budget → name of a shape → what it costs.
        self.costs: dict[str, dict[str, float]] = {}
        self.display: Live | None = Live(console=Console(stderr=True), auto_refresh=False) if show_progress else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
        self.bar = Progress(*columns, TimeRemainingColumn())
        if self.path is not None and self.path.is_file():
            values = read_artefact(self.path)
            if values.get("inputs") != inputs:
                raise OutputError(
                    f"{self.path} belongs to another search: its teacher, scores, data or settings differ. "
                    f"Choose another output_dir, or remove that file and the folder {CANDIDATES_DIR} beside it."
                )
            self.candidates = [Candidate.from_dict(entry) for entry in values["candidates"]]
            self.costs = values["costs"]
        elif self.folder is not None:
            students = self.folder / CANDIDATES_DIR
            if students.is_dir() and any(students.iterdir()):
                raise OutputError(
                    f"{students} holds files, and no {SEARCH_NAME} beside it says that a search wrote them. Remove "
                    "it, or choose another output_dir."
                )
            self._write()

    @property
    def path(self) -> Path | None:
        """`search.json`; None without a folder."""
        return None if self.folder is None else self.folder / SEARCH_NAME

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """The table and its bar on the terminal, and no other bars, for the duration of the context."""
        if self.display is None:
            yield
            return
        with self.display, one_progress_bar(show=False):
            yield

    def begin(self, what: str, unit: str, total: int) -> None:
        """Begin a bar.

        Args:
            what: what is done, for people.
            unit: what is counted.
            total: number of units.
        """
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.bar.add_task(what, total=total, unit=unit)

    def advance(self, number: int = 1) -> None:
        """Count units of the bar."""
        for task in self.bar.task_ids:
            self.bar.advance(task, number)
        self._show()

    def counted(self, values: Sequence[T], what: str, unit: str) -> Iterator[T]:
        """Go through values; the bar counts those that are done."""
        self.begin(what, unit, len(values))
        for value in values:
            yield value
            self.advance()

    def _show(self) -> None:
        if self.display is not None:
            self.display.update(Group(candidate_table(self.candidates), self.bar), refresh=True)

    def candidate(self, shape: Shape) -> Candidate:
        """The candidate of a shape, added if there is none."""
        for candidate in self.candidates:
            if candidate.name == shape.name:
                return candidate
        one = Candidate(shape.request, shape.num_parameters, num_active_parameters=shape.num_active_parameters)
        self.candidates.append(one)
        return self.candidates[-1]

    def save(self) -> None:
        """Write all results, completely or not at all, and show them."""
        self._write()
        self._show()

    def _write(self) -> None:
        if self.path is not None:
            values = {
                "inputs": self.inputs,
                "settings": public_settings(self.settings),
                "costs": self.costs,
                "candidates": [candidate.to_dict() for candidate in self.candidates],
            }
            write_artefact(self.path, values)

    def clean(self) -> None:
        """Remove the students; only their shapes are results."""
        if self.folder is not None:
            shutil.rmtree(self.folder / CANDIDATES_DIR, ignore_errors=True)


def candidate_table(candidates: Sequence[Candidate]) -> Table:
    """The candidates as a table, best first."""
    scored = any(candidate.scores for candidate in candidates)
    made = Table("shape", "parameters", "KL pruned", "KL distilled", "tokens", "behind the best")
    if scored:
        made.add_column("score")
    retrained = any(candidate.rounds for candidate in candidates)
    for candidate in sorted(candidates, key=lambda each: (-len(each.rounds), each.sort_key())):
        last = candidate.rounds[-1] if candidate.rounds else None
        gap = candidate.kl_above_best if last or not retrained else None
        made.add_row(
            candidate.name,
            f"{candidate.num_parameters:,}",
            "–" if candidate.pruned_kl is None else with_error(**candidate.pruned_kl),
            "–" if last is None else with_error(last["kl"], last["stderr"]),
            "–" if last is None else f"{last['num_tokens']:,}",
            "–" if gap is None else with_error(**gap),
            *([f"{candidate.scores[-1]:.4g}" if candidate.scores else "–"] if scored else []),
        )
    return made
