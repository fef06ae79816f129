"""Pictures of a run: training curve, importance of units, of layers and blocks of layers, shapes of a search.

Each function reads the files of one run folder and returns a `matplotlib.figure.Figure` that belongs to nobody else:
no pyplot, no global state, and the user's matplotlib style is not applied. The same files give the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MismatchError, OutputError
from ..files import read_json, replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers and in grey (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"

#: Title of each axis; an axis that is not named here is shown under its own name.
AXIS_TITLES = {
    "hidden": "Embedding channels (one score for the whole network)",
    "ffn": "MLP neurons, by layer",
    "heads": "Attention heads, by layer",
    "kv": "Key-value groups, by layer",
    "experts": "Experts, by layer",
    "moe_ffn": "Neurons of an expert, by layer (mean of its experts)",
    "shared_ffn": "Neurons of shared experts, by layer",
    "conv_dim": "Channels of short convolutions, by layer",
    "ssm_heads": "State-space heads, by layer",
    "ssm_dim": "Dimensions of a state-space head, by layer (mean of its heads)",
}

#: Up to this many units a per-layer axis is drawn as a map of single units, above it as sorted curves.
MAX_MAP_UNITS = 64

#: Points of a sorted curve that are drawn.
MAX_POINTS = 600

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

DPI = 120


def plot_training(run_dir: str | os.PathLike[str]) -> Figure:
    """Loss, KL to the teacher, token agreement and learning rate against the optimiser step.

    Reads `distillation.json`; a panel whose values were never logged is left out.

    Raises:
        OutputError: if the file is missing.
        MismatchError: if it logged no loss at all.
    """
    path = Path(run_dir) / "distillation.json"
    history = read_json(path).get("log_history") or []
    named = {key for entry in history for key in entry if re.fullmatch(r"eval_.+_loss", key)}  # several eval datasets
    styles = LOSS_SERIES | {
        key: (f"evaluation loss, {key[5:-5]}", colour, "--")
        for key, colour in zip(sorted(named), itertools.cycle((ORANGE, GREEN, RED, GREY)))
    }
    losses = {key: _series(history, key) for key in styles}
    losses = {key: points for key, points in losses.items() if points}
    if not losses:
        raise MismatchError(f"{path} logs no loss; expected at least one entry with `loss` or `eval_loss`.")
    # The total loss is the KL itself when nothing else is in it: one line, not two on top of each other.
    for total, part in (("loss", "kl"), ("eval_loss", "eval_kl")):
        if part in losses and total in losses and np.allclose(losses[part], losses[total], rtol=1e-3):
            del losses[part]
    agreement = {key: _series(history, key) for key in AGREEMENT_SERIES}
    agreement = {key: points for key, points in agreement.items() if points}
    rate = _series(history, "learning_rate")

    heights = [3.0] + [1.6] * bool(agreement) + [1.2] * bool(rate)
    with _own_style():
        figure = _figure(7.5, sum(heights) + 0.9)
        panels = list(
            figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        )
        panel = panels.pop(0)
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
        if agreement:
            panel = panels.pop(0)
            for key, points in agreement.items():
                label, colour, style = AGREEMENT_SERIES[key]
                _curve(panel, [(step, 100 * value) for step, value in points], label, colour, style)
            panel.set_ylabel("top-1 agreement\nwith teacher, %")
            panel.legend(frameon=False)
        if rate:
            panel = panels.pop(0)
            _curve(panel, rate, "learning rate", GREY, "-")
            panel.set_ylabel("learning rate")
            panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            panel.set_ylim(bottom=0)
        panel.set_xlabel("optimiser step")
        figure.align_ylabels()
    return figure


def plot_importance(run_dir: str | os.PathLike[str]) -> Figure:
    """Importance of the units of every width axis, with what the plan keeps and drops.

    The network-wide axis and wide per-layer axes are sorted curves with the cut as a line; per-layer axes of few units
    (heads, KV groups) are maps of single units with the dropped ones crossed out. Units inside other units (the
    neurons of every expert) are ranked in each of these, and averaged by rank. Layers without units of an axis are
    left out.

    Raises:
        OutputError: if `scores.safetensors` or `pruning_plan.json` is missing.
        MismatchError: if the scores hold no width axis.
    """
    scores, plan = _scores_and_plan(run_dir)
    kept_indices = _kept_indices(run_dir)
    known = (*AXIS_TITLES, *sorted(set(scores) - {*AXIS_TITLES, "blocks"}))
    widths = [name for name in known if name in scores and not np.isnan(scores[name]).all()]
    if not widths:
        raise MismatchError(f"{Path(run_dir) / 'scores.safetensors'} holds no width axis, only {sorted(scores)}.")
    dropped_layers = sorted(plan.get("layers_dropped") or [])

    columns = 1 if len(widths) == 1 else 2
    rows = math.ceil(len(widths) / columns)
    with _own_style():
        figure = _figure(5.6 * columns, 3.9 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in panels[len(widths) :]:
            panel.set_axis_off()
        for panel, name in zip(panels, widths, strict=False):
            values = scores[name]
            kept = _kept_count(plan, name)
            if values.ndim == 1:
                _draw_sorted(figure, panel, values[None], kept, [])
            elif values.ndim == 3:
                _draw_sorted(figure, panel, -np.sort(-values).mean(axis=1), kept, dropped_layers)
            elif values.shape[1] <= MAX_MAP_UNITS:
                _draw_map(figure, panel, values, kept_indices.get(name), plan.get("layers_kept"), dropped_layers)
            else:
                _draw_sorted(figure, panel, values, kept, dropped_layers)
            units = values.shape[-1]
            where = "" if values.ndim == 1 or not dropped_layers else " in each kept layer"
            cut = f"all {units:,} kept" if kept is None or kept == units else f"{kept:,} of {units:,} kept"
            panel.set_title(f"{AXIS_TITLES.get(name, name)}\n{cut}{where}", loc="left")
    return figure


def plot_layers(run_dir: str | os.PathLike[str]) -> Figure:
    """Block importance of every layer and of every contiguous block of layers, dropped layers marked.

    Block importance is 1 − cos(input, output) of the layers (P1 §2.2): low means that they change little. Where the
    plan says that layers were scored by a `depth_metric`, that is drawn: the model's worth without them.

    Raises:
        OutputError: if `scores.safetensors` or `pruning_plan.json` is missing.
        MismatchError: if the scores hold no block importance.
    """
    scores, plan = _scores_and_plan(run_dir)
    if "blocks" not in scores:
        raise MismatchError(f"{Path(run_dir) / 'scores.safetensors'} holds no `blocks`, only {sorted(scores)}.")
    blocks = scores["blocks"]
    num_layers = len(blocks)
    settings = (plan.get("scores") or {}).get("settings") or {}
    label = f"{settings['depth_metric']} without" if settings.get("depth_metric") else "block importance"
    dropped = sorted(plan.get("layers_dropped") or [])
    single = np.diag(blocks)

    with _own_style():
        figure = _figure(11.2, 4.4)
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
        colours = [RED if layer in dropped else BLUE for layer in range(num_layers)]
        left.bar(range(num_layers), single, color=colours, width=0.75)
        if len(single) and np.nanmin(single) > 0 and np.nanmax(single) / np.nanmin(single) > 20:
            left.set_yscale("log")
        left.set_xlabel("layer")
        left.set_ylabel(label)
        left.set_title("Single layers", loc="left")
        _integer_ticks(left, "x", num_layers)
        left.grid(False, axis="x")
        handles = [_patch(BLUE, "kept")] + ([_patch(RED, "dropped")] if dropped else [])
        left.legend(handles=handles, frameon=False, loc="best")

        # Row = first layer of the block, column = last layer; the lower triangle is empty by definition.
        image = right.imshow(
            np.ma.masked_invalid(blocks), cmap="viridis", origin="upper", interpolation="nearest", aspect="equal"
        )
        right.grid(False)
        right.set_xlabel("last layer of the block")
        right.set_ylabel("first layer of the block")
        right.set_title("Contiguous blocks", loc="left")
        _integer_ticks(right, "x", num_layers)
        _integer_ticks(right, "y", num_layers)
        figure.colorbar(image, ax=right, label=label, fraction=0.046, pad=0.03)
        for first, last in _runs(dropped):
            right.add_patch(_outline(last, first))
        if dropped:
            right.legend(handles=[_patch("none", "dropped", edge=RED)], frameon=False, loc="lower left")
    return figure


def plot_search(run_dir: str | os.PathLike[str]) -> Figure:
    """KL to the teacher of the shapes of a search, against their parameters and the time they take for a token.

    Shapes are compared where all of them have seen equally many tokens: after the first round of distillation, or
    before any in a search without. Those that no other beats in both are joined and named. What later rounds made of
    the better half hangs below; a ring marks the shape that was chosen. Bars are standard errors.

    Raises:
        OutputError: if `search.json` is missing.
        MismatchError: if it holds no shape that was measured.
    """
    path = Path(run_dir) / "search.json"
    shapes = [one for one in read_json(path).get("candidates") or [] if one["proxy"]]
    if not shapes:
        raise MismatchError(f"{path} holds no shape that was measured.")
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
        xs, ys, errors = zip(*points, strict=True)
        panel.errorbar(
            xs, ys, yerr=np.nan_to_num(errors), label=label, color=colour, fmt=marker, markersize=size,
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


#: File in `plots/` → (function that draws it, files of the run folder that it needs).
PLOTS = {
    "training.png": (plot_training, ("distillation.json",)),
    "importance.png": (plot_importance, ("scores.safetensors", "pruning_plan.json")),
    "layers.png": (plot_layers, ("scores.safetensors", "pruning_plan.json")),
    "search.png": (plot_search, ("search.json",)),
}


def write_plots(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw every picture whose inputs are in the run folder into `plots/`.

    A picture whose inputs are there but hold nothing to draw (no loss was ever logged, only layers were scored) is
    left out; one whose inputs are gone stays as it is.

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
        try:
            figure = draw(run_dir)
        except MismatchError:
            continue
        path = run_dir / "plots" / name
        with replacing_file(path) as temporary, _own_style():
            # `Software` would carry matplotlib's version, and nothing else in a PNG depends on when it was made.
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        written.append(path)
    return written


def _scores_and_plan(run_dir: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors.numpy import load_file

    path = Path(run_dir) / "scores.safetensors"
    if not path.is_file():
        raise OutputError(f"{path} does not exist. Save the importance scores there first.")
    return load_file(path), read_json(Path(run_dir) / "pruning_plan.json")


def _kept_indices(run_dir: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    path = Path(run_dir) / "pruning_plan.safetensors"
    return load_file(path) if path.is_file() else {}


def _kept_count(plan: dict[str, Any], axis: str) -> int | None:
    size = (plan.get("sizes") or {}).get(axis) or {}
    kept = size.get("student")
    return kept if isinstance(kept, int) else None


def _series(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every entry that logged a finite `key`."""
    return [
        (entry["step"], float(entry[key]))
        for entry in history
        if "step" in entry and isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
    ]


