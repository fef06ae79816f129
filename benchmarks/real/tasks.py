"""Tasks of lm-evaluation-harness on local files, document by document, so that students are compared with the teacher.

The files are those of the public sets, one JSON document a line: `arc_easy.jsonl`, `piqa.jsonl`, `winogrande.jsonl`,
`lambada_openai.jsonl`, `stories_lastword.jsonl` and `blimp/*.jsonl`. Each model has one JSON file, which is written
after every task. The same command goes on where it was stopped: tasks that were measured on the same documents are not
measured again. Needs the extra `eval`. Run from the repository root, for example:

    python -m benchmarks.real.tasks --teacher work/teacher --bench bench --limit 200 work/runs/arms/*/student
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers

from minitron_hf import load_tokenizer
from minitron_hf.evaluation.means import mean_and_error
from minitron_hf.files import digest, read_json, versions, write_json
from minitron_hf.models import load_for_compute
from minitron_hf.weights import model_digest

from .run import RESULTS as ARM_RESULTS
from .stopping import Stop, Stopped, log, seconds_until
from .tasks_report import FOLDER, TEACHER
from .teacher import teacher_metadata

RESULTS = ARM_RESULTS / FOLDER


@dataclass(frozen=True)
class Task:
    """A task on local files.

    Attributes:
        files: of its documents, a pattern below the folder of benchmarks.
        chance: accuracy of guessing.
        stock: the harness's own task file, of which the data source alone is replaced; None: `config` is the task.
        config: fields of the task.
    """

    files: str
    chance: float
    stock: str | None = None
    config: Mapping[str, Any] | None = None


_ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
#: The last word of a text, which has to be the most likely one, token by token.
_LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": _ACCURACY,
}
#: The more likely one of two sentences.
_BETTER_SENTENCE = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "metric_list": _ACCURACY,
}

TASKS = {
    "arc_easy": Task("arc_easy.jsonl", 0.25, "arc/arc_easy.yaml"),
    "piqa": Task("piqa.jsonl", 0.5, "piqa/piqa.yaml"),
    "winogrande": Task("winogrande.jsonl", 0.5, "winogrande/default.yaml"),
    "lambada_openai": Task("lambada_openai.jsonl", 0.0, config=_LAST_WORD),
    "stories_lastword": Task("stories_lastword.jsonl", 0.0, config=_LAST_WORD),
    "blimp": Task("blimp/*.jsonl", 0.5, config=_BETTER_SENTENCE),
}


def documents(task: Task, bench: Path, limit: int | None) -> list[str]:
    """The documents of a task, as lines of JSON. A limit takes the first ones, from each of several files as many.

    Raises:
        FileNotFoundError: if the folder has no such file.
    """
    files = sorted(bench.glob(task.files))
    if not files:
        raise FileNotFoundError(f"{bench} has no file {task.files}. Name other tasks with --task, or another folder.")
    each = None if limit is None else -(-limit // len(files))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:each]]


def write_task(name: str, task: Task, lines: Sequence[str], folder: Path) -> str:
    """Write documents and a task file for the harness; JSON is YAML. Returns the task's name."""
    import lm_eval.tasks

    split = f"{name}_local"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    values: dict[str, Any] = {"task": split, "tag": None, "dataset_path": "json", "dataset_name": None}
    values["dataset_kwargs"] = {
        "data_files": {part: str(data) for part in ("train", "validation", "test")},
        "cache_dir": str(folder / "cache"),
    }
    if task.stock is not None:
        values["include"] = str(Path(lm_eval.tasks.__file__).parent / task.stock)
    else:
        values |= {"test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}, **(task.config or {})}
    (folder / f"{split}.yaml").write_text(json.dumps(values), encoding="utf-8")
    return split


def score(model: Any, tokenizer: Any, name: str, lines: Sequence[str]) -> dict[str, Any]:
    """Accuracy of a model on a task, and which documents it gets right, as a string of 0 and 1."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        split = write_task(name, TASKS[name], lines, Path(folder))
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
                tasks=[split],
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
    samples = sorted(results["samples"][split], key=lambda sample: sample["doc_id"])
    correct = [int(sample["acc"]) for sample in samples]
    value, error = mean_and_error(correct, [1] * len(correct))
    return {
        "accuracy": {"value": round(value, 6), "stderr": None if error is None else round(error, 6)},
        "chance": TASKS[name].chance,
        "num_documents": len(correct),
        "correct": "".join(map(str, correct)),
        "documents": digest(*lines),
    }


class Scores:
    """The results of one model, in a JSON file that is written after every task.

    Args:
        path: the file.
        place: folder or Hub id of the model.
        described: what identifies it; results of another model under the same name are not kept.
    """

    def __init__(self, path: Path, place: str, described: Mapping[str, Any]) -> None:
        self.path, self.place = path, place
        stored = read_json(path) if path.is_file() else {}
        self.result = {"format": 1, **described, "tasks": {}}
        if all(stored.get(name) == value for name, value in self.result.items() if name != "tasks"):
            self.result = stored

    def missing(self, lines: Mapping[str, Sequence[str]]) -> list[str]:
        """The tasks that were not measured on these documents."""
        known = self.result["tasks"]
        return [name for name in lines if known.get(name, {}).get("documents") != digest(*lines[name])]

    def fill(self, lines: Mapping[str, Sequence[str]], tokenizer: Any, dtype: str | None) -> None:
        """Measure what is missing."""
        missing = self.missing(lines)
        if not missing:
            return
        model = load_for_compute(self.place, dtype=dtype)
        loaded = {"digest": model_digest(model), "computed_in": str(model.dtype).removeprefix("torch.")}
        if any(self.result.get(name, value) != value for name, value in loaded.items()):
            self.result["tasks"], missing = {}, list(lines)
        self.result |= {**loaded, "versions": versions()}
        for name in missing:
            self.result["tasks"][name] = score(model, tokenizer, name, lines[name])
            write_json(self.path, self.result)
            log(f"  {name}: {in_words(self.result['tasks'][name])}")


def in_words(found: Mapping[str, Any]) -> str:
    """A result in words."""
    accuracy = found["accuracy"]
    error = "" if accuracy["stderr"] is None else f" ± {accuracy['stderr']:.3f}"
    return f"{accuracy['value']:.3f}{error}, chance {found['chance']:.2f}, {found['num_documents']:,} documents"


def model_name(place: str) -> str:
    """Name of a student: the arm's, if `run.py` made it, else that of its folder."""
    folder = Path(place).resolve()
    return folder.parent.name if folder.name == "student" else folder.name


def main() -> None:
    """Score the teacher and every student on every task that is missing."""
    arguments = parse_arguments()
    for library in (transformers, datasets):
        library.utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = {name: TASKS[name] for name in arguments.task or TASKS}
    lines = {name: documents(task, arguments.bench, arguments.limit) for name, task in tasks.items()}
    tokenizer = load_tokenizer(arguments.teacher)
    teacher = teacher_metadata(arguments.teacher)
    suffix = "" if arguments.limit is None else f",limit={arguments.limit}"
    try:
        Stop().listen(None if arguments.until is None else seconds_until(arguments.until))
        for place in (arguments.teacher, *arguments.students):
            name = TEACHER if place == arguments.teacher else model_name(place)
            described = {"model": name, "teacher": teacher, "limit": arguments.limit}
            scores = Scores(arguments.results / f"{name}{suffix}.json", place, described)
            log(f"{name}: {', '.join(scores.missing(lines)) or 'nothing is missing'}")
            scores.fill(lines, tokenizer, arguments.dtype)
    except Stopped:
        log("stopped; the same command goes on with the next task.")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", help="folders of students, as run.py leaves them")
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--bench", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this task")
    parser.add_argument("--limit", type=int, help="documents of each task; has result files of its own")
    parser.add_argument("--until", metavar="HH:MM", help="stop at this time of day; the task in work is lost")
    parser.add_argument("--dtype", help="to compute in; default: as the hardware is fast")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for one JSON per model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
