"""Tasks of lm-evaluation-harness: finds, loads and runs them. The only module that uses the harness."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import yaml

from ..errors import DataError, MinitronError, MissingDependencyError, did_you_mean
from ..files import digest
from ..models import evaluating, load_tokenizer
from .loading import common_device, load_for_inference
from .local_tasks import local_entries
from .presets import PRESETS, with_presets
from .task_results import TaskScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Variable of the environment without which the metric that executes code refuses to.
CODE_VARIABLE = "HF_ALLOW_CODE_EVAL"


def evaluate_tasks(
    model: PreTrainedModel | str | os.PathLike[str],
    tasks: str | Sequence[str],
    *,
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    task_data: str | os.PathLike[str] | None = None,
    add_bos_token: bool | None = None,
    confirm_run_unsafe_code: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score one model on tasks of lm-evaluation-harness (the extra `eval`).

    `measure_benchmarks` compares several models and keeps what is finished. Long because all arguments are explained.

    Args:
        model: a model, or the path or Hub id of one.
        tasks: names of tasks or groups, paths of task files, or names of presets (`presets.PRESETS`).
        processing_class: tokenizer, or the path or Hub id of one; default the tokenizer at the path `model`.
        limit: number of documents per task, or their fraction below 1, for a quick look.
        num_fewshot: number of worked examples in the prompt; None: the preset's or the task's own.
        batch_size: requests per forward pass.
        include_path: folders with further task files.
        task_data: folder with documents of stock tasks, `TASK.jsonl`, to read instead of the Hub (see `TaskSource`).
        add_bos_token: whether prompts start with the beginning-of-text token; None: the tokenizer decides.
        confirm_run_unsafe_code: run tasks that execute code which the model writes.
        dtype: dtype of a model that is loaded here; by default the stored one, or float32 where the hardware is slow
            in that.
        device: device of a model that is loaded here.
        **kwargs: passed on to `lm_eval.simple_evaluate` (`random_seed`, `apply_chat_template`, …).

    Returns:
        `{task: {metric: {"value": …, "stderr": …, …}}}`. A metric behind a filter other than `none` is named
        `"metric,filter"`, as in the harness; `stderr` is None where the harness gives none. Every metric holds its
        conditions: `num_documents` of the `num_documents_in_task`, `num_fewshot`, `task_version`, `harness_version`,
        and `chat_template` where one was applied; None where the harness does not report it. Accuracies of
        multiple-choice tasks hold `chance`, the accuracy of guessing.

    Raises:
        MissingDependencyError: without lm-evaluation-harness.
        DataError: if a task is unknown or cannot be loaded, executes code unasked, or there is no tokenizer.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    wanted = with_presets(names, num_fewshot)
    settings = HarnessSettings(
        limit=limit,
        batch_size=batch_size,
        add_bos_token=add_bos_token,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        options=kwargs,
    )
    with TaskSource.opened(list(wanted), include_path, task_data, confirm_run_unsafe_code) as source:
        if processing_class is None:
            if not isinstance(model, str | os.PathLike):
                raise DataError("A model object needs its tokenizer. Pass processing_class=tokenizer.")
            processing_class = model
        tokenizer = load_tokenizer(processing_class)
        model = load_for_inference(model, dtype, common_device({"model": model}, device))
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, shots in wanted.items():
            found |= run_task(model, tokenizer, source.load(name), settings, shots).results
    return found


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are run.

    Attributes:
        limit: number of documents per task, or their fraction below 1; None: all.
        batch_size: requests per forward pass.
        add_bos_token: whether prompts start with the beginning-of-text token; None: the tokenizer decides.
        confirm_run_unsafe_code: run tasks that execute code which the model writes.
        show_progress: show the harness's progress bars.
        options: further arguments of `lm_eval.simple_evaluate`.
    """

    limit: int | float | None = None
    batch_size: int = 8
    add_bos_token: bool | None = None
    confirm_run_unsafe_code: bool = False
    show_progress: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that results depend on."""
        without = ("batch_size", "show_progress", "confirm_run_unsafe_code")
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group of tasks, with its documents.

    Attributes:
        name: its name in results, see `task_title`.
        given: as it was asked for: a name, or the path of a task file.
        manager: the harness's index of tasks.
        tasks: name → the harness's task.
        weighted: group → metric → whether its tasks count by their documents.
    """

    name: str
    given: str
    manager: Any
    tasks: Mapping[str, Any]
    weighted: Mapping[str, Mapping[str, bool]]

    def identity(self, shots: int | None) -> dict[str, Any]:
        """What decides the result of a model: documents, prompts and metrics of every task."""
        return {name: _task_identity(task, shots) for name, task in self.tasks.items()}


