"""Formats numbers and text for the Markdown of a model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any


def count(value: int) -> str:
    """With separators between thousands."""
    return f"{value:,}"


def short_count(value: float) -> str:
    """Three significant digits.

    >>> short_count(8_030_261_248), short_count(869_504), short_count(512)
    ('8.03B', '870k', '512')
    """
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def byte_size(value: float) -> str:
    """A size in decimal units, as the Hub shows it.

    >>> byte_size(22.08e9), byte_size(999_960), byte_size(356_000), byte_size(0)
    ('22.1 GB', '1.0 MB', '356.0 kB', '0 B')
    """
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.99995 * scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """A time in the units that people use.

    >>> duration(0.4), duration(42), duration(600), duration(9000), duration(2e6), duration(None)
    ('0.4 s', '42 s', '10 min', '2.5 h', '23 days', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for limit, scale, digits, unit in (
        (10, 1, 1, "s"),
        (120, 1, 0, "s"),
        (7200, 60, 0, "min"),
        (172800, 3600, 1, "h"),
    ):
        if seconds < limit:
            return f"{seconds / scale:.{digits}f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def measured(result: Mapping[str, Any] | None, factor: float = 1.0, unit: str = "") -> str:
    """A value with its standard error, both to two digits of the error.

    >>> measured({"value": 15.642631, "stderr": 0.1924}), measured({"value": 0.7, "stderr": 0.0042}, 100, " %")
    ('15.64 ± 0.19', '70.00 ± 0.42 %')
    """
    if not result or result.get("value") is None:
        return "–"
    value, stderr = result["value"] * factor, result.get("stderr")
    if not math.isfinite(value):
        return str(value)
    if not stderr or not math.isfinite(stderr):
        return f"{value:.4g}{unit}"
    stderr *= factor
    digits = min(max(1 - math.floor(math.log10(stderr)), 0), 8)
    return f"{value:.{digits}f} ± {stderr:.{digits}f}{unit}"


def difference(result: Mapping[str, Any] | None) -> str:
    """A difference with its sign and its standard error.

    >>> difference({"value": 0.0312, "stderr": 0.0042}), difference({"value": -0.5, "stderr": None}), difference(None)
    ('+0.0312 ± 0.0042', '-0.5', '–')
    """
    text = measured(result)
    return f"+{text}" if result and (result.get("value") or 0) > 0 else text


def ranges(indices: Iterable[int]) -> str:
    """Sorted indices with runs joined.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def short_digest(value: str) -> str:
    """The start of a digest, enough to recognise it."""
    return value.split(":")[-1][:12]


def cell(value: Any) -> str:
    """Text that cannot break out of a table cell."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").strip()


def table(rows: list[list[Any]]) -> str:
    """A Markdown table from rows of cells, the first row being the header; the first column is left-aligned."""
    header, *body = [[cell(value) for value in row] for row in rows]
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *body))


def code(text: Any) -> str:
    """Inline code that holds any one-line text."""
    text = cell(text)
    ticks = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def teacher_link(teacher: Mapping[str, Any]) -> str:
    """The teacher's Hub page; else its name."""
    if teacher["hub_id"]:
        return f"[{teacher['hub_id']}](https://huggingface.co/{teacher['hub_id']})"
    return code(teacher["label"]) if teacher["label"] else "a teacher"


def fence(text: Any, language: str = "") -> str:
    """A code block that no text can end."""
    text = str(text).replace("\r\n", "\n").rstrip("\n")
    ticks = "`" * max(3, max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def json_text(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)
