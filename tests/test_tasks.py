"""Benchmarks against likelihoods that are computed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from minitron_hf.errors import DataError, MissingDependencyError
from minitron_hf.evaluation import tasks
from minitron_hf.evaluation.benchmarks import measure_benchmarks
from minitron_hf.evaluation.task_results import _conditions, _task_metrics
from minitron_hf.evaluation.tasks import HarnessSettings, TaskSource, evaluate_tasks, require_tasks, run_task
from pocket import pocket_model, pocket_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer()


@pytest.fixture(scope="module")
def model():
    return pocket_model("llama")


def test_benchmarks_need_their_extra(monkeypatch: pytest.MonkeyPatch, model):
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'minitron-hf\[eval\]'"):
        evaluate_tasks(model, "piqa")


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task of two questions that is made here."""
    pytest.importorskip("lm_eval")
    questions = [
        {"context": "one two", "choices": ["three", "zzz"], "label": 0},
        {"context": "a b", "choices": ["q", "c"], "label": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "task.yaml").write_text(
        f"""
task: pocket_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "questions.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
metadata: {{version: 1.0}}
"""
    )
    return tmp_path


def test_task_scores_agree_with_the_likelihoods(task_folder: Path, model, tokenizer):
    results = evaluate_tasks(model, "pocket_choice", processing_class=tokenizer, include_path=task_folder)
    right = 0
    for line in (task_folder / "questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        scores = []
        for choice in question["choices"]:
            context, whole = (
                tokenizer(t)["input_ids"] for t in (question["context"], f"{question['context']} {choice}")
            )
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            scores.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        right += scores.index(max(scores)) == question["label"]
    assert results["pocket_choice"]["acc"]["value"] == right / 2
    assert set(results) == {"pocket_choice"}
    how = {"num_documents": 2, "num_documents_in_task": 2, "num_fewshot": 0, "task_version": 1.0}
    assert results["pocket_choice"]["acc"].items() >= how.items()
    assert results["pocket_choice"]["acc"]["harness_version"]
    limited = evaluate_tasks(model, "pocket_choice", processing_class=tokenizer, include_path=task_folder, limit=1)
    assert limited["pocket_choice"]["acc"]["num_documents"] == 1
    assert limited["pocket_choice"]["acc"]["num_documents_in_task"] == 2
    assert results["pocket_choice"]["acc"]["stderr"] is not None


def test_unknown_tasks_and_missing_tokenizers_are_refused(task_folder: Path, model, tokenizer, monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager  # without its own tasks, which take ten seconds to index
    monkeypatch.setattr(tasks, "_indexed", tasks._indexed.__wrapped__)  # which would remember this one
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **kwargs: manager(**{**kwargs, "include_defaults": False})
    )
    with pytest.raises(DataError, match="no task 'never_heard_of'"):
        evaluate_tasks(model, ["never_heard_of"], processing_class=tokenizer)
    with pytest.raises(DataError, match="processing_class=tokenizer"):
        evaluate_tasks(model, "pocket_choice", include_path=task_folder)
    with pytest.raises(DataError, match=r"include_path.*does not exist"):
        evaluate_tasks(model, "pocket_choice", include_path=task_folder / "gone")


def test_values_on_documents_have_the_reported_mean(task_folder: Path, model, tokenizer):
    with TaskSource.opened(["pocket_choice"], task_folder) as source:
        scores = run_task(model, tokenizer, source.load("pocket_choice"), HarnessSettings(show_progress=False))
    measured = scores.results["pocket_choice"]["acc"]
    values = scores.values["pocket_choice"]["acc"]
    assert sum(values) / len(values) == measured["value"]
    assert measured["chance"] == 0.5
    assert len(scores.responses["pocket_choice"]) == 2


def test_a_task_file_is_called_by_its_own_name(task_folder: Path, model, tokenizer):
    path = str(task_folder / "task.yaml")
    options = {"processing_class": tokenizer, "include_path": task_folder, "show_progress": False}
    found = measure_benchmarks({"student": model}, path, output_path=task_folder / "out", **options)
    assert (
        found["tasks"] == list(found["models"]["student"]) == list(found["documents"]["student"]) == ["pocket_choice"]
    )
    written = [one.read_text() for one in (task_folder / "out").rglob("*.json")]
    assert len(written) == 2
    assert not any(str(task_folder) in text or "task.yaml" in text for text in written)
    named = measure_benchmarks({"student": model}, "pocket_choice", output_path=task_folder / "out", **options)
    assert named == found
    assert len(list((task_folder / "out" / "benchmarks").iterdir())) == 1, "finished under either name"
    with pytest.raises(DataError, match=r"'pocket_choice' and .*task\.yaml' are both called 'pocket_choice'"):
        require_tasks(["pocket_choice", path], task_folder)


def test_titles_of_task_files(tmp_path: Path):
    path = tmp_path / "mine.v2.yaml"
    for text, title in (
        ("task: my_task\ndoc_to_text: !function utils.text\n", "my_task"),
        ("group: my_group\ntask: [one, two]\n", "my_group"),
        ("include: base.yaml\n", "mine.v2"),
        ("task: [\n", "mine.v2"),
    ):
        path.write_text(text)
        assert tasks.task_title(str(path), ()) == title
    assert tasks.task_title(str(path), {str(path)}) == str(path), "a name that the harness knows"
    assert tasks.task_title("piqa", ()) == "piqa"


def write_questions(path: Path, names: str) -> None:
    """One question for each letter; its context holds no other letter of the questions."""
    rows = [{"context": f"{name} {name}", "choices": [name, "q"], "label": 0} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("own_examples", [True, False])
def test_local_documents_replace_those_of_a_task_and_no_document_is_its_own_example(task_folder, own_examples):
    data = task_folder / "data"
    data.mkdir()
    write_questions(data / "pocket_choice.jsonl", "abc")
    if own_examples:
        write_questions(data / "pocket_choice_fewshot.jsonl", "xyz")
    with TaskSource.opened(["pocket_choice"], task_folder, data) as source:
        task = source.load("pocket_choice").tasks["pocket_choice"]
        documents = list(task.eval_docs)
        assert [row["context"] for row in documents] == ["a a", "b b", "c c"]
        for row in documents:
            task.set_fewshot_seed(1234)
            prompt = task.fewshot_context(row, 2)
            assert prompt.count(row["context"]) == 1
            others = "xyz" if own_examples else "abc".replace(row["context"][0], "")
            assert sum(f"{name} {name}" in prompt for name in others) == 2


def test_code_is_executed_only_when_asked_for(task_folder: Path, monkeypatch):
    monkeypatch.delenv(tasks.CODE_VARIABLE, raising=False)
    path = task_folder / "task.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    for name in ("pocket_choice", str(path)):
        with (
            pytest.raises(DataError, match=r"executes code.*confirm_run_unsafe_code=True"),
            TaskSource.opened([name], task_folder) as source,
        ):
            source.load(name)
    with TaskSource.opened(["pocket_choice"], task_folder, runs_code=True) as source:
        source.load("pocket_choice")
        assert tasks.os.environ[tasks.CODE_VARIABLE] == "1"
    assert tasks.CODE_VARIABLE not in tasks.os.environ


def test_folders_and_documents_that_are_missing_are_named(task_folder: Path):
    for folder, words in (
        (task_folder / "gone", "task_data.*does not exist"),
        (task_folder, "no documents of pocket_c"),
    ):
        with pytest.raises(DataError, match=words), TaskSource.opened(["pocket_choice"], task_folder, folder):
            pass
    (task_folder / "questions.jsonl").unlink()
    with TaskSource.opened(["pocket_choice"], task_folder) as source, pytest.raises(DataError, match="task_data"):
        source.load("pocket_choice")


def test_task_metrics_keep_filters_and_errors_apart():
    found = _task_metrics(
        {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,none": 0.5,
            "exact_match_stderr,none": "N/A",
            "sample_len": 20,
        }
    )
    assert found == {
        "exact_match,strict-match": {"value": 0.25, "stderr": 0.1},
        "exact_match": {"value": 0.5, "stderr": None},
    }


def test_conditions_of_groups_are_those_of_their_tasks(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.13")
    results = {
        "n-samples": {name: {"original": 10, "effective": count} for name, count in (("a", 10), ("b", 4), ("c", 1))},
        "n-shot": {"all": 5, "a": 5},
        "versions": {"a": 2.0},
        "group_subtasks": {"all": ["a", "inner"], "inner": ["b", "c"], "a": []},
    }
    rest = {"num_fewshot": 5, "harness_version": "0.4.13"}
    assert _conditions(results, "a") == {
        "num_documents": 10,
        "num_documents_in_task": 10,
        "task_version": 2.0,
        **rest,
    }
    assert _conditions(results, "all") == {
        "num_documents": 15,
        "num_documents_in_task": 30,
        "task_version": None,
        **rest,
    }
    assert _conditions({}, "x")["num_documents"] is None


def test_stories_260k_on_benchmarks(data_folder: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(data_folder)  # the task files name their data relative to it
    results = evaluate_tasks(
        data_folder / "models" / "stories260K",
        ["stories_lastword_local"],
        include_path=data_folder / "eval" / "tasks",
        add_bos_token=True,
        limit=40,
        batch_size=16,
    )
    metrics = results["stories_lastword_local"]
    assert 0.1 < metrics["acc"]["value"] < 0.6  # 0.344 over all of it
    assert metrics["perplexity"]["stderr"] > 0
