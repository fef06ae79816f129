"""The figure of a search: quality against cost, with the Pareto front."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats import read_artefact
from .drawing import BLUE, GREEN, GREY, ORANGE, RED, NothingToDrawError, _figure, _own_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_search(run_dir: str | os.PathLike[str]) -> Figure:
    """KL to the teacher of the shapes of a search, against their parameters and the time they take for a token.

    Shapes are compared where all of them have seen equally many tokens: after the first round of distillation, or
    before any in a search without. Those that no other beats in both are joined and named. What later rounds made of
    the better half hangs below; a ring marks the shape that was chosen. Bars are standard errors.

    Raises:
        OutputError: if `search.json` is missing.
        NothingToDrawError: if it holds no shape that was measured.
    """
    path = Path(run_dir) / "search.json"
    shapes = [one for one in read_artefact(path).get("candidates") or [] if one["proxy"]]
    if not shapes:
        raise NothingToDrawError(f"{path} holds no shape that was measured.")
    distilled = [one for one in shapes if one["rounds"]]
    panels: list[tuple[str, dict[str, float]]] = [
        ("parameters", {one["name"]: float(one["num_parameters"]) for one in shapes})
    ]
    if times := {
        one["name"]: 1e3 / one["decode_tokens_per_second"] for one in shapes if one["decode_tokens_per_second"]
    }:
        panels.append(("milliseconds to decode a token", times))
    with _own_style():
        figure = _figure(1.0 + 5.4 * len(panels), 4.6)
        drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for panel, (label, costs) in zip(drawn, panels, strict=True):
            _draw_search(panel, [one for one in shapes if one["name"] in costs], costs, shapes[0]["name"])
            panel.set_xlabel(label)
        drawn[0].xaxis.set_major_formatter("{x:,.0f}")
        values = [each["value"] for each in (one["proxy"] for one in shapes)]
        values += [each["kl"] for one in distilled for each in one["rounds"]]
        if min(values) > 0 and max(values) / min(values) > 8:
            drawn[0].set_yscale("log")
            drawn[0].yaxis.set_major_formatter("{x:g}")
            drawn[0].yaxis.set_minor_formatter("{x:g}")
        drawn[0].set_ylabel("KL to the teacher, nats per token")
        drawn[0].set_title(f"Search: {len(shapes)} shapes", loc="left")
        drawn[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_search(panel: Axes, shapes: list[dict[str, Any]], costs: dict[str, float], chosen: str) -> None:
    distilled = [one for one in shapes if one["rounds"]]

    def bars(points: list[tuple[float, float, float]], label: str, colour: str, marker: str, size: float) -> None:
        xs, ys, known = zip(*points, strict=True)
        errors = np.nan_to_num(np.array(known, dtype=float))
        panel.errorbar(
            xs, ys, yerr=errors, label=label, color=colour, fmt=marker, markersize=size,
            elinewidth=1, capsize=2, linestyle="none", fillstyle="none" if colour == GREY else "full",
        )  # fmt: skip

    first = [(costs[o["name"]], o["rounds"][0]["kl"], o["rounds"][0]["stderr"]) for o in distilled]
    pruned = [(costs[o["name"]], o["proxy"]["value"], o["proxy"]["stderr"]) for o in shapes]
    bars(pruned, "pruned, not retrained", GREY, "o", 5)
    if distilled:
        bars(first, f"distilled on {distilled[0]['rounds'][0]['num_tokens']:,} tokens", BLUE, "o", 5)
    later = [(costs[o["name"]], turn["kl"], turn["stderr"]) for o in distilled for turn in o["rounds"][1:]]
    if later:
        most = max(turn["num_tokens"] for one in distilled for turn in one["rounds"])
        bars(later, f"in later rounds, up to {most:,} tokens", ORANGE, "v", 4)
    for one in distilled:
        panel.plot(
            [costs[one["name"]]] * len(one["rounds"]), [turn["kl"] for turn in one["rounds"]],
            color=ORANGE, linewidth=0.8, zorder=1,
        )  # fmt: skip
    compared = distilled or shapes
    heights = {one["name"]: one["rounds"][0]["kl"] if distilled else one["proxy"]["value"] for one in compared}
    front = pareto_front({name: (costs[name], height) for name, height in heights.items()})
    panel.plot(
        [costs[name] for name in front], [heights[name] for name in front],
        color=GREEN, linewidth=1.4, zorder=1, label="no other shape is better in both",
    )  # fmt: skip
    middle = (min(costs.values()) + max(costs.values())) / 2
    for index, name in enumerate(front):
        right = costs[name] > middle  # written towards the middle, so that it stays within the panel
        panel.annotate(
            name.replace(" ", "\n"), (costs[name], heights[name]), xytext=((5, -5)[right], (6, -6)[index % 2]),
            textcoords="offset points", fontsize=6, color=GREEN, va=("bottom", "top")[index % 2],
            ha=("left", "right")[right],
        )  # fmt: skip
    for one in shapes:
        if one["name"] == chosen:
            height = one["rounds"][-1]["kl"] if one["rounds"] else one["proxy"]["value"]
            panel.plot(
                [costs[chosen]], [height], "o", markersize=12, markerfacecolor="none", markeredgecolor=RED,
                linestyle="none", label="chosen",
            )  # fmt: skip
    panel.margins(0.15, 0.12)


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other point beats or equals in both coordinates, by the first; less is better.

    >>> pareto_front({"a": (1, 5), "b": (2, 3), "c": (3, 4), "d": (4, 1)})
    ['a', 'b', 'd']
    """
    front: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not front or points[name][1] < points[front[-1]][1]:
            front.append(name)
    return front
