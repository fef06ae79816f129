"""The model card and the Hub: what a run folder says about itself, and how it is published.

A run folder is laid out like the repository that it becomes. `render_model_card` reads nothing but its files, so the
card of a published student can be rendered again from its repository, byte for byte.

Scores of registered benchmarks may also be published as `.eval_results/*.yaml`. Those files need the id of a
registered benchmark dataset, which `benchmarks.json` does not carry, and perplexity, KL or speed are no registered
benchmarks; so nothing is written there and all results stand in the card and its model-index.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import read_json, replacing_file, write_json, write_text
from .errors import HubError, MismatchError, OutputError
from .plots import PLOTS, write_plots

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, EvalResult

logger = logging.getLogger(__name__)

#: Legal texts that go with the teacher's weights.
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

#: What a push uploads, as patterns of paths in the run folder. Everything else is a working file and stays at home.
UPLOADED = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "recipe.yaml",
    "README.md",
    *LEGAL_FILES,
    "plots/*.png",
    "additional_chat_templates/*.jinja",
)
#: Exceptions to `UPLOADED`: state of a training run.
NEVER_UPLOADED = ("trainer_state.json", "optimizer*", "scheduler*", "*.tmp", ".*")

#: Files that a push owns in the repository: one that an earlier push left and this one has not is deleted, in the same
#: commit. A stale shard would be loaded, and a stale artefact would change the card when it is rendered again.
OWNED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pruning_plan.json",
    "pruning_plan.safetensors",
    "pruner_config.json",
    "scores.safetensors",
    "teacher.json",
    "distillation.json",
    "evaluation.json",
    "benchmarks.json",
    "samples.json",
    "recipe.yaml",
    "hub.json",
    *(f"plots/{name}" for name in PLOTS),
)

#: Any one of these is a tokenizer that Transformers can load.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")

#: What licences ask of a derived model beyond passing them on: start of the licence id or name → sentence.
LICENCE_DUTIES = {
    "llama3": "Built with Llama. This licence asks that the name of a derived model begins with “Llama”.",
    "llama4": "Built with Llama. This licence asks that the name of a derived model begins with “Llama”.",
    "gemma": "The Gemma terms ask that modified files say so (this card does) and that the terms and their use "
    "restrictions are passed on to everyone who gets the model.",
}

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

#: Quality metrics of `evaluation.json`: key → (row title, title in the model-index, factor for display, unit).
METRICS: dict[str, tuple[str, str, float, str]] = {
    "loss": ("Loss, nats per token", "Cross-entropy (nats per token)", 1.0, ""),
    "perplexity": ("Perplexity, per token", "Perplexity", 1.0, ""),
    "bits_per_byte": ("Bits per byte", "Bits per byte", 1.0, ""),
    "kl_divergence": (
        "KL(teacher ‖ model), nats per token",
        "KL divergence from the teacher (nats per token)",
        1.0,
        "",
    ),
    "top1_agreement": ("Top-1 agreement with the teacher", "Top-1 agreement with the teacher", 100.0, " %"),
}

#: Ids that the Hub accepts for a dataset in a model-index.
_DATASET_ID = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)

_NO_TOKEN = (
    "Log in with `hf auth login`, or set HF_TOKEN or pass token= with a token that has write access "
    "(https://huggingface.co/settings/tokens)."
)
_REPEAT = "No commit was made; push again: what was already uploaded is not sent twice."


# ---------------------------------------------------------------------------------------------------------------------
# What is known of the teacher
# ---------------------------------------------------------------------------------------------------------------------


def write_teacher_metadata(
    run_dir: str | os.PathLike[str],
    teacher_name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Write `teacher.json` from the metadata of the teacher's card, and copy its licence files.

    What the card does not say is null: nothing is guessed. `hub_id` is null for a local folder, whose name means
    nothing to readers of the student's card.

    Args:
        run_dir: the run folder.
        teacher_name_or_path: a local folder or a Hub id.
        revision: Hub revision; the commit it stands for is recorded.
        token: Hub token, for private or gated teachers.

    Returns:
        The path of `teacher.json`.

    Raises:
        HubError: if the name is neither a folder nor a model that can be found on the Hub.
        OutputError: if the run folder cannot be written.
    """
    from huggingface_hub import metadata_load

    run_dir = Path(run_dir)
    folder = Path(teacher_name_or_path).expanduser()
    if folder.is_dir():
        hub_id, files = None, {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        # A path would tell the world about this machine, and nothing about the teacher.
        name = folder.resolve().name
    else:
        hub_id = name = str(teacher_name_or_path)
        revision, files = _fetch_card(hub_id, revision, token)

    try:
        data = metadata_load(files["README.md"]) if "README.md" in files else None
    except (ValueError, OSError) as error:  # yaml.YAMLError is no ValueError
        logger.warning("The card of %s cannot be read (%s); its licence is recorded as unknown.", name, error)
        data = None
    except Exception as error:
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        logger.warning("The metadata of %s is not valid YAML (%s); its licence is recorded as unknown.", name, error)
        data = None
    data = data or {}
    teacher = {
        "name_or_path": name,
        "hub_id": hub_id,
        "revision": revision,
        "license": _text_or_none(data.get("license")),
        "license_name": _text_or_none(data.get("license_name")),
        "license_link": _text_or_none(data.get("license_link")),
        "language": _strings(data.get("language")),
        "datasets": _strings(data.get("datasets")),
        "tags": _strings(data.get("tags")),
    }
    for file, source in files.items():
        if _matches(file, LEGAL_FILES):
            with replacing_file(run_dir / file) as temporary:
                shutil.copyfile(source, temporary)
    path = run_dir / "teacher.json"
    write_json(path, teacher)
    return path


def _fetch_card(repo_id: str, revision: str | None, token: str | None) -> tuple[str | None, dict[str, Path]]:
    """Commit of a Hub model, and its card and licence files in the local cache."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    if constants.is_offline_mode():
        cached = try_to_load_from_cache(repo_id, "README.md", revision=revision)
        if not isinstance(cached, str):
            logger.warning(
                "The Hub is switched off (HF_HUB_OFFLINE) and the card of %s is not in the cache: "
                "its licence is recorded as unknown.",
                repo_id,
            )
            return revision, {}
        snapshot = Path(cached).parent
        return snapshot.name, {path.name: path for path in sorted(snapshot.iterdir()) if path.is_file()}
    with _hub_errors(f"Cannot read the card of the teacher {repo_id}", repeat=""):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        wanted = [name for name in names if name == "README.md" or ("/" not in name and _matches(name, LEGAL_FILES))]
        files = {name: Path(hf_hub_download(repo_id, name, revision=info.sha, token=token)) for name in wanted}
    return info.sha, files


def _strings(value: Any) -> list[str] | None:
    """A list of strings from what a card's YAML holds in a field that takes one value or several.

    YAML reads the language code `no` as False.

    >>> _strings(["en", False]), _strings("en"), _strings(None)
    (['en', 'no'], ['en'], None)
    """
    if value is None or value == []:
        return None
    values = value if isinstance(value, list) else [value]
    return ["no" if item is False else str(item) for item in values if item is not None]


def _text_or_none(value: Any) -> str | None:
    """One string; a list of several licences is joined by nothing that the Hub knows, so its first stands for it."""
    values = _strings(value)
    return values[0] if values and len(values) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


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
    documents = ("config", "pruning_plan", "teacher", "distillation", "evaluation", "benchmarks", "hub")
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
    run["recipe"] = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    run["plots"] = [name for name in PLOTS if (run_dir / "plots" / name).is_file()]
    run["legal_files"] = sorted(path.name for path in run_dir.glob("*") if _matches(path.name, LEGAL_FILES))
    return run


def _card_values(run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    plan, distillation, evaluation = run["pruning_plan"], run["distillation"], run["evaluation"]
    teacher = _teacher(run)
    repo_id = (run["hub"] or {}).get("repo_id")
    title = repo_id.split("/")[-1] if repo_id else f"{teacher['label'] or 'student'}-minitron"
    models = evaluation["models"] if evaluation else {}
    return {
        "metadata": _metadata(run, teacher, title),
        "title": title,
        "repo_id": repo_id,
        "teacher": teacher,
        "plan": plan,
        "distillation": distillation,
        "evaluation": evaluation,
        "models": models,
        "calibration": _calibration(plan) if plan else None,
        "architecture": _architecture_table(plan) if plan else None,
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
        "evaluation_data": _dataset_name(evaluation["data"]) if evaluation else None,
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
        hub_id = name if name and name.count("/") == 1 and _is_repo_id(name) else None
    fields = ("license", "license_name", "license_link", "language", "datasets")
    label = re.split(r"[\\/]", name.rstrip("\\/"))[-1] if name else None
    return {
        **{field: known.get(field) for field in fields},
        "hub_id": hub_id,
        "revision": known.get("revision") or (plan.get("teacher") or {}).get("revision"),
        "label": label,
        "link": f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else _code(label) if label else "a teacher",
    }


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _metadata(run: Mapping[str, Any], teacher: Mapping[str, Any], title: str) -> str:
    """The YAML block, without its `---` lines."""
    from huggingface_hub import ModelCardData

    distillation = run["distillation"]
    datasets = [*(teacher["datasets"] or [])]
    trained_on = ((distillation or {}).get("data") or {}).get("train") or {}
    # `datasets` names local files after their builder ("json"): only an `owner/name` is a dataset of the Hub.
    name = trained_on.get("name")
    if name and "/" in name and _is_repo_id(name):
        datasets.insert(0, name)
    tags = ["minitron"]
    tags += ["pruned"] if run["pruning_plan"] else []
    tags += ["knowledge-distillation"] if distillation else []
    results = _eval_results(run)
    data = ModelCardData(
        language=teacher["language"] or None,
        license=teacher["license"],
        license_name=teacher["license_name"],
        license_link=teacher["license_link"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=list(dict.fromkeys(datasets)) or None,
        base_model=teacher["hub_id"],
        metrics=sorted({"perplexity"} & {result.metric_type for result in results}) or None,
        model_name=title if results else None,
        eval_results=results or None,
        # The Hub knows finetune, adapter, quantized and merge; a student is a finetune of its teacher.
        base_model_relation="finetune" if teacher["hub_id"] else None,
    )
    return data.to_yaml(line_break="\n")


def _eval_results(run: Mapping[str, Any]) -> list[EvalResult]:
    """Results of the student for the model-index; a value that is not finite has no place in it."""
    from huggingface_hub import EvalResult

    results = []
    evaluation = run["evaluation"]
    if evaluation and "student" in evaluation["models"]:
        data = evaluation["data"]
        metrics = evaluation["models"]["student"]["metrics"]
        for key, (_, title, _, _) in METRICS.items():
            measured = metrics.get(key)
            if measured and math.isfinite(measured["value"]):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Text Generation",
                        dataset_type=_dataset_type(data.get("name")),
                        dataset_name=_dataset_name(data),
                        dataset_args={"digest": data["digest"], "num_tokens": data["num_tokens"]},
                        metric_type=key,
                        metric_name=title,
                        metric_value=_significant(measured["value"]),
                    )
                )
    for model, task, metric, measured in _benchmark_values(run["benchmarks"] or {}):
        if model == "student" and math.isfinite(measured["value"]):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    dataset_type=_dataset_type(task),
                    dataset_name=task,
                    metric_type=metric,
                    metric_name=metric,
                    metric_value=_significant(measured["value"]),
                )
            )
    return results


def _dataset_type(name: str | None) -> str:
    """Id of a dataset in a model-index; what is no id on the Hub becomes a word that is legal there.

    >>> _dataset_type("roneneldan/TinyStories"), _dataset_type("/data/my stories.jsonl"), _dataset_type(None)
    ('roneneldan/TinyStories', 'my-stories.jsonl', 'text')
    """
    if not name:
        return "text"
    if _DATASET_ID.fullmatch(name):
        return name
    return re.sub(r"[^\w.-]+", "-", re.split(r"[\\/]", name)[-1], flags=re.ASCII).strip("-") or "text"


def _dataset_name(data: Mapping[str, Any]) -> str:
    name = data.get("name")
    if not name:
        return f"held-out text {_short(data['digest'])}"
    return name if _DATASET_ID.fullmatch(name) else re.split(r"[\\/]", name)[-1]


def _significant(value: float) -> float:
    """Six significant digits: more are noise, and less would not tell close models apart."""
    return float(f"{value:.6g}")


def _calibration(plan: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings of the scores, without the teacher (it has its own place) and what was left at nothing."""
    settings = (plan.get("scores") or {}).get("settings") or {}
    return [
        (key.replace("_", " "), value)
        for key, value in settings.items()
        if key not in ("model", "metric") and isinstance(value, str | int | float)
    ]


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
        return _count(low) if low == high else f"{_count(low)}–{_count(high)}"
    return _count(value)


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
        add(title, [_measured(models[name]["metrics"].get(key), factor, unit) for name in names])
    for title, key, shown in (
        ("Parameters", "num_parameters", _count),
        ("Parameters without embeddings", "num_parameters_without_embeddings", _count),
        ("Checkpoint size", "checkpoint_bytes", _bytes),
        ("KV cache per token", "kv_cache_bytes_per_token", _bytes),
    ):
        add(title, [_with_ratio(models[name].get(key), reference.get(key), shown) for name in names])
    for title, key in (
        ("Prefill, tokens/s", "prefill_tokens_per_second"),
        ("Decode, tokens/s", "decode_tokens_per_second"),
    ):
        medians = [(models[name].get(key) or {}).get("median") for name in names]
        base = (reference.get(key) or {}).get("median")
        add(title, [_with_ratio(median, base, _rate) for median in medians])
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


def _benchmark_values(benchmarks: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(model, task, metric, {"value", "stderr"}) of `benchmarks.json`.

    The file is `{model: {task: {metric: …}}}`, or `{task: {metric: …}}` for the student alone.
    """
    flat = any("value" in measured for metrics in benchmarks.values() for measured in metrics.values())
    for model, tasks in ({"student": benchmarks} if flat else benchmarks).items():
        for task, metrics in tasks.items():
            for metric, measured in metrics.items():
                # lm-evaluation-harness names the filter after a comma, also where there is none.
                yield model, task, metric.removesuffix(",none"), measured


def _benchmark_table(benchmarks: Mapping[str, Any]) -> list[list[str]]:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for model, task, metric, measured in _benchmark_values(benchmarks):
        cells.setdefault((task, metric), {})[model] = _measured(measured)
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


# Numbers and text in Markdown ----------------------------------------------------------------------------------------


def _count(value: int) -> str:
    return f"{value:,}"


def _short_count(value: float) -> str:
    """Three significant digits.

    >>> _short_count(8_030_261_248), _short_count(869_504), _short_count(512)
    ('8.03B', '870k', '512')
    """
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    """Binary units.

    >>> _bytes(1536), _bytes(2_003_456), _bytes(12)
    ('1.50 KiB', '1.91 MiB', '12 B')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.2f} {unit}"
    return f"{value} B"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _measured(result: Mapping[str, Any] | None, factor: float = 1.0, unit: str = "") -> str:
    """A value with its standard error, both to two digits of the error.

    >>> _measured({"value": 15.642631, "stderr": 0.1924}), _measured({"value": 0.7, "stderr": 0.0042}, 100, " %")
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


def _ranges(indices: Iterable[int]) -> str:
    """Sorted indices with runs joined.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _short(value: str) -> str:
    """The start of a digest, enough to recognise it."""
    return value.split(":")[-1][:12]


def _cell(value: Any) -> str:
    """Text that cannot break out of a table cell."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").strip()


def _table(rows: list[list[Any]]) -> str:
    """A Markdown table from rows of cells, the first row being the header; the first column is left-aligned."""
    header, *body = [[_cell(cell) for cell in row] for row in rows]
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *body))


def _code(text: Any) -> str:
    """Inline code that holds any one-line text."""
    text = _cell(text)
    ticks = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fence(text: Any, language: str = "") -> str:
    """A code block that no text can end."""
    text = str(text).replace("\r\n", "\n").rstrip("\n")
    ticks = "`" * max(3, max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


#: Filters of the template.
FILTERS: dict[str, Callable[..., str]] = {
    "count": _count,
    "short_count": _short_count,
    "ranges": _ranges,
    "table": _table,
    "code": _code,
    "fence": _fence,
    "cell": _cell,
    "json": _json,
    "model_title": _model_title,
}


# ---------------------------------------------------------------------------------------------------------------------
# Publishing
# ---------------------------------------------------------------------------------------------------------------------


def push_student_to_hub(
    run_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a run folder in one commit: weights, tokenizer, plan, scores, plots, evaluation, recipe and card.

    The card is rendered again first, and its metadata is checked by the Hub before anything is uploaded. An
    interrupted push can be repeated: what was uploaded is not sent twice, and when the repository already holds
    exactly these files no commit is made.

    Args:
        run_dir: the run folder. `hub.json` (the repository's name) and `README.md` are written into it.
        repo_id: `owner/name`, or `name` for the owner of the token.
        private: whether a new repository is private. The visibility of an existing one is never changed.
        token: Hub token; default: the one that `hf auth login` stored, or HF_TOKEN.
        commit_message: first line of the commit.
        revision: branch to push to; created if it does not exist.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The commit.

    Raises:
        OutputError: if the folder holds no complete student, or cannot be written.
        HubError: if there is no token, the Hub refuses it or the metadata, or the connection breaks.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token

    run_dir = Path(run_dir)
    _require_student(run_dir)
    what = f"Cannot push to {repo_id}"
    if not _is_repo_id(repo_id):
        raise HubError(f"{what}: expected `owner/name` (letters, digits, '-', '_' and '.'), got {repo_id!r}.")
    with _hub_errors(what):
        token = token or get_token()
        if not token:
            raise HubError(f"{what}: there is no access token. {_NO_TOKEN}")
        api = HfApi(token=token, library_name="minitron-hf")
        if "/" not in repo_id:
            repo_id = f"{api.whoami(cache=True)['name']}/{repo_id}"

    _require_teacher_metadata(run_dir, token)
    write_json(run_dir / "hub.json", {"repo_id": repo_id})
    content = write_model_card(run_dir).read_text(encoding="utf-8")
    files = uploaded_files(run_dir)

    with _hub_errors(what):
        ModelCard(content).validate(repo_type="model")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and revision != "main" and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        if private and info.private is False:
            logger.warning("%s already exists and is public: it stays public.", repo_id)
        present = [sibling.rfilename for sibling in info.siblings or []]
        stale = [name for name in present if name not in files and _matches(name, OWNED)]
        # One list of operations is one commit, also with Xet storage, where upload_folder may make several.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message=commit_message or "Upload student, plan, measurements and card",
            revision=revision,
            create_pr=create_pr,
        )


def _require_teacher_metadata(run_dir: Path, token: str) -> None:
    """Look up the teacher's licence if the run did not; a student is not published without having asked."""
    if (run_dir / "teacher.json").is_file() or not (run_dir / "pruning_plan.json").is_file():
        return
    teacher = read_json(run_dir / "pruning_plan.json").get("teacher") or {}
    name = teacher.get("name_or_path")
    try:
        if not name or not (Path(name).is_dir() or _is_repo_id(name)):
            raise HubError(f"The teacher is recorded as {name!r}, which is neither a folder here nor a Hub id.")
        write_teacher_metadata(run_dir, name, revision=teacher.get("revision"), token=token)
    except HubError as error:
        logger.warning("%s The card will name no licence; write teacher.json to name one.", error)


def uploaded_files(run_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Files of a run folder that a push uploads: path in the repository → local path, sorted."""
    run_dir = Path(run_dir)
    found = {}
    for pattern in UPLOADED:
        for path in run_dir.glob(pattern):
            if path.is_file() and not _matches(path.name, NEVER_UPLOADED):
                found[path.relative_to(run_dir).as_posix()] = path
    return dict(sorted(found.items()))


def _require_student(run_dir: Path) -> None:
    """Refuse a folder without a student that stock Transformers can load, before anything is asked of the Hub."""
    from safetensors import SafetensorError, safe_open

    if not run_dir.is_dir():
        raise OutputError(f"{run_dir} does not exist. Give the folder of a finished run.")
    if not (run_dir / "config.json").is_file():
        raise OutputError(f"{run_dir} holds no config.json, so no student. Give the folder of a finished run.")
    index = run_dir / "model.safetensors.index.json"
    single = run_dir / "model.safetensors"
    if single.is_file() or not index.is_file():
        weights = [single]
    else:
        weights = [run_dir / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    for path in weights:
        if not path.is_file():
            raise OutputError(f"{run_dir} holds no {path.name}: its student is not complete. Finish the run first.")
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{path} is damaged ({error}). Run the stage that writes it again.") from error
    if not any(any(run_dir.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise OutputError(
            f"{run_dir} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Save the teacher's there: "
            "AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)."
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def _hub_errors(what: str, repeat: str = _REPEAT) -> Iterator[None]:
    """Turn what the Hub client raises into a `HubError` that says what to do; everything else passes."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # The client's transport errors (refused or broken connections, time-outs) share the first base of its HTTP errors,
    # whose module depends on the version of huggingface_hub (httpx, httpx2).
    transport_error: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"{what}: there is no access token. {_NO_TOKEN}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: the Hub is switched off. Unset HF_HUB_OFFLINE.") from error
    except (OSError, RuntimeError, ValueError, transport_error) as error:
        # Workers wrap the error of an upload: the reason is the first HTTP error down the chain, or else its end.
        reason: BaseException = error
        while not isinstance(reason, HfHubHTTPError) and reason.__cause__ is not None:
            reason = reason.__cause__
        if isinstance(reason, HfHubHTTPError):
            raise HubError(f"{what}: {_http_advice(reason)}") from error
        if isinstance(error, ValueError):
            raise HubError(f"{what}: {error}") from error
        text = f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__
        raise HubError(f"{what}: the connection failed ({text}). {repeat}".rstrip()) from error


def _http_advice(error: Any) -> str:
    """What a refusal of the Hub means for the user; `error` is an `HfHubHTTPError`."""
    status = error.response.status_code
    said = f" The Hub says: {error.server_message}" if error.server_message else ""
    if status == 401:
        return f"the Hub does not accept the access token (401).{said} {_NO_TOKEN}"
    if status == 403:
        return f"the access token may not do this (403).{said} Use a token with write access to this owner."
    if status == 404:
        return f"not found, or private and not visible with this token (404).{said} Check the name and the revision."
    return f"the Hub answered {status}.{said or ' ' + str(error)}"
