"""Figures of importance scores: units kept and dropped, and layers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import OutputError
from ..formats import migrate, read_artefact
from .drawing import (
    BLUE,
    GREY,
    MAX_POINTS,
    RED,
    NothingToDrawError,
    _figure,
    _integer_ticks,
    _outline,
    _own_style,
    _patch,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Title of each axis. Other axes are shown under their own names.
PANEL_TITLES = {
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


def plot_importance(run_dir: str | os.PathLike[str]) -> Figure:
    """Importance of the units of every width axis, with what the plan keeps and drops.

    The network-wide axis and wide per-layer axes are sorted curves with the cut as a line; per-layer axes of few units
    (heads, KV groups) are maps of single units with the dropped ones crossed out. Units inside other units (the
    neurons of every expert) are ranked in each of these, and averaged by rank. Layers without units of an axis are
    left out.

    Raises:
        OutputError: if `scores.safetensors` or `pruning_plan.json` is missing.
        NothingToDrawError: if the scores hold no width axis.
    """
    scores, plan = _scores_and_plan(run_dir)
    kept_indices = _kept_indices(run_dir)
    known = (*PANEL_TITLES, *sorted(set(scores) - {*PANEL_TITLES, "blocks"}))
    widths = [name for name in known if name in scores and not np.isnan(scores[name]).all()]
    if not widths:
        raise NothingToDrawError(f"{Path(run_dir) / 'scores.safetensors'} holds no width axis, only {sorted(scores)}.")
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
            panel.set_title(f"{PANEL_TITLES.get(name, name)}\n{cut}{where}", loc="left")
    return figure


def plot_layers(run_dir: str | os.PathLike[str]) -> Figure:
    """Block importance of every layer and of every contiguous block of layers, dropped layers marked.

    Block importance is 1 − cos(input, output) of the layers (Muralidharan et al. 2024, §2.2): low means that they
    change little. Where layers were scored by a `depth_metric`, the figure shows that metric without them.

    Raises:
        OutputError: if `scores.safetensors` or `pruning_plan.json` is missing.
        NothingToDrawError: if the scores hold no block importance.
    """
    scores, plan = _scores_and_plan(run_dir)
    if "blocks" not in scores:
        raise NothingToDrawError(f"{Path(run_dir) / 'scores.safetensors'} holds no `blocks`, only {sorted(scores)}.")
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


def _scores_and_plan(run_dir: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    path = Path(run_dir) / "scores.safetensors"
    if not path.is_file():
        raise OutputError(f"{path} does not exist. Save the importance scores there first.")
    with safe_open(path, "np") as stored:
        migrate(json.loads((stored.metadata() or {}).get("minitron_hf", "{}")), path)
    return load_file(path), read_artefact(Path(run_dir) / "pruning_plan.json")


def _kept_indices(run_dir: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    path = Path(run_dir) / "pruning_plan.safetensors"
    return load_file(path) if path.is_file() else {}


def _kept_count(plan: dict[str, Any], axis: str) -> int | None:
    size = (plan.get("sizes") or {}).get(axis) or {}
    kept = size.get("student")
    return kept if isinstance(kept, int) else None


def _draw_sorted(figure: Figure, panel: Axes, values: np.ndarray, kept: int | None, dropped_layers: list[int]) -> None:
    """Curves of `values` [layers, units], each sorted from most to least important."""
    from matplotlib import cm, colors, ticker

    num_layers, units = values.shape
    ranked = -np.sort(-values.astype(np.float64), axis=1)
    # Draw at most one point per pixel: the first, the last, and evenly spaced ones between.
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
    # Scores of layers differ by orders of magnitude, and units are compared within a layer only.
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
