"""Prints the results of the commands."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import added, given
from .wording import worded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

    from ..distillation.capacity import Capacity
    from ..distillation.fake_runs import Setup
    from ..families import ArchSpec
    from ..recipe.estimates import Estimate
    from ..recipe.recommendations import Recommendation


def _print_shapes(shapes: Mapping[str, Any]) -> None:
    shapes = {**shapes, "notes": [worded(note) for note in shapes["notes"]]}
    if given("shapes", shapes):
        return
    from rich.table import Table

    from ..families import FIELD_OF_AXIS, VOCABULARY
    from ..sizes.compared import TITLES

    if "candidates" in shapes:
        total, found = shapes["num_parameters"]["teacher"], shapes["candidates"]
        table = Table("shape", title=f"{len(found)} shapes to compare ({shapes['model_type']})", title_justify="left")
        for column in ("parameters", "kept"):
            table.add_column(column, justify="right")
        for one in found:
            table.add_row(one["name"], f"{one['num_parameters']:,}", f"{one['num_parameters'] / total:.0%}")
        console = _console()
        console.print(table)
        for note in shapes["notes"]:
            console.print(f"Note: {note}", highlight=False)
        return
    table = Table(title=f"Shapes ({shapes['model_type']})", title_justify="left")
    for column in ("", "teacher", "student", "kept"):
        table.add_column(column, justify="left" if not column else "right")
    fields = {**FIELD_OF_AXIS, VOCABULARY: "vocab_size"}
    sizes = {fields.get(axis, axis): both for axis, both in shapes["sizes"].items()}
    rows = {**sizes, **{title: shapes[key] for key, title in TITLES.items() if key in shapes}}
    for name, both in rows.items():
        share = both["student"] / both["teacher"]
        table.add_row(name, f"{both['teacher']:,}", f"{both['student']:,}", f"{share:.0%}")
    console = _console()
    console.print(table)
    for note in shapes["notes"]:
        console.print(f"Note: {note}")


def _print_recommendation(teacher: str, made: Recommendation) -> None:
    if given("decisions", made.decisions):
        return
    from rich.table import Table

    from ..recipe.decisions import SOURCES

    table = Table(title=f"How to prune {teacher}", show_lines=True)
    for column in ("", "recommended", "why", "source"):
        table.add_column(column, overflow="fold")  # names of files and models are long words
    for decision in made.decisions:
        table.add_row(decision.name, decision.value, decision.reason, decision.source)
    console = _console()
    console.print(table, highlight=False)
    console.print("Sources:", *(f"- {name}: {where}" for name, where in SOURCES.items()), sep="\n", highlight=False)


def _print_capacity(found: Capacity, device: str | None, setup: Setup) -> None:
    found = replace(found, assumptions=tuple(map(worded, found.assumptions)))
    if given("capacity", {"peak": found.peak, "fits": found.fits, **vars(found)}):
        return
    from rich.table import Table

    from ..publishing.markdown import byte_size

    number = "" if setup.devices == 1 else f"each of {setup.devices} × "
    what = f"{number}{device}, {setup.sharding}, {setup.batch_size} × {found.max_length:,} tokens"
    table = Table("distilling takes", title_justify="left")
    table.add_column("memory", justify="right")
    for name, size in found.parts.items():
        table.add_row(name, byte_size(size))
    table.add_section()
    table.add_row(f"at the worst moment ({found.worst_moment})", byte_size(found.peak))
    table.add_row("there is", byte_size(found.memory))
    console = _console()
    console.print(f"On {what}:", highlight=False)
    console.print(table)
    fits = f"It fits; the largest batch per device is {found.largest_batch:,}."
    smaller = f"It does not fit; a batch of {found.largest_batch:,} per device would."
    none = "It does not fit, whatever the batch."
    console.print(fits if found.fits else smaller if found.largest_batch else none, highlight=False)
    if found.tokens_per_second is not None:
        limit = "matrix products" if found.limited_by == "products" else found.limited_by
        speed = f"About {found.tokens_per_second:,.0f} tokens/s in all, limited by {limit}."
        console.print(speed, highlight=False)
    console.print(f"Assumed: {'; '.join(found.assumptions)}.", highlight=False)


def _print_estimate(estimate: Estimate) -> None:
    """Print what a run will cost, in 80 columns."""
    estimate = replace(estimate, notes=tuple(map(worded, estimate.notes)))
    if given("estimate", estimate):
        return
    from rich.console import Console
    from rich.table import Table

    from ..publishing.markdown import byte_size, duration

    def size(number: float) -> str:
        return "?" if math.isnan(number) else byte_size(number) if number else ""

    machine = estimate.machine
    table = Table("stage", title=f"Estimate on this machine ({machine.device}, {machine.dtype})", title_justify="left")
    for column in ("time", "memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("of")
    for one in estimate.stages:
        seconds = "?" if math.isnan(one.seconds) else duration(one.seconds)
        table.add_row(one.stage, seconds, size(one.memory), size(one.disk), one.formula)
    table.add_section()
    table.add_row("all", duration(estimate.seconds), "", size(estimate.disk), "of what is known")
    table.add_row("free", "", size(machine.memory), size(machine.disk), "")
    console = Console(width=80, markup=False)
    console.print(table, highlight=False)
    for note in estimate.notes:
        console.print(f"Note: {note}", highlight=False)


def _print_matrix() -> None:
    from rich.table import Table

    from ..survey.matrix import WRAPPERS_TITLE, support_matrix

    matrix = support_matrix()
    rows = [{"names": names, "sizes": cells} for names, cells in matrix.rows]
    wrappers = [{"names": names, "holding": texts, "cut": said} for names, texts, said in matrix.wrappers]
    if given("matrix", {"families": rows, "wrappers": wrappers}):
        return
    console = _console()
    table = Table(title="What can be cut", title_justify="left", show_lines=True)
    table.add_column("family", min_width=32)
    if console.width >= 40 + sum(len(axis) + 3 for axis in matrix.axes):
        for axis in matrix.axes:
            table.add_column(axis, justify="center", no_wrap=True)
        for names, cells in matrix.rows:
            table.add_row(", ".join(names), *(cells.get(axis, "") for axis in matrix.axes))
    else:  # a column for every size would leave no room for the names
        table.add_column("sizes: ✓ can be cut, ✗ cannot")
        for names, cells in matrix.rows:
            table.add_row(
                ", ".join(names), "  ".join(f"{axis} {cells[axis]}" for axis in matrix.axes if cells.get(axis))
            )
    console.print(table)
    console.print(matrix.legend, highlight=False)
    for number, remark in enumerate(matrix.remarks, 1):
        console.print(f"{number}. {remark}", highlight=False)
    table = Table("models", "language model inside", "what can be cut", show_lines=True)
    for names, texts, said in matrix.wrappers:
        table.add_row(", ".join(names), ", ".join(texts), said)
    console.print(WRAPPERS_TITLE, highlight=False)
    console.print(table)


def _described_family(about: str, spec: ArchSpec) -> dict[str, Any]:
    """What `_print_family` prints, as values."""
    from ..families import FIELD_OF_AXIS
    from ..survey.matrix import cuttable_axes, refused_variants

    allowed = cuttable_axes(spec)
    sizes = {}
    for axis in spec.axes:
        cut = allowed.get(axis.name)
        sizes[FIELD_OF_AXIS.get(axis.name, axis.name)] = {
            "config": axis.fields,
            "can_be_cut": cut is not None and cut.allowed,
            "remarks": () if cut is None else cut.remarks,
        }
    return {"model_type": spec.model_type, "about": about, "sizes": sizes, "refused": list(refused_variants(spec))}


def _print_family(about: str, spec: ArchSpec) -> None:
    if added("families", _described_family(about, spec)):
        return
    from rich.table import Table

    from ..families import FIELD_OF_AXIS
    from ..survey.matrix import cuttable_axes, missing_from_transformers, refused_variants

    console = _console()
    console.print(about, highlight=False)
    allowed = cuttable_axes(spec)
    table = Table("size", "in config.json", "can be cut", "remarks", title=spec.model_type, title_justify="left")
    for axis in spec.axes:
        fields = ", ".join(axis.fields) or "–"
        stored = fields if axis.implied is None else f"{fields} (else {axis.implied})"
        cut = allowed.get(axis.name)
        mark, remarks = ("–", "") if cut is None else ("yes" if cut.allowed else "no", "; ".join(cut.remarks))
        table.add_row(FIELD_OF_AXIS.get(axis.name, axis.name), stored, mark, remarks)
    console.print(table)
    for condition in refused_variants(spec):
        console.print(f"Models {condition}", highlight=False)
    for remark in missing_from_transformers(spec.model_type):
        console.print(f"The family is {remark}.", highlight=False)
    rewritten = (
        *spec.layer_lists,
        *spec.leading_layers,
        *spec.layer_rules.trailing_layers,
        *spec.layer_rules.layer_indices,
    )
    rewritten += tuple(
        name for rule in (*spec.layer_rules.sparse_layers, *spec.layer_rules.sparse_ranges) for name in rule
    )
    if rewritten:
        console.print(f"Rewritten with the layers: {', '.join(rewritten)}.", highlight=False)


def _print_measurement(folder: Path) -> None:
    """Print the table of `evaluation.json`, if the file exists."""
    from rich.table import Table

    from ..formats import read_artefact

    if not (folder / "evaluation.json").is_file():
        return
    evaluation = read_artefact(folder / "evaluation.json")
    benchmarks = read_artefact(folder / "benchmarks.json") if (folder / "benchmarks.json").is_file() else None
    if given("evaluation", evaluation):
        if benchmarks is not None:
            given("benchmarks", benchmarks)
        return
    table = Table(title=f"On {evaluation['data']['num_tokens']:,} held-out tokens", title_justify="left")
    columns = {"perplexity": ("perplexity", 2), "bits_per_byte": ("bits per byte", 3)}
    if reference := evaluation["reference"]:
        columns |= {"kl_divergence": (f"KL to {reference}", 3), "top1_agreement": ("top-1 agreement", 3)}
    for column in ("model", "parameters", *(title for title, _ in columns.values())):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, values in evaluation["models"].items():
        cells = [_with_error(values["metrics"].get(metric), digits) for metric, (_, digits) in columns.items()]
        table.add_row(name, f"{values['num_parameters']:,}", *cells)
    console = _console()
    console.print(table)
    if "chat" in evaluation:
        console.print(_chat_table(evaluation))
    _print_speeds(evaluation)
    if "draft" in evaluation:
        console.print(_draft_table(evaluation))
    if any("positions" in values for values in evaluation["models"].values()):
        console.print(_position_table(evaluation))
    if benchmarks is not None:
        console.print(_task_table(benchmarks))


def _chat_table(evaluation: Mapping[str, Any]) -> Table:
    """Answers of the models, and what they predict of the reference's answers."""
    from rich.table import Table

    columns = {
        "perplexity": ("perplexity", 2),
        "kl_divergence": (f"KL to {evaluation['reference'] or 'itself'}", 3),
        "stopping": ("ended", 2),
        "format": ("kept the format", 2),
        "answer_tokens": ("tokens", 0),
    }
    chat = evaluation["chat"]
    table = Table(
        "model",
        title=f"Answers to {chat['num_prompts']:,} prompts, at most {chat['max_new_tokens']:,} tokens each",
        title_justify="left",
    )
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for name, values in evaluation["models"].items():
        table.add_row(name, *(_with_error(values["chat"][key], digits) for key, (_, digits) in columns.items()))
    return table


