"""Tasks of lm-evaluation-harness on local files, document by document, so that students are compared with the teacher.

The files are those of the public sets, one JSON document a line: `arc_easy.jsonl`, `piqa.jsonl`, `winogrande.jsonl`,
`lambada_openai.jsonl`, and `blimp/*.jsonl`. One JSON file per model; models that have one are skipped. Needs the extra
`eval`. Run from the repository root, for example:

    python -m benchmarks.real.tasks --teacher work/teacher --bench bench --limit 200 work/runs/arms/*/student
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_hf import load_tokenizer
from minitron_hf.evaluation.quality import mean_and_error
from minitron_hf.files import file_digest, public_name, read_json, versions, write_json
from minitron_hf.models import load_for_compute

from .intervals import paired_difference
from .stopping import log
from .teacher import teacher_metadata

RESULTS = Path(__file__).with_name("results") / "tasks"


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


TASKS = {
    "arc_easy": Task("arc_easy.jsonl", 0.25, "arc/arc_easy.yaml"),
    "piqa": Task("piqa.jsonl", 0.5, "piqa/piqa.yaml"),
    "winogrande": Task("winogrande.jsonl", 0.5, "winogrande/default.yaml"),
    "lambada_openai": Task(
        "lambada_openai.jsonl",
        0.0,
        config={
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "blimp": Task(
        "blimp/*.jsonl",
        0.5,
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


def write_task(name: str, files: Sequence[Path], folder: Path) -> str:
    """Write a task file for the harness; JSON is YAML. Returns the task's name."""
    import lm_eval.tasks

    task, split = TASKS[name], f"{name}_local"
    values: dict[str, Any] = {"task": split, "tag": None, "dataset_path": "json", "dataset_name": None}
    values["dataset_kwargs"] = {
        "data_files": {part: list(map(str, files)) for part in ("train", "validation", "test")}
    }
    if task.stock is not None:
        values["include"] = str(Path(lm_eval.tasks.__file__).parent / task.stock)
    else:
        values |= {"test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}, **(task.config or {})}
    (folder / f"{split}.yaml").write_text(json.dumps(values), encoding="utf-8")
    return split


def score(model: Any, tokenizer: Any, names: Sequence[str], bench: Path, limit: int | None) -> dict[str, Any]:
    """Accuracy of a model on every task, and which documents it gets right, as a string of 0 and 1."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            # Of many files, such as BLiMP's, a limit takes some of each.
            files = evenly(sorted(bench.glob(TASKS[name].files)), limit, Path(folder))
            split = write_task(name, files, Path(folder))
            manager = TaskManager(include_path=folder, include_defaults=False)
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
                tasks=[split],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
            samples = sorted(results["samples"][split], key=lambda sample: sample["doc_id"])
            correct = [int(sample["acc"]) for sample in samples]
            value, error = mean_and_error(correct, [1] * len(correct))
            found[name] = {
                "accuracy": {"value": value, "stderr": error},
                "chance": TASKS[name].chance,
                "num_documents": len(correct),
                "correct": "".join(map(str, correct)),
                "digest": [file_digest(file) for file in files],
            }
    return found


def evenly(files: Sequence[Path], limit: int | None, folder: Path) -> Sequence[Path]:
    """The files; of several, with a limit, one that holds the first documents of each, as many of all as the limit."""
    if not files:
        raise FileNotFoundError("The folder of benchmarks lacks a task's files.")
    if limit is None or len(files) == 1:
        return files
    each = -(-limit // len(files))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:each]]
    path = folder / "some.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [path]


def with_differences(found: dict[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a student, with the paired difference to its teacher and its 95 % interval."""
    for name, values in found.items():
        own, others = ([float(digit) for digit in scores["correct"]] for scores in (values, teacher[name]))
        difference = paired_difference([own], [others], [1] * len(own))
        values["difference_to_teacher"] = {
            "value": difference.value,
            "low": difference.low,
            "high": difference.high,
        }
    return found


def main() -> None:
    """Score the teacher and every student that has no file yet."""
    arguments = parse_arguments()
    names = arguments.task or list(TASKS)
    tokenizer = load_tokenizer(arguments.teacher)
    teacher: dict[str, Any] = {}
    for place in (arguments.teacher, *arguments.students):
        is_teacher = place == arguments.teacher
        name = "teacher" if is_teacher else Path(place).resolve().parent.name
        path = arguments.results / f"{name}.json"
        if not path.is_file():
            log(f"{name}: {', '.join(names)}")
            model = load_for_compute(place)
            found = score(model, tokenizer, names, arguments.bench, arguments.limit)
            result = {
                "format": 1,
                "model": name,
                "teacher": {**teacher_metadata(arguments.teacher), "name": public_name(arguments.teacher)},
                "computed_in": str(model.dtype).removeprefix("torch."),
                "limit": arguments.limit,
                "tasks": found if is_teacher else with_differences(found, teacher),
                "versions": versions(),
            }
            write_json(path, result)
        tasks = read_json(path)["tasks"]
        teacher = teacher or tasks
        for task, values in tasks.items():
            accuracy = values["accuracy"]
            log(f"  {task}: {accuracy['value']:.3f} ± {accuracy['stderr']:.3f}, chance {values['chance']:.2f}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", help="folders of students, as run.py leaves them")
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--bench", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this task")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for one JSON per model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
