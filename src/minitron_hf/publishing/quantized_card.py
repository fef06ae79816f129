"""Renders the card of a quantised copy from the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json, write_text
from ..formats import read_artefact
from . import markdown as md
from .card_tables import measurement_table
from .card_values import legal_files
from .how_to_load import how_to_load
from .licences import duties_of
from .readme import END_OF_CARD, keep_foreign_readme, text_below_card
from .templating import environment_of


def render_quantized_card(folder: Path) -> str:
    """The card of a quantised copy: metadata and Markdown.

    The result depends only on `hub.json`, `config.json`, `evaluation.json`, `teacher.json` and the names of the legal
    texts in the folder. Text below `END_OF_CARD` in an existing `README.md` is kept.

    Raises:
        OutputError: if `hub.json` is missing.
        MismatchError: if one of the files cannot be understood.
    """
    from ..quantization import METHODS, quantised_name

    hub = read_artefact(folder / "hub.json")
    found = {
        name: read_artefact(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else {}
        for name in ("evaluation", "teacher")
    }
    method, teacher = hub["method"], found["teacher"]
    config = read_json(folder / "config.json").get("quantization_config") or {}
    loading = how_to_load(folder)
    values = {
        "metadata": _metadata(hub, teacher, str(loading["task"])),
        "loading": loading,
        "title": hub["repo_id"].split("/")[-1],
        "student": hub["student"],
        "repo_id": hub["repo_id"],
        "method": METHODS[method].help if method in METHODS else method,
        "package": METHODS[method].package[0] if method in METHODS else config.get("quant_method"),
        "measurements": _measurements(found["evaluation"], quantised_name(method)),
        "teacher": teacher,
        "duties": (duties := duties_of(teacher)) and duties.text,
        "legal_files": legal_files(folder),
    }
    filters = {"table": md.table, "code": md.code, "cell": md.cell, "address": "<{}>".format}
    rendered = environment_of(filters, html=False).get_template("quantized_card.md.j2").render(values)
    return f"{rendered.rstrip()}\n\n{END_OF_CARD}\n{text_below_card(folder / 'README.md') or ''}"


def is_quantized_copy(folder: Path) -> bool:
    """Whether a folder is a quantised copy that was published beside its student."""
    path = folder / "hub.json"
    return path.is_file() and "student" in read_artefact(path)


def write_quantized_card(folder: Path) -> Path:
    """Render the card of a quantised copy into `README.md`; one that is not a card is renamed.

    Raises:
        OutputError: if `hub.json` is missing.
        MismatchError: if one of the files cannot be understood.
    """
    path = folder / "README.md"
    content = render_quantized_card(folder)
    keep_foreign_readme(path)
    write_text(path, content)
    return path


def _metadata(hub: dict[str, Any], teacher: dict[str, Any], task: str) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        language=teacher.get("language") or None,
        license=teacher.get("license"),
        license_name=teacher.get("license_name"),
        license_link=teacher.get("license_link"),
        library_name="transformers",
        pipeline_tag=task,
        tags=["minitron", "quantized"],
        base_model=hub["student"],
        base_model_relation="quantized",
    ).to_yaml(line_break="\n")


def _measurements(evaluation: dict[str, Any], own: str) -> list[list[str]] | None:
    """The table of teacher, student and this copy; None if the copy was not measured."""
    models = evaluation.get("models") or {}
    if own not in models:
        return None
    shown = {name: models[name] for name in ("teacher", "student", own) if name in models}
    return measurement_table({**evaluation, "models": shown})
