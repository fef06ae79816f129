"""Figures of a run: training curve, importance of units and layers, shapes of a search.

Each function reads the files of one run folder and returns a `matplotlib.figure.Figure` that belongs to nobody else:
no pyplot, no global state, and the user's matplotlib style is not applied. The same files give the same bytes.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import replacing_file
from ..formats import read_artefact
from .drawing import BLUE, DPI, GREEN, GREY, ORANGE, RED, NothingToDrawError, _curve, _figure, _own_style
from .importance_plots import plot_importance, plot_layers
from .search_plot import plot_search
from .speed_plot import plot_speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: (step, value) of a logged quantity.
Points = list[tuple[float, float]]

#: Keys of the training log that are drawn beside the losses: key → (label, colour, line style).
LOSS_SERIES = {
    "loss": ("training loss", BLUE, "-"),
    "eval_loss": ("evaluation loss", ORANGE, "-"),
    "kl": ("training KL to the teacher", BLUE, ":"),
    "eval_kl": ("evaluation KL to the teacher", ORANGE, ":"),
}
AGREEMENT_SERIES = {
    "agreement": ("training", BLUE, "-"),
    "eval_agreement": ("evaluation", ORANGE, "-"),
}


def plot_training(run_dir: str | os.PathLike[str]) -> Figure:
    """Loss, KL to the teacher, token agreement and learning rate against the optimiser step.

    Reads `distillation.json`; a panel whose values were never logged is left out.

    Raises:
        OutputError: if the file is missing.
        NothingToDrawError: if it logged no loss at all.
    """
    path = Path(run_dir) / "distillation.json"
    history = read_artefact(path).get("log_history") or []
    named = {key for entry in history for key in entry if re.fullmatch(r"eval_.+_loss", key)}  # several eval datasets
    styles = LOSS_SERIES | {
        key: (f"evaluation loss, {key[5:-5]}", colour, "--")
        for key, colour in zip(sorted(named), itertools.cycle((ORANGE, GREEN, RED, GREY)))
    }
    losses = _logged(history, styles)
    if not losses:
        raise NothingToDrawError(f"{path} logs no loss; expected at least one entry with `loss` or `eval_loss`.")
    # If the loss is the KL alone, draw one line instead of two that nobody can tell apart.
    for total, part in (("loss", "kl"), ("eval_loss", "eval_kl")):
        if part in losses and total in losses and np.allclose(losses[part], losses[total], rtol=1e-2):
            del losses[part]
    agreement = _logged(history, AGREEMENT_SERIES)
    rate = _series(history, "learning_rate")

    heights = [3.0] + [1.6] * bool(agreement) + [1.2] * bool(rate)
    with _own_style():
        figure = _figure(7.5, sum(heights) + 0.9)
        panels = list(
            figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        )
        panels[-1].set_xlabel("optimiser step")
        _draw_losses(panels.pop(0), losses, styles)
        if agreement:
            _draw_agreement(panels.pop(0), agreement)
        if rate:
            _draw_rate(panels.pop(0), rate)
        figure.align_ylabels()
    return figure


def _logged(history: list[dict[str, Any]], keys: Iterable[str]) -> dict[str, Points]:
    """The series that were logged at least once."""
    return {key: points for key in keys if (points := _series(history, key))}


def _draw_losses(panel: Axes, losses: dict[str, Points], styles: dict[str, tuple[str, str, str]]) -> None:
    for key, points in losses.items():
        _curve(panel, points, *styles[key])
    values = [value for points in losses.values() for _, value in points]
    if min(values) > 0 and max(values) / min(values) > 8:
        panel.set_yscale("log")
        # Losses are numbers like 2.5, not powers of ten.
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_ylabel("nats per token")
    panel.legend(frameon=False)
    panel.set_title("Distillation", loc="left")


def _draw_agreement(panel: Axes, agreement: dict[str, Points]) -> None:
    for key, points in agreement.items():
        label, colour, style = AGREEMENT_SERIES[key]
        _curve(panel, [(step, 100 * value) for step, value in points], label, colour, style)
    panel.set_ylabel("top-1 agreement\nwith teacher, %")
    panel.legend(frameon=False)


def _draw_rate(panel: Axes, rate: Points) -> None:
    _curve(panel, rate, "learning rate", GREY, "-")
    panel.set_ylabel("learning rate")
    panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panel.set_ylim(bottom=0)


#: File in `plots/` → (function that draws it, files of the run folder that it needs).
PLOTS = {
    "training.png": (plot_training, ("distillation.json",)),
    "importance.png": (plot_importance, ("scores.safetensors", "pruning_plan.json")),
    "layers.png": (plot_layers, ("scores.safetensors", "pruning_plan.json")),
    "search.png": (plot_search, ("search.json",)),
    "speed.png": (plot_speed, ("evaluation.json",)),
}


def write_plots(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw every picture whose inputs are in the run folder into `plots/`.

    A picture whose inputs are there but hold nothing to draw (no loss was ever logged, only layers were scored) is
    left out, and removed if there is an earlier one; one whose inputs are gone stays as it is.

    Returns:
        The files written, in the order of `PLOTS`.

    Raises:
        OutputError: if the folder cannot be written.
    """
    run_dir = Path(run_dir)
    written = []
    for name, (draw, inputs) in PLOTS.items():
        if not all((run_dir / file).is_file() for file in inputs):
            continue
        path = run_dir / "plots" / name
        try:
            figure = draw(run_dir)
        except NothingToDrawError:
            path.unlink(missing_ok=True)
            continue
        with replacing_file(path) as temporary, _own_style():
            # `Software` would hold matplotlib's version. Without it, the bytes are reproducible.
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        written.append(path)
    return written


def _series(history: list[dict[str, Any]], key: str) -> Points:
    """(step, value) of every entry that logged a finite `key`."""
    return [
        (entry["step"], float(entry[key]))
        for entry in history
        if "step" in entry and isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
    ]