def _print_speeds(evaluation: Mapping[str, Any]) -> None:
    """Size and speed of the models, and the workloads that were timed, as on the card."""
    from ..publishing import card_tables

    if any(model.get("decode_tokens_per_second") for model in evaluation["models"].values()):
        rows = card_tables.measurement_table(evaluation)
        quality = {title for title, *_ in card_tables.METRICS.values()}
        _console().print(_as_table([row for row in rows if row[0] not in quality], "Size and speed"))
    if rows := card_tables.speed_table(evaluation) or []:
        _console().print(_as_table(rows, "Speed and memory by workload", 3))


def _draft_table(evaluation: Mapping[str, Any]) -> Table:
    """Models as drafts of the teacher, as on the card."""
    from ..publishing import card_tables

    rows = card_tables.draft_table(evaluation) or [[""]]
    draft = evaluation["draft"]
    return _as_table(rows, f"As a draft of {evaluation['reference']}, {draft['draft_tokens']:,} tokens at a time")


def _task_table(benchmarks: Mapping[str, Any]) -> Table:
    """Tasks of lm-evaluation-harness, as on the card."""
    from ..publishing.benchmark_tables import _benchmark_table

    return _as_table(_benchmark_table(benchmarks["models"], benchmarks.get("average")), "Benchmarks", 2)


