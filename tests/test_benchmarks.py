"""Models beside a reference on benchmark tasks: paired differences, averages, finished tasks. Without the harness."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random

import pytest
from typer.testing import CliRunner

from minitron_hf.cli.app import app
from minitron_hf.errors import DataError
from minitron_hf.evaluation import benchmarks, evaluate
from minitron_hf.evaluation.benchmarks import _Stored, compared, measure_benchmarks
from minitron_hf.evaluation.paired import paired_difference, share_of
from minitron_hf.evaluation.presets import PRESETS
from minitron_hf.evaluation.task_results import TaskScores, _add_chance
from minitron_hf.evaluation.tasks import task_title
from minitron_hf.publishing.benchmark_tables import _benchmark_table
from minitron_hf.publishing.uploads import _documents_of_benchmarks, is_owned
from pocket import pocket_model, pocket_tokenizer, starting_tokenizer


def answers(seed: int, count: int, share: float) -> list[float]:
    generator = random.Random(seed)
    return [float(generator.random() < share) for _ in range(count)]


def test_paired_differences_of_answers_have_the_error_of_mcnemar():
    model, reference = answers(1, 200, 0.5), answers(2, 200, 0.6)
    found = paired_difference(model, reference)
    gained = sum(a > b for a, b in zip(model, reference))
    lost = sum(a < b for a, b in zip(model, reference))
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["value"] == pytest.approx((gained - lost) / 200)
    assert found["stderr"] ** 2 == pytest.approx((gained + lost - (gained - lost) ** 2 / 200) / (200 * 199))
    back = paired_difference(reference, model)
    assert (back["value"], back["stderr"]) == pytest.approx((-found["value"], found["stderr"]))
    assert paired_difference(model, model) == {"value": 0.0, "stderr": 0.0, "gained": 0, "lost": 0}
    assert "gained" not in paired_difference([0.5, 1.0], [1.0, 0.0])


def test_the_share_of_a_reference_has_the_error_of_the_jackknife():
    own, base = [answers(3, 60, 0.5), answers(4, 90, 0.3)], [answers(5, 60, 0.6), answers(6, 90, 0.5)]

    def share(own, base):
        return sum(sum(task) / len(task) for task in own) / sum(sum(task) / len(task) for task in base)

    variance = 0.0
    for task in range(2):
        left = []
        for out in range(len(own[task])):
            one, other = [list(values) for values in own], [list(values) for values in base]
            del one[task][out], other[task][out]
            left.append(share(one, other))
        mean = sum(left) / len(left)
        variance += (len(left) - 1) / len(left) * sum((value - mean) ** 2 for value in left)
    found = share_of(own, base)
    assert found["value"] == pytest.approx(share(own, base))
    assert found["stderr"] == pytest.approx(math.sqrt(variance), rel=0.02)
    assert share_of(own, own) == {"value": 1.0, "stderr": 0.0}
    assert share_of(own, [[0.0] * 60, [0.0] * 90]) is None


def scores_of(values: dict[str, list[float]], group: str | None = None, by_size: bool = True) -> TaskScores:
    """Accuracies on tasks, and their mean under the name of a group."""
    means = {name: sum(one) / len(one) for name, one in values.items()}
    results = {name: {"acc": {"value": mean, "stderr": 0.1}} for name, mean in means.items()}
    if group is not None:
        weights = {name: len(one) if by_size else 1 for name, one in values.items()}
        mean = sum(weights[name] * means[name] for name in values) / sum(weights.values())
        results[group] = {"acc": {"value": mean, "stderr": 0.1}}
    members = {} if group is None else {group: list(values)}
    weighted = {} if group is None else {group: {"acc": by_size}}
    return TaskScores(results, {name: {"acc": one} for name, one in values.items()}, {}, members, weighted)


@pytest.mark.parametrize("by_size", [True, False])
def test_differences_of_groups_follow_from_their_tasks(by_size):
    own = scores_of({"one": answers(1, 40, 0.4), "two": answers(2, 80, 0.7)}, "both", by_size)
    base = scores_of({"one": answers(3, 40, 0.6), "two": answers(4, 80, 0.8)}, "both", by_size)
    found = compared(
        {"both": {"student": _Stored(own, None), "teacher": _Stored(base, None)}}, ["teacher", "student"], "teacher"
    )
    measured = found["models"]["student"]["both"]["acc"]
    assert measured["difference"]["value"] == pytest.approx(
        measured["value"] - found["models"]["teacher"]["both"]["acc"]["value"]
    )
    parts = [found["models"]["student"][name]["acc"]["difference"] for name in ("one", "two")]
    weights = [1 / 3, 2 / 3] if by_size else [0.5, 0.5]
    errors = [(weight * part["stderr"]) ** 2 for weight, part in zip(weights, parts)]
    assert measured["difference"]["stderr"] == pytest.approx(math.sqrt(sum(errors)))
    assert "difference" not in found["models"]["teacher"]["both"]["acc"]
    assert found["average"] == {}, "of a single task"


def test_other_metrics_than_means_have_no_difference():
    own = scores_of({"one": [0.0, 1.0]})
    own.results["one"]["perplexity"] = {"value": 30.0, "stderr": 1.0}
    found = compared(
        {"one": {"student": _Stored(own, None), "teacher": _Stored(own, None)}}, ["teacher", "student"], "teacher"
    )
    assert "difference" not in found["models"]["student"]["one"]["perplexity"]


def test_averages_and_the_table_of_the_card():
    names = ["teacher", "student", "alone"]
    values = {
        "piqa": {"teacher": [1.0, 1.0, 1.0, 0.0], "student": [1.0, 0.0, 1.0, 0.0], "alone": [1.0, 0.0, 0.0, 0.0]},
        "arc": {"teacher": [1.0, 0.0], "student": [1.0, 0.0], "alone": [0.0, 0.0]},
    }
    found = compared(
        {
            task: {name: _Stored(scores_of({task: one}), None) for name, one in by.items()}
            for task, by in values.items()
        },
        names,
        "teacher",
    )
    average = found["average"]["student"]
    assert average["value"] == 0.5
    assert average["difference"]["value"] == pytest.approx(-0.125)
    assert average["share"]["value"] == pytest.approx(0.5 / 0.625)
    assert average["share_above_chance"] == average["share"], "nothing can be guessed"
    header, *rows = _benchmark_table(found["models"], found["average"])
    assert header[4:] == ["Teacher", "Student", "Difference", "Alone", "Difference"]
    assert [row[0] for row in rows] == ["piqa", "arc", "Average of 2 tasks"]
    assert rows[0][6] == "-0.25 ± 0.25"
    assert rows[1][6] == "0"


def test_what_guessing_reaches_is_no_merit_of_a_student():
    """The share above chance, against plain arithmetic; a teacher at chance has no share."""
    values = {"piqa": [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]], "arc": [[1.0, 0.0], [1.0, 0.0]]}

    def average(chances):
        found = {}
        for task, both in values.items():
            named = dict(zip(("teacher", "student"), (scores_of({task: one}) for one in both)))
            for scores in named.values():
                scores.results[task]["acc"]["chance"] = chances[task]
            found[task] = {name: _Stored(scores, None) for name, scores in named.items()}
        return compared(found, ["teacher", "student"], "teacher")["average"]["student"]

    found = average({"piqa": 0.5, "arc": 0.25})
    assert found["share"]["value"] == pytest.approx(0.5 / 0.625)
    assert found["share_above_chance"]["value"] == pytest.approx((0.5 - 0.375) / (0.625 - 0.375))
    assert found["share_above_chance"]["stderr"] > found["share"]["stderr"] > 0
    assert "share_above_chance" not in average({"piqa": 0.75, "arc": 0.5})
    assert "share_above_chance" not in average({"piqa": 0.5, "arc": None})


def test_tasks_on_other_scales_have_no_average():
    values = {"piqa": [1.0, 0.0], "bleu": [25.0, 31.0]}
    found = {
        task: {name: _Stored(scores_of({task: one}), None) for name in ("teacher", "student")}
        for task, one in values.items()
    }
    assert compared(found, ["teacher", "student"], "teacher")["average"] == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 0.375),
        ({"multiple_target": True}, None),
        ({"process_results": "!function utils.process"}, None),
        ({"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]}, None),
    ],
)
def test_chance_is_known_where_one_answer_is_right(config, expected):
    results = {"acc": {"value": 0.5}, "f1": {"value": 0.5}}
    samples = [{"filtered_resps": ["a", "b"]}, {"filtered_resps": ["a", "b", "c", "d"]}]
    _add_chance(results, {"output_type": "multiple_choice", **config}, samples)
    assert results == {"acc": {"value": 0.5, "chance": expected}, "f1": {"value": 0.5}}


class Work:
    """A stand-in for the harness: tasks of two documents, and a list of what was run."""

    def __init__(self, monkeypatch):
        self.ran: list[str] = []
        self.documents, self.fails_at = "first", None
        monkeypatch.setattr(benchmarks.TaskSource, "opened", self.opened)
        monkeypatch.setattr(benchmarks, "run_task", self.run)
        monkeypatch.setattr(benchmarks, "harness_version", lambda: "0")

    @contextlib.contextmanager
    def opened(self, *args, **kwargs):
        yield self

    def load(self, name):
        work = self

        class Task:
            def identity(self, shots):
                return {"name": self.name, "documents": work.documents}

        Task.name, Task.given = task_title(name, ()), name
        return Task()

    def run(self, model, tokenizer, task, settings, shots):
        if len(self.ran) == self.fails_at:
            raise KeyboardInterrupt
        self.ran.append(f"{task.name} {shots}")
        return scores_of({task.name: [float(model.config.hidden_size % 2), 1.0]})


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


@pytest.fixture(scope="module")
def models():
    return {"student": pocket_model("llama", seed=1), "teacher": pocket_model("llama")}


def measure(models, folder, tasks=("a", "b"), **settings):
    given = {"processing_class": pocket_tokenizer(), "output_path": folder, "show_progress": False}
    return measure_benchmarks(models, tasks, **{**given, **settings})


def test_nothing_is_measured_twice_and_finished_tasks_survive(work, models, tmp_path):
    work.fails_at = 3
    with pytest.raises(KeyboardInterrupt):
        measure(models, tmp_path)
    assert work.ran == ["a None", "a None", "b None"]
    assert not (tmp_path / "benchmarks.json").exists()
    work.fails_at = None
    first = measure(models, tmp_path)
    assert work.ran[3:] == ["b None"]
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == first
    again = measure({**models, "copy": models["student"]}, tmp_path, batch_size=2)
    assert len(work.ran) == 4, "another batch size, and the same weights under another name"
    assert again["models"]["copy"] == again["models"]["student"] == first["models"]["student"]
    named = list(_documents_of_benchmarks(tmp_path / "benchmarks.json"))
    assert len(set(named)) == 4
    assert all(is_owned(name) and (tmp_path / name).is_file() for name in named)


def test_no_path_of_a_task_file_is_written_and_results_under_one_are_found(work, models, tmp_path):
    path, out = tmp_path / "private" / "mine.yaml", tmp_path / "out"
    path.parent.mkdir()
    path.write_text("task: my_task\n")
    found = measure(models, out, [str(path), "b"])
    assert found["tasks"] == list(found["average"]["student"]["metrics"]) == ["my_task", "b"]
    ran = list(work.ran)
    for file in (out / "benchmarks").glob("my_task-*.json"):  # as earlier versions wrote them
        content = json.loads(file.read_text()) | {"task": str(path)}
        file.with_name(file.name.replace("my_task", path.name)).write_text(json.dumps(content))
        file.unlink()
    assert measure(models, out, [str(path), "b"]) == found
    assert work.ran == ran
    written = [out / "benchmarks.json", *(out / "benchmarks").iterdir()]
    assert len(written) == 5
    assert not any("private" in file.read_text() or "mine" in file.read_text() + file.name for file in written)


def test_other_inputs_are_measured_anew(work, models, tmp_path):
    measure(models, tmp_path, ["a"])
    for settings in ({"limit": 1}, {"num_fewshot": 2}, {"add_bos_token": True}):
        before = len(work.ran)
        measure(models, tmp_path, ["a"], **settings)
        assert len(work.ran) == before + 2, settings
    before = len(work.ran)
    measure({**models, "student": pocket_model("llama", seed=2)}, tmp_path, ["a"])
    assert len(work.ran) == before + 1
    work.documents = "second"
    measure(models, tmp_path, ["a"])
    assert len(work.ran) == before + 3
    measure(models, tmp_path, ["a"], processing_class=starting_tokenizer())
    assert len(work.ran) == before + 5, "the same vocabulary, with a token in front"


def test_presets_have_the_shots_of_the_paper(work, models):
    """Sreenivas et al. 2024, table 1."""
    measure({"teacher": models["teacher"]}, None, ["minitron"])
    assert work.ran == ["winogrande 5", "arc_challenge 25", "mmlu 5", "hellaswag 10", "gsm8k 5"]
    assert PRESETS["minitron_code"] == {"humaneval": 0}


def test_a_single_model_has_no_reference_and_a_chat_template_must_be_there(work, models, tmp_path):
    found = measure({"teacher": models["teacher"]}, None, ["a"])
    assert found["reference"] is None
    assert found["models"]["teacher"]["a"]["acc"] == {"value": 1.0, "stderr": 0.1} or found["models"]["teacher"]["a"]
    with pytest.raises(DataError, match="no chat template"):
        measure(models, None, ["a"], apply_chat_template=True)
    with pytest.raises(DataError, match="no tasks"):
        measure(models, None, [])


def test_the_command_measures_and_prints_tasks(work, models, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(evaluate, "require_tasks", lambda *args, **kwargs: None)
    for name, model in models.items():
        copy.deepcopy(model).float().save_pretrained(tmp_path / name)
        pocket_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.jsonl").write_text('{"text": "the old man"}\n' * 3)
    named = [f"{name}={tmp_path / name}" for name in models]
    command = ["evaluate", *named, "--data", str(tmp_path / "text.jsonl"), "-o", str(tmp_path / "out")]
    command += ["--tasks", "a,b", "--set", "speed=false"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Average of 2 tasks" in result.output
    assert work.ran == ["a None", "a None", "b None", "b None"]
    again = CliRunner().invoke(app, [*command, "--overwrite"])
    assert again.exit_code == 0, again.output
    assert len(work.ran) == 4, "finished tasks are kept"
