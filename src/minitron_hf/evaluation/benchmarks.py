"""Benchmarks of several models beside a reference: paired differences, and finished tasks that are not run again."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..data.tokens import encoding_digest, text_tokenizer
from ..errors import DataError, UnsupportedModelError, checks_kinds
from ..files import digest, require_creatable
from ..formats import read_artefact, write_artefact
from ..models import load_tokenizer
from ..weights import model_digest
from .limits import checked_reference, require_positive
from .loading import common_device, load_for_inference
from .means import mean_and_error
from .paired import combined, mean_of_means, paired_difference, share_of
from .presets import main_metric, with_presets
from .task_results import TaskScores, harness_version
from .tasks import HarnessSettings, LoadedTask, TaskSource, run_task
from .token_spaces import own_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: File with the results of all models and tasks.
BENCHMARKS_NAME = "benchmarks.json"
#: Folder with one file for every model and task: its results on every document.
DOCUMENTS_DIR = "benchmarks"
#: Name of these files in `formats.FORMATS`.
DOCUMENTS_KIND = "benchmarks/*.json"


@checks_kinds
def measure_benchmarks(
    models: Mapping[str, PreTrainedModel | str | os.PathLike[str]],
    tasks: str | Sequence[str],
    *,
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    reference: str | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    task_data: str | os.PathLike[str] | None = None,
    apply_chat_template: bool = False,
    add_bos_token: bool | None = None,
    confirm_run_unsafe_code: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    output_path: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Score models on tasks of lm-evaluation-harness (the extra `eval`), each beside the reference.

    Long because all arguments are explained.

    Every value has its own standard error and, unless it is the reference's, the paired difference to the reference on
    the same documents (see `paired.paired_difference`). The paired error is the one that tells whether a student is
    worse: it leaves out what makes documents easy or hard for both models.

    With `output_path`, every finished task of a model is stored in a file of its own. A later call with the same
    weights, tokenizer, documents, prompts and settings reads that file, also after an interruption.

    Args:
        models: name → model, or the path or Hub id of one. Model objects keep their dtype and device.
        tasks: names of tasks or groups, paths of task files, or names of presets (`presets.PRESETS`).
        processing_class: tokenizer, or the path or Hub id of one; default the one beside the reference's weights. A
            student whose vocabulary was cut reads the same documents with a tokenizer of its own, which follows.
        reference: name of the model that the others are compared with; default `"teacher"` if there is one, else the
            first. A single model has no reference.
        limit: number of documents per task, or their fraction below 1, for a quick look.
        num_fewshot: number of worked examples in the prompts; None: the preset's or the task's own.
        batch_size: requests per forward pass.
        include_path: folders with further task files.
        task_data: folder with documents of stock tasks, `TASK.jsonl` and `TASK_fewshot.jsonl`, to read instead of the
            Hub.
        apply_chat_template: format the prompts with the tokenizer's chat template.
        add_bos_token: whether prompts start with the beginning-of-text token; None: the tokenizer decides.
        confirm_run_unsafe_code: run tasks that execute code which the models write. Use a container.
        dtype: dtype of models that are loaded here; by default the stored one, or float32 where the hardware is slow
            in that.
        device: device of models that are loaded here.
        output_path: folder for `benchmarks.json` and the files of finished tasks; None: nothing is stored.
        show_progress: show progress bars.

    Returns:
        The content of `benchmarks.json`.

        `models` is `{model: {task: {metric: {…}}}}` as from `evaluate_tasks`, with `difference` (`value`, `stderr`,
        and for accuracies `gained` and `lost`, the documents that only the model or only the reference has right).
        `average` has the mean of every model over the tasks, with `difference` and with `share`, the part of the
        reference's average that the model keeps. `documents` names the files of finished tasks. `reference`, `tasks`
        and `format` say what was compared.

    Raises:
        MismatchError: if the vocabulary of a student was cut, and the tokenizer of another model is not known.
        MissingDependencyError: without lm-evaluation-harness.
        DataError: if a task is unknown or cannot be loaded, executes code unasked, or there is no tokenizer.
        OutputError: if `output_path` cannot be written.
    """
    reference = checked_reference(models, reference)
    require_positive(batch_size=batch_size)
    wanted = with_presets([tasks] if isinstance(tasks, str) else tasks, num_fewshot)
    if not wanted:
        raise DataError("There are no tasks. Pass names of tasks or presets.")
    store = None if output_path is None else require_creatable(Path(output_path)) / DOCUMENTS_DIR
    settings = HarnessSettings(
        limit=limit,
        batch_size=batch_size,
        add_bos_token=add_bos_token,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        show_progress=show_progress,
        options={"apply_chat_template": True} if apply_chat_template else {},
    )
    opened = TaskSource.opened(
        list(wanted), include_path, task_data, confirm_run_unsafe_code, show_progress=show_progress
    )
    with opened as source:
        tokenizer = _tokenizer_of(processing_class, models, reference)
        if apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
            raise DataError("apply_chat_template: the tokenizer has no chat template. Leave it out.")
        device = common_device(models, device)
        loaded = {name: load_for_inference(model, dtype, device) for name, model in models.items()}
        tokenizers = own_tokenizers(models, tokenizer)
        names = sorted(loaded, key=lambda name: name != reference)  # comparisons are complete task by task
        runs = {name: _Run.of(name, loaded[name], tokenizers[name], settings, store) for name in names}
        found: dict[str, dict[str, _Stored]] = {}
        with tqdm(total=len(wanted) * len(names), desc="Benchmarks", unit="task", disable=not show_progress) as bar:
            for task, shots in wanted.items():
                one = source.load(task)
                identity = digest(one.identity(shots), shots)
                for name, run in runs.items():
                    bar.set_postfix_str(f"{name}, {one.name}")
                    found.setdefault(one.name, {})[name] = run.scores(one, shots, identity)
                    bar.update()
    result = compared(found, list(models), reference) | {"local_documents": task_data is not None}
    if output_path is not None:
        write_artefact(Path(output_path) / BENCHMARKS_NAME, result)
    return {"format": 1, **result}