@dataclass(frozen=True)
class TaskSource:
    """Where tasks come from: the harness, folders of task files, and local documents of stock tasks.

    A file `TASK.jsonl` in the folder of documents replaces the documents of that task; prompt and metrics stay the
    stock task's. `TASK_fewshot.jsonl` holds its worked examples. Without that file they are drawn from `TASK.jsonl`,
    never the document itself. Tasks of a group (MMLU) have a file each, or one file `GROUP.jsonl` with a column that
    names the task (`subject`).

    Attributes:
        manager: the harness's index of tasks.
        runs_code: whether tasks that execute code may be loaded.
        show_progress: show progress bars of datasets.
    """

    manager: Any
    runs_code: bool = False
    show_progress: bool = True

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        names: Sequence[str],
        include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        task_data: str | os.PathLike[str] | None = None,
        runs_code: bool = False,
        *,
        show_progress: bool = True,
    ) -> Iterator[TaskSource]:
        """Index the tasks; files of local documents exist for the duration of the context.

        Raises:
            MissingDependencyError: without lm-evaluation-harness.
            DataError: if a task or a folder is unknown, or a task executes code unasked.
        """
        manager = require_tasks(names, include_path, runs_code=runs_code)
        with tempfile.TemporaryDirectory(prefix="minitron-tasks-") as folder, _code_allowed(runs_code):
            local = {} if task_data is None else local_entries(manager, names, Path(task_data), Path(folder))
            with mock.patch.dict(manager.task_index, local):
                yield cls(manager, runs_code, show_progress)

    def load(self, name: str) -> LoadedTask:
        """Load a task, or a group, with its documents.

        Raises:
            DataError: if its documents or its code cannot be loaded, or it executes code unasked.
        """
        try:
            with _quiet(self.show_progress), contextlib.redirect_stdout(io.StringIO()):  # some tasks print
                loaded = self.manager.load([name])
        except MinitronError:
            raise
        except Exception as error:  # from the network, the dataset's files or the task's own code
            raise DataError(
                f"The task {name!r} cannot be loaded ({type(error).__name__}: {error}). Without a network, point "
                "task_data at a folder with its documents."
            ) from error
        unsafe = [task for task, found in loaded["tasks"].items() if getattr(found, "UNSAFE_CODE", False)]
        if unsafe and not self.runs_code:
            raise DataError(_refusal_of_code(unsafe[0]))
        weighted = {
            group: {one.metric: bool(one.weight_by_size) for one in found.aggregate_metric_list or ()}
            for group, found in loaded.get("groups", {}).items()
        }
        return LoadedTask(task_title(name, self.manager.task_index), name, self.manager, loaded["tasks"], weighted)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    settings: HarnessSettings,
    shots: int | None = None,
) -> TaskScores:
    """Let a model do a task.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: the task or group.
        settings: how it is run.
        shots: number of worked examples; None: the task's own.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with (
        evaluating([model]),
        _random_state_kept(),
        _without_environment_report(),
        _quiet(settings.show_progress),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        results: Any = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                add_bos_token=settings.add_bos_token,
            ),
            tasks=[task.given],
            task_manager=task.manager,
            limit=settings.limit,
            num_fewshot=shots,
            log_samples=True,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            **{"bootstrap_iters": 1000, **settings.options},
        )
    return TaskScores.of(results, task.weighted, bool(settings.options.get("apply_chat_template")))


def _without_environment_report() -> contextlib.AbstractContextManager[Any]:
    """Keep `simple_evaluate` (read in 0.4.13) from starting pip, git and others for a report that nobody reads here.

    That takes seconds after every task. The versions that count are recorded by this package.
    """
    return mock.patch.multiple(
        "lm_eval.evaluator", create=True, add_env_info=lambda results: None, get_git_commit_hash=lambda: None
    )


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random states that the harness seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _quiet(show_progress: bool) -> contextlib.AbstractContextManager[Any]:
    """Hide progress bars that cannot be switched off."""
    return contextlib.nullcontext() if show_progress else contextlib.redirect_stderr(io.StringIO())


def require_tasks(
    names: Sequence[str],
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    runs_code: bool = False,
) -> Any:
    """The harness's index of tasks, which holds all the names.

    Args:
        names: names of tasks or groups, paths of task files, or names of presets.
        include_path: folders with further task files.
        runs_code: whether tasks may execute code that the model writes.

    Raises:
        MissingDependencyError: without lm-evaluation-harness.
        DataError: if a task or a folder is unknown, two tasks have one name, or a task executes code unasked.
    """
    try:
        from lm_eval.models import huggingface  # noqa: F401 (its dependencies may be missing too)
    except ImportError as error:
        raise MissingDependencyError(
            f"Benchmarks need lm-evaluation-harness ({error}). Run: pip install 'minitron-hf[eval]'"
        ) from error

    names = list(with_presets(names))
    folders = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"include_path: the folder {str(folder)!r} does not exist.")
    # The given folders may make the harness's own 15,000 tasks unnecessary, which take ten seconds to index.
    manager = _index(folders, with_stock=False) if folders else None
    if manager is None or not set(names) <= {*manager.all_tasks, *filter(os.path.exists, names)}:
        manager = _index(folders, with_stock=True)
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known and not os.path.exists(name)]:
        raise DataError(
            f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}."
            f"{did_you_mean(unknown, [*PRESETS, *known])} `lm-eval ls tasks` lists its tasks; the presets are "
            f"{', '.join(PRESETS)}; name folders of your own with include_path."
        )
    titles = [task_title(name, manager.task_index) for name in names]
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        same = [name for name, title in zip(names, titles, strict=True) if title == twice]
        raise DataError(
            f"The tasks {' and '.join(map(repr, same))} are both called {twice!r} in results. Name one of them, or "
            "change the entry task in a file."
        )
    entries = {name: manager.task_index.get(name) for name in names}
    unsafe = [name for name, entry in entries.items() if entry is not None and (entry.cfg or {}).get("unsafe_code")]
    if unsafe and not runs_code:
        raise DataError(_refusal_of_code(unsafe[0]))
    return manager


class _NamesLoader(yaml.SafeLoader):
    """Reads a task file without its functions, which have tags of the harness (`!function`)."""


_NamesLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def task_title(name: str, index: Container[str]) -> str:
    """The name of a task in results: of a task file the name that it gives, else the file's name without its end.

    A path would tell who measured where, and results are published.

    Args:
        name: name of a task, or path of a task file.
        index: names that the harness knows.
    """
    path = Path(name)
    if name in index or not path.is_file():
        return name
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _NamesLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # the harness says what is wrong when it loads the file
        content = None
    named = [content.get(key) for key in ("task", "group")] if isinstance(content, dict) else []
    return next((one for one in named if isinstance(one, str) and one), path.stem)


def _index(folders: Sequence[str | os.PathLike[str]], *, with_stock: bool) -> Any:
    """The tasks of folders, and of the harness itself if wanted; indexed once while the task files stay the same."""
    paths = tuple(str(folder) for folder in folders)
    files = sorted(file for path in paths for file in Path(path).glob("**/*.yaml"))
    return _indexed(paths, tuple((str(file), file.stat().st_mtime_ns) for file in files), with_stock)


@functools.lru_cache(2)
def _indexed(paths: tuple[str, ...], state: tuple[tuple[str, int], ...], with_stock: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths) or None, include_defaults=with_stock)


def _refusal_of_code(task: str) -> str:
    return (
        f"The task {task!r} executes code that the model writes, on this machine and as this user. Run it in a "
        "container, with confirm_run_unsafe_code=True."
    )


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Let the metric execute code if that was asked for."""
    before = os.environ.get(CODE_VARIABLE)
    try:
        if allowed:
            os.environ[CODE_VARIABLE] = "1"
        yield
    finally:
        if allowed and before is None:
            del os.environ[CODE_VARIABLE]
        elif before is not None:
            os.environ[CODE_VARIABLE] = before


def _task_identity(task: Any, shots: int | None) -> dict[str, Any]:
    """Prompt, metrics and documents of a task, not where the documents lie."""
    config = {name: value for name, value in task.dump_config().items() if not name.startswith("dataset_")}
    config["metadata"] = {
        name: value for name, value in (config.get("metadata") or {}).items() if name != "config_source"
    }
    # Functions in nested entries are written with their address in memory.
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(config, sort_keys=True, default=str))
    shots = config.get("num_fewshot") or 0 if shots is None else shots
    examples = list(task.fewshot_docs()) if shots else []
    documents = {"documents": _documents_digest(task.eval_docs), "examples": _documents_digest(examples)}
    return {"config": digest(text), **documents}


def _documents_digest(documents: Any) -> str:
    return digest(*(json.dumps(document, sort_keys=True, default=str) for document in documents))
