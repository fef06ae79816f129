"""The figure of an evaluation: quality against latency, and decoding speed by batch size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats import read_artefact
from .card_tables import _model_order, _model_title
from .drawing import BLUE, GREEN, GREY, ORANGE, RED, NothingToDrawError, _figure, _own_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of the models, in the order of the card's columns.
_COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)


def plot_speed(run_dir: str | os.PathLike[str]) -> Figure:
    """Loss of the models of an evaluation against the milliseconds to decode a token of one prompt.

    Bars are the standard error of the loss and the quartiles of the rounds. Where several batch sizes were timed, a
    second panel has the decoding speed by batch size, for the shortest prompts.

    Raises:
        OutputError: if `evaluation.json` is missing.
        NothingToDrawError: if fewer than two models were timed.
    """
    path = Path(run_dir) / "evaluation.json"
    models = {
        name: model
        for name, model in read_artefact(path)["models"].items()
        if (model.get("decode_tokens_per_second") or {}).get("median") and model["metrics"].get("loss")
    }
    if len(models) < 2:
        raise NothingToDrawError(f"{path} holds no speeds of two models to compare.")
    colours = dict(zip(_model_order(models), itertools.cycle(_COLOURS)))
    batches = {name: points for name, model in models.items() if len(points := _by_batch(model)) > 1}
    with _own_style():
        figure = _figure(5.6 * (1 + bool(batches)), 4.0)
        panels = figure.subplots(1, 1 + bool(batches), squeeze=False)[0]
        _draw_quality(panels[0], models, colours)
        if batches:
            _draw_batches(panels[1], batches, colours)
    return figure


def _draw_quality(panel: Axes, models: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        speed, loss = models[name]["decode_tokens_per_second"], models[name]["metrics"]["loss"]
        latency = 1e3 / speed["median"]
        low, high = sorted(1e3 / one for one in speed.get("quartiles") or [speed["median"]] * 2)
        panel.errorbar(
            [latency],
            [loss["value"]],
            xerr=[[max(latency - low, 0.0)], [max(high - latency, 0.0)]],
            yerr=[loss["stderr"] or 0.0],
            fmt="o",
            color=colour,
            capsize=2,
            label=_model_title(name),
        )
    panel.set_xlim(0, 1.05 * panel.get_xlim()[1])  # room for the marker of the slowest model
    panel.set_xlabel("milliseconds to decode a token")
    panel.set_ylabel("loss, nats per token")
    panel.set_title("Quality against latency", loc="left")
    panel.legend(frameon=False, fontsize=8)


def _by_batch(model: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Batch size and decoding speed, for the shortest prompts that were timed."""
    loads = [one for one in model.get("speeds") or [] if one["decode_tokens_per_second"]]
    shortest = min((one["prompt_tokens"] for one in loads), default=0)
    return sorted(
        (one["batch_size"], one["decode_tokens_per_second"]["median"])
        for one in loads
        if one["prompt_tokens"] == shortest
    )


def _draw_batches(panel: Axes, batches: Mapping[str, list[tuple[int, float]]], colours: Mapping[str, str]) -> None:
    for name in _model_order(batches):
        sizes, speeds = zip(*batches[name], strict=True)
        panel.plot(sizes, speeds, "-o", markersize=4, color=colours[name], label=_model_title(name))
    panel.set_ylim(bottom=0)
    panel.set_xticks(sorted({size for points in batches.values() for size, _ in points}))
    panel.set_xlabel("prompts at a time")
    panel.set_ylabel("tokens decoded per second, all prompts")
    panel.set_title("Speed by batch size", loc="left")