@dataclass(frozen=True)
class _Stored:
    """What a model made of a task, as it is stored.

    Attributes:
        scores: results and values on every document.
        file: the file, relative to the folder of `benchmarks.json`; None without one.
    """

    scores: TaskScores
    file: str | None


@dataclass(frozen=True)
class _Run:
    """A model that does tasks, or has done them before.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        settings: how tasks are run.
        store: folder of the files of finished tasks; None: nothing is stored.
        key: digest of weights, tokenizer and settings.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: HarnessSettings
    store: Path | None
    key: str

    @classmethod
    def of(
        cls,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: HarnessSettings,
        store: Path | None,
    ) -> _Run:
        """Digest everything that decides results beside the task. The size of batches does not."""
        weights = None
        with suppress(UnsupportedModelError):  # offloaded weights, which cannot be read
            weights = model_digest(model)
        if weights is None and store is not None:
            logger.warning("The weights of the model %r cannot be read, so its finished tasks are not stored.", name)
            store = None
        config = model.config.to_diff_dict()
        for changing in ("_name_or_path", "transformers_version", "use_cache", "dtype"):
            config.pop(changing, None)
        template = getattr(tokenizer, "chat_template", None) if settings.options else None
        key = digest(
            weights, config, str(model.dtype), encoding_digest(tokenizer), template, settings.decisive,
            harness_version(),
        )  # fmt: skip
        return cls(model, tokenizer, settings, store, key)

    def scores(self, task: LoadedTask, shots: int | None, identity: str) -> _Stored:
        """The stored results of a task for the same inputs, or else new ones, which are stored.

        Args:
            task: the task.
            shots: number of worked examples; None: the task's own.
            identity: digest of its documents and prompts.
        """
        if self.store is None:
            return _Stored(run_task(self.model, self.tokenizer, task, self.settings, shots), None)
        key = digest(self.key, identity)
        name, end = re.sub(r"[^\w.-]+", "-", task.name), key.removeprefix("sha256:")[:16]
        path = self.store / f"{name}-{end}.json"
        # Earlier versions called a task file by its path, in the name and in the content; the key is the same.
        before = next(self.store.glob(f"*-{end}.json"), None)
        scores, called = (None, None) if before is None else _read(before)
        if scores is None:
            scores = run_task(self.model, self.tokenizer, task, self.settings, shots)
        if before != path or called != task.name:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_artefact(path, {"task": task.name, "key": key, **vars(scores)}, DOCUMENTS_KIND)
        if before is not None and before != path:
            before.unlink()
        return _Stored(scores, f"{DOCUMENTS_DIR}/{path.name}")


def _read(path: Path) -> tuple[TaskScores, str]:
    """Stored results, and what their task is called."""
    content = read_artefact(path, DOCUMENTS_KIND)
    return TaskScores(**{one.name: content[one.name] for one in fields(TaskScores)}), content["task"]


def _tokenizer_of(processing_class: Any, models: Mapping[str, Any], reference: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or the one beside the weights of the reference or of the first model that is a path."""
    if processing_class is None:
        first = [reference, *models] if reference is not None else list(models)
        processing_class = next((models[name] for name in first if isinstance(models[name], str | os.PathLike)), None)
    if processing_class is None:
        raise DataError("Model objects need their tokenizer. Pass processing_class=tokenizer.")
    return text_tokenizer(load_tokenizer(processing_class))


