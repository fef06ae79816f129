"""Reads the files of a run folder, and computes what the model card and the report show."""

from __future__ import annotations

import fnmatch
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.context import short_rows_note, stored_context_length
from ..errors import OutputError
from ..files import read_json
from ..formats import read_artefact
from ..names import is_repo_id
from ..saving import least_transformers
from .benchmark_tables import _benchmark_table, _benchmarked
from .card_metadata import dataset_name, is_number, metadata
from .card_tables import (
    _architecture_table,
    _chat_table,
    _corpus_table,
    _cost_table,
    _depth_table,
    _model_title,
    _position_table,
    _round_table,
    _search_table,
    _written_by_teacher,
    draft_table,
    measurement_table,
    speed_table,
)
from .how_to_load import how_to_load
from .licences import duties_of, name_problem
from .plots import PLOTS

#: Legal texts that go with the teacher's weights, as patterns of file names.
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
#: Names under which an owner adds a legal text; the names of the teacher's legal texts are in `teacher.json`.
_LEGAL_NAMES = {
    f"{stem}{end}" for stem in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY") for end in ("", ".md", ".txt")
}


#: How a local teacher was made from a model of the Hub, by the relation that its card names.
BASE_RELATIONS = {
    "quantized": "quantised from",
    "finetune": "fine-tuned from",
    "merge": "merged from",
    "adapter": "with an adapter of",
}

#: The report beside the card.
REPORT_NAME = "report.html"

#: Files that only a run or its commands write.
_MADE_BY_A_RUN = ("pruning_plan", "distillation")


def round_folders(run_dir: Path) -> list[Path]:
    """Folders of the rounds before the last, in their order."""
    return sorted(
        (path for path in run_dir.glob("rounds/*") if path.name.isdecimal()), key=lambda path: int(path.name)
    )


def legal_files(run_dir: Path) -> list[str]:
    """Names of the legal texts of a run folder: copied from the teacher, or added under their usual names."""
    path = run_dir / "teacher.json"
    copied = (read_artefact(path).get("legal_files") if path.is_file() else None) or []
    names = _LEGAL_NAMES | {name for name in copied if matches(name, LEGAL_FILES) and name == os.path.basename(name)}
    return sorted(name for name in names if (run_dir / name).is_file())


def require_run(run_dir: Path) -> None:
    """Refuse a folder whose model was neither pruned nor distilled by this package.

    Raises:
        OutputError: naming the missing files.
    """
    if not any((run_dir / f"{name}.json").is_file() for name in _MADE_BY_A_RUN):
        raise OutputError(
            f"{run_dir} holds a model that was neither pruned nor distilled here: it has no "
            f"{' and no '.join(f'{name}.json' for name in _MADE_BY_A_RUN)}. Give the folder that the run wrote."
        )


def read_run(run_dir: Path) -> dict[str, Any]:
    """The files that the card is made from: JSON documents (None if missing), names of plots and legal texts."""
    measured = ("distillation", "evaluation", "samples", "benchmarks", "search", "costs")
    paths = {name: run_dir / f"{name}.json" for name in ("config", "pruning_plan", "teacher", "hub", *measured)}
    run: dict[str, Any] = {
        name: None if not path.is_file() else read_json(path) if name == "config" else read_artefact(path)
        for name, path in paths.items()
    }
    if run["config"] is None and run["pruning_plan"] is None:
        raise OutputError(
            f"{run_dir} holds neither config.json nor pruning_plan.json: there is no student to describe. "
            "Give the folder that the run wrote."
        )
    require_run(run_dir)
    run["samples"] = (run["samples"] or {}).get("samples")
    run["average"] = (run["benchmarks"] or {}).get("average")
    run["local_documents"] = bool((run["benchmarks"] or {}).get("local_documents"))
    run["benchmarks"] = (run["benchmarks"] or {}).get("models")
    recipe = run_dir / "recipe.yaml"
    run["rounds"] = [
        {name: read_artefact(folder / f"{name}.json") for name in ("pruning_plan", "distillation")}
        for folder in round_folders(run_dir)
    ]
    run["recipe"] = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    run["plots"] = [name for name in PLOTS if (run_dir / "plots" / name).is_file()]
    run["legal_files"] = legal_files(run_dir)
    run["loading"] = how_to_load(run_dir)
    run["report"] = (run_dir / REPORT_NAME).is_file()
    return run


