"""The model card: what a run folder says about itself.

`render_model_card` reads nothing but the files of the folder, so the card of a published student can be rendered again
from its repository, byte for byte.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MismatchError, OutputError
from ..files import read_json, write_text
from . import markdown as md
from .card_metadata import METRICS, benchmark_values, dataset_name, is_repo_id, metadata
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

#: What is shown of every round of several.
ROUND_METRICS = ("loss", "kl_divergence", "top1_agreement")

#: Titles of the axes in tables; an axis that is not named here stands under its own name.
AXIS_TITLES = {
    "layers": "Layers",
    "hidden": "Hidden size",
    "ffn": "MLP width",
    "heads": "Attention heads",
    "kv": "Key-value heads",
    "head_dim": "Head dimension",
    "vocab": "Vocabulary",
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


def _round_table(run: Mapping[str, Any]) -> list[list[str]] | None:
    """What each of several rounds has cut, on how many tokens it was recovered, and what was measured then."""
    if not run["rounds"]:
        return None
    models = (run["evaluation"] or {}).get("models") or {}
    rounds = [*run["rounds"], {"pruning_plan": run["pruning_plan"], "distillation": run["distillation"] or {}}]
    rows = [["Round", "Cut", "Parameters", "Tokens", *(METRICS[key][0] for key in ROUND_METRICS)]]

    def measured(name: str) -> list[str]:
        found = (models.get(name) or {}).get("metrics") or {}
        return [md.measured(found.get(key), *METRICS[key][2:]) for key in ROUND_METRICS]

    first = rounds[0]["pruning_plan"]["teacher"]
    rows.append(["Teacher", "", md.count(first["num_parameters"]), "", *measured("teacher")])
    for number, one in enumerate(rounds, 1):
        plan = one["pruning_plan"]
        cut = [
            f"{AXIS_TITLES.get(axis, axis)} {_size(both['teacher'])} → {_size(both['student'])}"
            for axis, both in plan["sizes"].items()
            if both["student"] < both["teacher"]
        ]
        tokens = one["distillation"].get("num_input_tokens_seen")
        name = "student" if number == len(rounds) else f"round_{number}"
        parameters = md.count(plan["student"]["num_parameters"])
        rows.append([str(number), ", ".join(cut), parameters, md.count(tokens) if tokens else "–", *measured(name)])
    return rows


def _calibration(plan: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings of the scores, without the teacher (it has its own place) and what was left at nothing."""
    settings = (plan.get("scores") or {}).get("settings") or {}
    return [
        (key.replace("_", " "), value)
        for key, value in settings.items()
        if key not in ("model", "metric") and isinstance(value, str | int | float)
    ]


def _depth_table(plan: Mapping[str, Any], most: int = 12) -> list[list[str]] | None:
    """Layers that could have gone in the place of those that went, and what the model is worth without them."""
    scores = plan.get("scores") or {}
    gone = list(plan.get("layers_dropped") or [])
    rivals = [tried for tried in scores.get("layers") or [] if len(tried["dropped"]) == len(gone)]
    if not gone or not rivals:
        return None
    settings = scores["settings"]
    rows = [["none", f"{settings['depth_baseline']:.4g}"]]
    for tried in rivals[:most]:
        mark = "**" if sorted(tried["dropped"]) == gone else ""
        rows.append([f"{mark}{', '.join(map(str, tried['dropped']))}{mark}", f"{tried['score']:.4g}"])
    return [["layers dropped", str(settings["depth_metric"]).replace("_", " ")], *rows]


def _search_table(candidates: Sequence[Mapping[str, Any]], most: int = 12) -> list[list[str]] | None:
    """The shapes that were compared, best first."""
    if not candidates:
        return None
    retrained = any(one.get("rounds") for one in candidates)
    header = [
        "shape",
        "parameters",
        "KL, pruned",
        *(["KL, distilled", "tokens"] if retrained else []),
        "behind the best",
    ]
    rows = [header]
    for one in candidates[:most]:
        last = (one.get("rounds") or [None])[-1]
        distilled = [_uncertain(last["kl"], last["stderr"]), md.count(last["num_tokens"])] if last else ["–", "–"]
        rows.append(
            [
                one["name"],
                md.count(one["num_parameters"]),
                _uncertain(**one["proxy"]) if one["proxy"] else "–",
                *(distilled if retrained else []),
                # Before retraining it says little of one after, and next to others' it would be read so.
                _uncertain(**one["behind"]) if one["behind"] and (last or not retrained) else "–",
            ]
        )
    return rows