def compared(
    found: Mapping[str, Mapping[str, _Stored]], names: Sequence[str], reference: str | None
) -> dict[str, Any]:
    """The content of `benchmarks.json`.

    Args:
        found: task → model → results.
        names: the models, in their order.
        reference: name of the model that the others are compared with.
    """
    models: dict[str, Any] = {name: {} for name in names}
    for by_model in found.values():
        base = None if reference is None else by_model[reference].scores
        for name in names:
            scores = by_model[name].scores
            for task, metrics in scores.results.items():
                models[name][task] = {metric: dict(measured) for metric, measured in metrics.items()}
                if base is None or name == reference:
                    continue
                for metric, measured in models[name][task].items():
                    if (difference := _difference(scores, base, task, metric)) is not None:
                        measured["difference"] = difference
    files = {
        name: {task: by_model[name].file for task, by_model in found.items() if by_model[name].file} for name in names
    }
    return {
        "reference": reference,
        "tasks": list(found),
        "models": models,
        "average": _averages(found, names, reference),
        "documents": files,
    }


def _difference(scores: TaskScores, base: TaskScores, task: str, metric: str) -> dict[str, Any] | None:
    """Paired difference of a task, or of a group from its tasks; None where a metric is not a mean over documents."""
    parts = [
        (scores.values.get(part, {}).get(metric), base.values.get(part, {}).get(metric))
        for part in scores.members.get(task, [task])
    ]
    pairs = [(one, other) for one, other in parts if one is not None and other is not None]
    if not pairs or len(pairs) < len(parts) or any(len(one) != len(other) for one, other in pairs):
        return None
    by_size = scores.weighted.get(task, {}).get(metric.partition(",")[0], True)
    differences = [paired_difference(one, other) for one, other in pairs]
    return (
        combined(differences, [len(one) if by_size else 1 for one, _ in pairs]) if len(pairs) > 1 else differences[0]
    )


def _averages(
    found: Mapping[str, Mapping[str, _Stored]], names: Sequence[str], reference: str | None
) -> dict[str, dict[str, Any]]:
    """Mean of every model over the tasks, one metric each; empty where one has no mean of values from 0 to 1."""
    columns = {task: _main_values(task, by_model) for task, by_model in found.items()}
    if len(columns) < 2 or not all(columns.values()):
        return {}
    chances = [_chance(task, found[task], column) for task, column in columns.items() if column is not None]
    known = [one for one in chances if one is not None]
    averages: dict[str, dict[str, Any]] = {}
    for name in names:
        tasks = {task: column[name] for task, column in columns.items() if column is not None}
        means = [mean_and_error(values, [1] * len(values)) for _, values in tasks.values()]
        parts = [{"value": value, "stderr": error} for value, error in means]
        averages[name] = {
            **combined(parts, [1] * len(parts)),
            "metrics": {task: one[0] for task, one in tasks.items()},
        }
        if reference is not None and name != reference:
            base = [column[reference][1] for column in columns.values() if column is not None]
            own = [values for _, values in tasks.values()]
            differences = [paired_difference(one, other) for one, other in zip(own, base)]
            averages[name]["difference"] = combined(differences, [1] * len(differences))
            averages[name]["share"] = share_of(own, base)
            if len(known) < len(chances):
                continue
            above = [[[value - one for value in values] for values, one in zip(side, known)] for side in (own, base)]
            if mean_of_means(above[1]) > 0:
                averages[name]["share_above_chance"] = share_of(*above)
    return averages


def _chance(task: str, by_model: Mapping[str, _Stored], column: Mapping[str, tuple[str, list[float]]]) -> float | None:
    """Accuracy of guessing in the main metric of a task, whose values are in the column.

    0 if there is no guessing, and None if it is not known.
    """
    name, (metric, values) = next(iter(column.items()))
    scores = by_model[name].scores
    parts = scores.members.get(task) or [task]
    chances = [scores.results.get(part, {}).get(metric, {}).get("chance", 0.0) for part in parts]
    if None in chances:
        return None
    return sum(len(scores.values[part][metric]) * one for part, one in zip(parts, chances)) / len(values)


def _main_values(task: str, by_model: Mapping[str, _Stored]) -> dict[str, tuple[str, list[float]]] | None:
    """Model → main metric of a task, and its value on every document; None without a metric from 0 to 1.

    The documents of a group's tasks count equally, as those of one task.
    """
    found = {}
    for name, stored in by_model.items():
        members = stored.scores.members.get(task) or list(stored.scores.values)
        shared = set.intersection(*(set(stored.scores.values.get(part, {})) for part in members)) if members else set()
        metric = main_metric(task, [one for one in stored.scores.values.get(members[0], {}) if one in shared])
        if metric is None:
            return None
        values = [value for part in members for value in stored.scores.values[part][metric]]
        if not all(0 <= value <= 1 for value in values):  # on another scale than the other tasks
            return None
        found[name] = (metric, values)
    return found