def _as_table(rows: list[list[str]], title: str, num_left: int = 1) -> Table:
    """A table of the card, whose first row holds the titles of the columns.

    Args:
        rows: cells.
        title: of the table.
        num_left: columns that are aligned on the left.
    """
    from rich.table import Table

    header, *body = rows
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < num_left else "right")
    for row in body:
        table.add_row(*row)
    return table


def _position_table(evaluation: Mapping[str, Any]) -> Table:
    """Loss, and KL to the reference, by position in the row."""
    from rich.table import Table

    to = f", and KL to {evaluation['reference']}" if evaluation["reference"] else ""
    table = Table("positions", title=f"By position in the row: loss{to}", title_justify="left")
    models = {name: values["positions"] for name, values in evaluation["models"].items() if "positions" in values}
    for name in models:
        table.add_column(name, justify="right")
    for parts in zip(*models.values()):
        cells = [
            "; ".join(_with_error(part[key], 3) for key in ("loss", "kl_divergence") if key in part) for part in parts
        ]
        table.add_row(f"{parts[0]['begin']:,} to {parts[0]['end'] - 1:,}", *cells)
    return table


def _print_costs(folder: Path) -> bool:
    """Print what the finished stages took, beside the estimate; returns whether it went into a JSON document."""
    from ..publishing.card_tables import _cost_table
    from ..recipe.usage import read_costs

    costs = read_costs(folder)
    if given("costs", costs):
        given("folder", folder)
        return True
    if (rows := _cost_table(costs)) is not None:
        console = _console()
        console.print(_as_table(rows, "What it took"))
        console.print("Measured memory is that of the whole process, libraries included.", highlight=False)
    return False