def _uncertain(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}"


def _architecture_table(plan: Mapping[str, Any]) -> list[list[str]]:
    teacher, student = plan["teacher"], plan["student"]

    def row(title: str, before: Any, after: Any) -> list[str]:
        ratio = (
            f"{100 * after / before:.1f} %" if isinstance(before, int) and isinstance(after, int) and before else ""
        )
        return [title, _size(before), _size(after), ratio]

    rows = [row(AXIS_TITLES.get(axis, axis), size["teacher"], size["student"]) for axis, size in plan["sizes"].items()]
    for axis, key in (("head_dim", "head_dim"), ("vocab", "vocab_size")):
        before, after = teacher["config"].get(key), student["config"].get(key)
        if axis not in plan["sizes"] and (before is not None or after is not None):
            rows.append(row(AXIS_TITLES[axis], before, after))
    for title, key in (
        ("Parameters", "num_parameters"),
        ("Parameters without embeddings", "num_parameters_without_embeddings"),
    ):
        rows.append(row(title, teacher[key], student[key]))
    return [["", "Teacher", "Student", "Kept"], *rows]


def _size(value: Any) -> str:
    """One size, or the sizes of all layers: `768`, `512–768`."""
    if value is None:
        return "–"
    if isinstance(value, list):
        low, high = min(value), max(value)
        return md.count(low) if low == high else f"{md.count(low)}–{md.count(high)}"
    return md.count(value)


def _measurement_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows of every number that at least one model has; the teacher's and the student's columns come first."""
    models = evaluation["models"]
    names = _model_order(models)
    reference = models.get(evaluation.get("reference")) or {}
    rows: list[list[str]] = [["", *map(_model_title, names)]]

    def add(title: str, cells: list[str]) -> None:
        if any(cell != "–" for cell in cells):
            rows.append([title, *cells])

    for key, (title, _, factor, unit) in METRICS.items():
        add(title, [md.measured(models[name]["metrics"].get(key), factor, unit) for name in names])
    for title, key, shown in (
        ("Parameters", "num_parameters", md.count),
        ("Parameters without embeddings", "num_parameters_without_embeddings", md.count),
        ("Checkpoint size", "checkpoint_bytes", md.binary_size),
        ("KV cache per token", "kv_cache_bytes_per_token", md.binary_size),
    ):
        add(title, [_with_ratio(models[name].get(key), reference.get(key), shown) for name in names])
    for title, key in (
        ("Prefill, tokens/s", "prefill_tokens_per_second"),
        ("Decode, tokens/s", "decode_tokens_per_second"),
    ):
        medians = [(models[name].get(key) or {}).get("median") for name in names]
        base = (reference.get(key) or {}).get("median")
        add(title, [_with_ratio(median, base, md.rate) for median in medians])
    return rows


def _with_ratio(value: float | None, reference: float | None, shown: Callable[[Any], str]) -> str:
    if value is None:
        return "–"
    ratio = f" ({value / reference:.2f}×)" if reference and value != reference else ""
    return shown(value) + ratio


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


def _benchmark_table(benchmarks: Mapping[str, Any]) -> list[list[str]]:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for model, task, metric, measured in benchmark_values(benchmarks):
        cells.setdefault((task, metric), {})[model] = md.measured(measured)
    names = _model_order({name for row in cells.values() for name in row})
    rows = [[task, metric, *(row.get(name, "–") for name in names)] for (task, metric), row in cells.items()]
    return [["Task", "Metric", *map(_model_title, names)], *rows]


def _model_order(names: Iterable[str]) -> list[str]:
    """The teacher and the student first, then the others as they come (a set: by name)."""
    names = sorted(names) if isinstance(names, set | frozenset) else list(names)
    return sorted(names, key=lambda name: {"teacher": 0, "student": 1}.get(name, 2))


def _model_title(name: str) -> str:
    """`random_init` → `Random init`."""
    return name.replace("_", " ").capitalize()


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
