"""Renders the model card from the files of a run folder.

`render_model_card` reads nothing but the files of the folder, so the card of a published student can be rendered again
from its repository, byte for byte.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MismatchError, OutputError
from ..files import read_json, write_text
from ..saving import least_transformers
from . import markdown as md
from .card_metadata import dataset_name, is_repo_id, metadata
from .card_tables import (
    _architecture_table,
    _benchmark_table,
    _depth_table,
    _measurement_table,
    _model_title,
    _round_table,
    _search_table,
)
from .plots import PLOTS, write_plots

#: Legal texts that go with the teacher's weights.
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

#: What licences ask of a derived model beyond passing them on: start of the licence id or name → sentence.
LICENCE_DUTIES = {
    "llama3": "Built with Llama. This licence asks that the name of a derived model begins with “Llama”.",
    "llama4": "Built with Llama. This licence asks that the name of a derived model begins with “Llama”.",
    "gemma": "The Gemma terms ask that modified files say so (this card does) and that the terms and their use "
    "restrictions are passed on to everyone who gets the model.",
}


def render_model_card(run_dir: str | os.PathLike[str]) -> str:
    """The model card of a run folder: YAML metadata and Markdown.

    A pure function of the files in `run_dir` (and of this package's template): no clock, no network, no environment,
    and not the name of the folder. A section whose file is missing is absent or says “not measured”.

    Raises:
        OutputError: if the folder holds neither a student nor a plan.
        MismatchError: if one of the files cannot be understood.
    """
    import jinja2

    run_dir = Path(run_dir)
    run = _read_run(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; free text only ever stands in fences and escaped cells
    )
    environment.filters.update(FILTERS)
    try:
        card = _card_values(run)
        return environment.get_template("model_card.md.j2").render(card)
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise MismatchError(
            f"The files in {run_dir} do not have the expected fields ({type(error).__name__}: {error}). They were "
            "written by another version of this package: run their stages again."
        ) from error


def write_model_card(run_dir: str | os.PathLike[str]) -> Path:
    """Draw the plots whose inputs are in the run folder, render the card, and write it to `README.md`.

    Raises:
        OutputError: if the folder holds neither a student nor a plan, or cannot be written.
    """
    run_dir = Path(run_dir)
    _read_run(run_dir)  # refuses an empty folder before anything is drawn in it
    write_plots(run_dir)
    path = run_dir / "README.md"
    write_text(path, render_model_card(run_dir))
    return path


def _read_run(run_dir: Path) -> dict[str, Any]:
    """The files that the card is made from: JSON documents (None if missing), names of plots and legal texts."""
    documents = ("config", "pruning_plan", "teacher", "distillation", "evaluation", "benchmarks", "hub", "search")
    run: dict[str, Any] = {
        name: read_json(run_dir / f"{name}.json") if (run_dir / f"{name}.json").is_file() else None
        for name in documents
    }
    if run["config"] is None and run["pruning_plan"] is None:
        raise OutputError(
            f"{run_dir} holds neither config.json nor pruning_plan.json: there is no student to describe. "
            "Give the folder that the run wrote."
        )
    samples = run_dir / "samples.json"
    try:
        run["samples"] = json.loads(samples.read_text(encoding="utf-8")) if samples.is_file() else None
    except json.JSONDecodeError as error:
        raise MismatchError(f"{samples} is not valid JSON ({error}). Delete it and run its stage again.") from error
    recipe = run_dir / "recipe.yaml"
    folders = sorted(run_dir.glob("rounds/*"), key=lambda path: (len(path.name), path.name))
    run["rounds"] = [
        {name: read_json(folder / f"{name}.json") for name in ("pruning_plan", "distillation")} for folder in folders
    ]
    run["recipe"] = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    run["plots"] = [name for name in PLOTS if (run_dir / "plots" / name).is_file()]
    run["legal_files"] = sorted(path.name for path in run_dir.glob("*") if matches(path.name, LEGAL_FILES))
    return run


def _card_values(run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    distillation, evaluation = run["distillation"], run["evaluation"]
    last, rounds = run["pruning_plan"], _round_table(run)
    run = {**run, "pruning_plan": _plan_of_all(run)}
    plan = run["pruning_plan"]
    teacher = _teacher(run)
    repo_id = (run["hub"] or {}).get("repo_id")
    title = repo_id.split("/")[-1] if repo_id else f"{teacher['label'] or 'student'}-minitron"
    models = evaluation["models"] if evaluation else {}
    return {
        "metadata": metadata(run, teacher, title),
        "title": title,
        "repo_id": repo_id,
        "teacher": teacher,
        "plan": plan,
        "distillation": distillation,
        "evaluation": evaluation,
        "models": models,
        "rounds": rounds,
        "tokens": sum((one["distillation"] or {}).get("num_input_tokens_seen") or 0 for one in (*run["rounds"], run)),
        "calibration": _calibration(plan) if plan else None,
        "architecture": _architecture_table(plan) if plan else None,
        "search": _search_table((run["search"] or plan or {}).get("candidates") or []),
        "depth": _depth_table(last) if last else None,
        "measurements": _measurement_table(evaluation) if evaluation else None,
        "speed_measured": any(model.get("decode_tokens_per_second") for model in models.values()),
        "loss_gap": _loss_gap(evaluation) if evaluation else None,
        "benchmarks": _benchmark_table(run["benchmarks"]) if run["benchmarks"] else None,
        "arguments": [[key, value] for key, value in distillation["arguments"].items() if value is not None]
        if distillation
        else None,
        "final_evaluation": _last_evaluation(distillation["log_history"]) if distillation else {},
        "samples": run["samples"],
        "recipe": run["recipe"],
        "plots": run["plots"],
        "legal_files": run["legal_files"],
        "duties": _licence_duties(teacher),
        "evaluation_data": dataset_name(evaluation["data"]) if evaluation else None,
        "least_transformers": least_transformers(run["config"]) if run["config"] else None,
        "library_version": next((v["minitron_hf"] for v in _stage_versions(run).values() if "minitron_hf" in v), None),
        "versions": _versions(run),
        "digests": _digests(run),
    }


def _teacher(run: Mapping[str, Any]) -> dict[str, Any]:
    """What `teacher.json` says, or else the name in the plan, with a label and the Hub id if there is one."""
    known = run["teacher"] or {}
    plan = run["pruning_plan"] or {}
    name = known.get("name_or_path") or (plan.get("teacher") or {}).get("name_or_path")
    if "hub_id" in known:
        hub_id = known["hub_id"]
    else:  # not recorded: an `owner/name` is taken for what it looks like, a bare name or a path is not
        hub_id = name if name and name.count("/") == 1 and is_repo_id(name) else None
    fields = ("license", "license_name", "license_link", "language", "datasets")
    label = re.split(r"[\\/]", name.rstrip("\\/"))[-1] if name else None
    return {
        **{field: known.get(field) for field in fields},
        "hub_id": hub_id,
        "revision": known.get("revision") or (plan.get("teacher") or {}).get("revision"),
        "label": label,
        "link": f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else md.code(label) if label else "a teacher",
    }


def _plan_of_all(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan; of several rounds, what all of them together have made of the teacher of the first."""
    last, before = run["pruning_plan"], [one["pruning_plan"] for one in run["rounds"]]
    if not before:
        return last
    plans = [*before, last]
    kept = before[0]["layers_kept"]
    for plan in plans[1:]:
        kept = [kept[layer] for layer in plan["layers_kept"]]
    depth = before[0]["sizes"]["layers"]["teacher"]
    return {
        **last,
        "teacher": before[0]["teacher"],
        "sizes": {
            axis: {"teacher": before[0]["sizes"].get(axis, both)["teacher"], "student": both["student"]}
            for axis, both in last["sizes"].items()
        },
        "layers_kept": kept,
        "layers_dropped": [layer for layer in range(depth) if layer not in kept],
        "notes": [f"Round {number}: {note}" for number, plan in enumerate(plans, 1) for note in plan["notes"]],
    }


def _calibration(plan: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings of the scores, without the teacher (it has its own place) and what was left at nothing."""
    settings = (plan.get("scores") or {}).get("settings") or {}
    return [
        (key.replace("_", " "), value)
        for key, value in settings.items()
        if key not in ("model", "metric") and isinstance(value, str | int | float)
    ]


def _loss_gap(evaluation: Mapping[str, Any]) -> float | None:
    """How much more the student loses per token than its reference, in nats; None if either was not measured."""
    models = evaluation["models"]
    losses = []
    for name in ("student", evaluation.get("reference")):
        measured = ((models.get(name) or {}).get("metrics") or {}).get("loss")
        if not measured or not math.isfinite(measured["value"]):
            return None
        losses.append(measured["value"])
    return losses[0] - losses[1]


def _last_evaluation(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last logged value of every evaluation number that says something about quality."""
    last: dict[str, float] = {}
    for entry in history:
        for key in ("eval_loss", "eval_kl", "eval_agreement"):
            if isinstance(entry.get(key), int | float):
                last[key] = entry[key]
    return last


def _licence_duties(teacher: Mapping[str, Any]) -> str | None:
    names = [str(teacher[key]).lower().replace("-", "") for key in ("license", "license_name") if teacher[key]]
    return next(
        (text for start, text in LICENCE_DUTIES.items() if any(name.startswith(start) for name in names)), None
    )


def _stage_versions(run: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The versions that each stage recorded, in the order of the stages."""
    documents = {"pruning": "pruning_plan", "distillation": "distillation", "evaluation": "evaluation"}
    found = {stage: (run[document] or {}).get("versions") for stage, document in documents.items()}
    return {stage: versions for stage, versions in found.items() if versions}


def _versions(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stages, versions): the stages that ran with the same versions stand together."""
    stages: dict[str, list[str]] = {}
    for stage, versions in _stage_versions(run).items():
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        stages.setdefault(text, []).append(stage)
    return [(", ".join(names), text) for text, names in stages.items()]


def _digests(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan = run["pruning_plan"] or {}
    scores = plan.get("scores") or {}
    evaluation = (run["evaluation"] or {}).get("data") or {}
    known = (
        ("Teacher weights", (plan.get("teacher") or {}).get("digest")),
        ("Importance scores", scores.get("digest")),
        ("Calibration data", scores.get("data_digest")),
        ("Evaluation data", evaluation.get("digest")),
    )
    return [(name, value) for name, value in known if value]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name is one of those that shell patterns describe."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


#: Filters of the template.
FILTERS: dict[str, Callable[..., str]] = {
    "count": md.count,
    "short_count": md.short_count,
    "ranges": md.ranges,
    "table": md.table,
    "code": md.code,
    "fence": md.fence,
    "cell": md.cell,
    "json": md.json_text,
    "model_title": _model_title,
}