def _print_results(folder: Path) -> None:
    """Print the results of a run, if they exist: the table, the samples and the path of the card."""
    from ..formats import read_artefact

    _print_measurement(folder)
    samples = read_artefact(folder / "samples.json")["samples"] if (folder / "samples.json").is_file() else []
    if _print_costs(folder):
        given("samples", samples)
        return
    console = _console()
    for sample in samples[:2]:
        for name, text in sample["completions"].items():
            console.print(f"\n{name} | {sample['prompt']!r} →", highlight=False)
            console.print(text.strip(), highlight=False)
    if (folder / "README.md").is_file():
        console.print(f"\nModel card: {folder / 'README.md'}", soft_wrap=True)
    if (folder / "report.html").is_file():
        console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def _console() -> Console:
    """A console that is as wide as the terminal; without one as wide as COLUMNS says, or 120 columns."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(width=width, markup=False)  # names and prompts may hold square brackets


def _with_error(metric: Mapping[str, float] | None, digits: int) -> str:
    if not metric:
        return "–"
    from ..publishing.markdown import measured

    value, stderr = f"{metric['value']:.{digits}f}", metric["stderr"]
    if stderr and not float(f"{stderr:.{digits}f}"):  # small errors are no zeros
        return measured(metric)
    return value if stderr is None else f"{value} ± {stderr:.{digits}f}"