def card_values(run: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the template."""
    distillation, evaluation = run["distillation"], run["evaluation"]
    last, rounds = run["pruning_plan"], _round_table(run)
    run = {**run, "pruning_plan": _combined_plan(run)}
    plan = run["pruning_plan"]
    teacher = _teacher(run)
    repo_id = (run["hub"] or {}).get("repo_id")
    title = repo_id.split("/")[-1] if repo_id else _title(teacher)
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
        "costs": _cost_table(run["costs"]) if run["costs"] else None,
        "costs_machine": ((run["costs"] or {}).get("estimate") or {}).get("machine"),
        "search": _search_table((run["search"] or plan or {}).get("candidates") or []),
        "depth": _depth_table(last) if last else None,
        "measurements": measurement_table(evaluation) if evaluation else None,
        "chat": _chat_table(evaluation) if evaluation else None,
        "speeds": speed_table(evaluation) if evaluation else None,
        "drafts": draft_table(evaluation) if evaluation else None,
        "positions": _position_table(evaluation) if evaluation else None,
        "short_rows": _short_rows(run),
        "corpus": _corpus_table(distillation),
        "written": _written_by_teacher(distillation),
        "speed_measured": any(model.get("decode_tokens_per_second") for model in models.values()),
        "not_timed": [_model_title(name) for name, one in models.items() if not one.get("decode_tokens_per_second")],
        "computed_in": _computed_in(evaluation) if evaluation else None,
        # Over fewer tokens than the teacher's own, a difference of losses says nothing about the student.
        "loss_gap": _loss_gap(evaluation) if evaluation and not (plan or {}).get("vocabulary") else None,
        "benchmarks": _benchmark_table(run["benchmarks"], run["average"]) if run["benchmarks"] else None,
        "average": run["average"],
        "benchmarked": _benchmarked(run["benchmarks"] or {}, run["average"] or {}, run["local_documents"]),
        "arguments": _arguments(distillation) if distillation else None,
        "quantized": ((run["hub"] or {}).get("quantized") or {}),
        "training": _training(distillation["arguments"]) if distillation else [],
        "final_evaluation": _last_evaluation(distillation["log_history"]) if distillation else {},
        "samples": run["samples"],
        "recipe": run["recipe"],
        "figures": _figures(run),
        "report": run["report"],
        "legal_files": run["legal_files"],
        "duties": (duties := duties_of(teacher)) and duties.text,
        "evaluation_data": dataset_name(evaluation["data"]) if evaluation else None,
        "loading": run["loading"],
        "least_transformers": least_transformers(run["config"]) if run["config"] else None,
        "library_version": next((v["minitron_hf"] for v in _stage_versions(run).values() if "minitron_hf" in v), None),
        "versions": _versions(run),
        "digests": _digests(run),
    }


def _computed_in(evaluation: Mapping[str, Any]) -> str:
    """The dtype that quality was computed in; of several, the commonest and who had another."""
    dtypes = (evaluation.get("settings") or {}).get("dtypes") or {}
    if evaluation["dtype"] != "mixed" or not dtypes:
        return str(evaluation["dtype"])
    commonest = statistics.mode(dtypes.values())
    others = [f"{_model_title(name)} in {dtype}" for name, dtype in dtypes.items() if dtype != commonest]
    return f"{commonest} ({', '.join(others)})"


def _figures(run: Mapping[str, Any]) -> dict[str, str | None]:
    """Description of every figure that was drawn; None of the others."""
    compared = run["pruning_plan"] and _depth_table(run["pruning_plan"])
    metric = "Depth metric of the model without" if compared else "Block importance of"
    models = (run["evaluation"] or {}).get("models") or {}
    loads = (
        ", and decoding speed by the number of prompts" if any(one.get("speeds") for one in models.values()) else ""
    )
    described = {
        "training.png": "Loss, agreement with the teacher and learning rate during distillation",
        "importance.png": "Importance of the units of every width axis, sorted, with the cut marked",
        "layers.png": f"{metric} single layers and of contiguous blocks of layers",
        "search.png": "KL to the teacher of the compared shapes, against parameters and against time per token",
        "speed.png": f"Loss against the time to decode a token{loads}",
    }
    return {name: described[name] if name in run["plots"] else None for name in PLOTS}


def _title(teacher: Mapping[str, Any]) -> str:
    """The name of a model that has no repository yet; it begins as the teacher's licence asks."""
    name, duties = f"{teacher['label'] or 'student'}-minitron", duties_of(teacher)
    return f"{duties.name_start}-{name}" if duties and name_problem(name, teacher) else name


def _short_rows(run: Mapping[str, Any]) -> str | None:
    """A warning where the training rows were far shorter than the context that the student claims."""
    trained = [one["distillation"] for one in (*run["rounds"], run) if one["distillation"]]
    lengths = [_longest_row(one) for one in trained]
    known = [length for length in lengths if length is not None]
    if not known or len(known) < len(lengths) or not run["config"]:
        return None
    return short_rows_note(max(known), stored_context_length(run["config"]))


def _longest_row(distillation: Mapping[str, Any]) -> int | None:
    """Tokens of the longest training row: `max_length`, or less where all documents are shorter."""
    data = (distillation.get("data") or {}).get("train") or {}
    found = (distillation["arguments"].get("max_length"), data.get("longest_row"))
    return min((length for length in found if length is not None), default=None)


#: Training arguments in the text of the card: name → words.
_METHOD = {
    "divergence": "divergence",
    "temperature": "temperature",
    "kd_weight": "weight of the teacher's logits",
    "ce_weight": "weight of cross-entropy",
    "optim": "optimiser",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "per_device_train_batch_size": "rows per device and step",
    "gradient_accumulation_steps": "accumulated steps",
    "max_length": "tokens of context",
    "seed": "seed",
}


def _training(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments that say how the student was trained, in words."""
    return [(words, arguments[name]) for name, words in _METHOD.items() if arguments.get(name) is not None]


def _arguments(distillation: Mapping[str, Any]) -> list[list[Any]]:
    """The arguments in force: `max_steps` overrules `num_train_epochs`, unless it is -1."""
    arguments = {name: value for name, value in distillation["arguments"].items() if value is not None}
    overruled = "num_train_epochs" if (arguments.get("max_steps") or 0) > 0 else "max_steps"
    return [[name, value] for name, value in arguments.items() if name != overruled]


def _teacher(run: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `teacher.json`, or else the name in the plan; with a label, and the Hub id if there is one."""
    known = run["teacher"] or {}
    plan = run["pruning_plan"] or {}
    name = known.get("name_or_path") or (plan.get("teacher") or {}).get("name_or_path")
    if "hub_id" in known:
        hub_id = known["hub_id"]
    else:  # not recorded: only an `owner/name` is taken for a Hub id
        hub_id = name if name and name.count("/") == 1 and is_repo_id(name) else None
    fields = ("license", "license_name", "license_link", "language", "datasets", "base_model")
    label = re.split(r"[\\/]", name.rstrip("\\/"))[-1] if name else None
    return {
        **{field: known.get(field) for field in fields},
        "hub_id": hub_id,
        "base_relation": BASE_RELATIONS.get(str(known.get("base_model_relation")), "made from"),
        "revision": known.get("revision") or (plan.get("teacher") or {}).get("revision"),
        "label": label,
    }


def _combined_plan(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan. Of several rounds, one plan from the first teacher to the last student."""
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
    """Settings of the scores, without the teacher and without unset values."""
    settings = (plan.get("scores") or {}).get("settings") or {}
    return [
        (key.replace("_", " "), value)
        for key, value in settings.items()
        if key not in ("model", "metric") and isinstance(value, str | int | float)
    ]


def _loss_gap(evaluation: Mapping[str, Any]) -> float | None:
    """Loss of the student minus loss of its reference, in nats per token; None if either was not measured."""
    models = evaluation["models"]
    losses = []
    for name in ("student", evaluation.get("reference")):
        measured = ((models.get(name) or {}).get("metrics") or {}).get("loss")
        if not measured or not is_number(measured["value"]):
            return None
        losses.append(measured["value"])
    return losses[0] - losses[1]


def _last_evaluation(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last logged value of every quality metric of the evaluations."""
    last: dict[str, float] = {}
    for entry in history:
        for key in ("eval_loss", "eval_kl", "eval_agreement"):
            if isinstance(entry.get(key), int | float):
                last[key] = entry[key]
    return last


def _stage_versions(run: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The versions that each stage recorded, in the order of the stages."""
    documents = {"pruning": "pruning_plan", "distillation": "distillation", "evaluation": "evaluation"}
    found = {stage: (run[document] or {}).get("versions") for stage, document in documents.items()}
    return {stage: versions for stage, versions in found.items() if versions}


def _versions(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stages, versions) for each set of versions."""
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
    """Whether a file name matches one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
