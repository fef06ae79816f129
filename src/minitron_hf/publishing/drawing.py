"""Shared style and shapes of the figures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import MismatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class NothingToDrawError(MismatchError):
    """The files hold nothing for this figure."""


#: Colours that stay apart for colour-blind readers and in grey (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"

#: Points of a sorted curve that are drawn.
MAX_POINTS = 600

DPI = 120


def _curve(panel: Axes, points: list[tuple[float, float]], label: str, colour: str, style: str) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None
    panel.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3)


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
    """Use matplotlib's defaults and this package's style for a while, instead of the user's matplotlibrc."""
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