def _curve(panel: Axes, points: list[tuple[float, float]], label: str, colour: str, style: str) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None
    panel.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3)


def _draw_sorted(figure: Figure, panel: Axes, values: np.ndarray, kept: int | None, dropped_layers: list[int]) -> None:
    """Curves of `values` [layers, units], each sorted from most to least important."""
    from matplotlib import cm, colors, ticker

    num_layers, units = values.shape
    ranked = -np.sort(-values.astype(np.float64), axis=1)
    # More points than a picture is wide only cost time: the first, the last, and evenly spaced ones between.
    shown = np.unique(np.linspace(0, units - 1, min(units, MAX_POINTS)).round().astype(int))
    ranks, ranked = shown + 1, ranked[:, shown]
    if num_layers == 1:
        panel.plot(ranks, ranked[0], color=BLUE)
    else:
        scale = colors.Normalize(0, num_layers - 1)
        shades = cm.ScalarMappable(norm=scale, cmap="viridis")
        for layer in np.flatnonzero(~np.isnan(ranked).any(axis=1)).tolist():
            dropped = layer in dropped_layers
            panel.plot(
                ranks,
                ranked[layer],
                color=GREY if dropped else shades.cmap(layer / (num_layers - 1)),
                linewidth=0.6 if dropped else 1.0,
                zorder=1 if dropped else 2,
            )
        label = "layer" + (" (grey: dropped)" if dropped_layers else "")
        figure.colorbar(shades, ax=panel, label=label, ticks=ticker.MaxNLocator(integer=True))
    positive = ranked[ranked > 0]
    if len(positive) == np.count_nonzero(~np.isnan(ranked)) and positive.max() / positive.min() > 20:
        panel.set_yscale("log")
    panel.set_xlabel("unit, most important first")
    panel.set_ylabel("importance")
    panel.set_xlim(1, max(units, 2))
    if kept is not None and kept < units:
        panel.axvline(kept + 0.5, color=RED, linewidth=1.5)
        panel.axvspan(kept + 0.5, max(units, 2), color=RED, alpha=0.08, linewidth=0)
        panel.annotate(
            "dropped",
            xy=(kept + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            color=RED,
            va="top",
            ha="left",
        )


def _draw_map(
    figure: Figure,
    panel: Axes,
    values: np.ndarray,
    kept: np.ndarray | None,
    layers_kept: list[int] | None,
    dropped_layers: list[int],
) -> None:
    """Map of `values` [layers, units]; `kept` [kept layers, kept units] or [kept units] are the surviving units."""
    num_layers, units = values.shape
    # Layers differ by orders of magnitude and a choice is made within each: show what is compared.
    peak = np.abs(values).max(axis=1, keepdims=True)
    relative = values / np.where(peak > 0, peak, 1)
    least = min(0, np.nanmin(relative))
    image = panel.imshow(relative, cmap="viridis", aspect="auto", interpolation="nearest", vmin=least)
    figure.colorbar(image, ax=panel, label="importance relative to the layer's highest")
    for first, last in _runs(dropped_layers):
        panel.axhspan(first - 0.5, last + 0.5, color="white", alpha=0.75, linewidth=0)
    survives = np.ones((num_layers, units), dtype=bool)
    if kept is not None:
        for row, layer in enumerate(range(num_layers) if layers_kept is None else layers_kept):
            survives[layer] = np.isin(np.arange(units), kept if kept.ndim == 1 else kept[row])
    rows, columns = np.nonzero(~survives & ~np.isnan(values))
    # A white cross under a red one is visible on every colour of the map; half as wide as a cell of this panel.
    size = float(np.clip((0.5 * min(300 / units, 230 / num_layers)) ** 2, 4, 60))
    width = math.sqrt(size) / 6
    panel.scatter(columns, rows, marker="x", s=size, color="white", linewidths=2 * width)
    panel.scatter(columns, rows, marker="x", s=size, color=RED, linewidths=width)
    panel.grid(False)
    panel.set_xlim(-0.5, units - 0.5)
    panel.set_ylim(num_layers - 0.5, -0.5)
    panel.set_xlabel("unit" + (" (crossed out: dropped)" if len(rows) else ""))
    panel.set_ylabel("layer" + (" (faded: dropped)" if dropped_layers else ""))
    _integer_ticks(panel, "x", units)
    _integer_ticks(panel, "y", num_layers)


def _runs(layers: list[int]) -> list[tuple[int, int]]:
    """Contiguous runs of a sorted list.

    >>> _runs([2, 3, 4, 9])
    [(2, 4), (9, 9)]
    """
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _integer_ticks(panel: Axes, which: str, count: int) -> None:
    step = max(1, math.ceil(count / 16))
    getattr(panel, f"set_{which}ticks")(range(0, count, step))


def _patch(face: str, label: str, edge: str | None = None) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=face, edgecolor=edge or face, label=label, linewidth=2)


def _outline(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2, clip_on=False)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextlib.contextmanager
def _own_style() -> Iterator[None]:
    """Defaults of matplotlib plus ours, whatever the user's matplotlibrc says; everything is restored afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 10,
                "axes.grid": True,
                "grid.alpha": 0.25,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
            }
        )
        yield
