"""Presets of benchmarks on local documents, in the column formats of the datasets on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_hf.errors import DataError
from minitron_hf.evaluation import tasks
from minitron_hf.evaluation.presets import PRESETS, with_presets
from minitron_hf.evaluation.tasks import HarnessSettings, TaskSource, run_task
from minitron_hf.recipe.actions import _task_arguments
from minitron_hf.recipe.environment import _evaluated_models
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_model, pocket_tokenizer

SUBJECTS = ("anatomy", "business_ethics")
#: Rows of `cais/mmlu` (configuration all), `Rowan/hellaswag` (validation) and `openai/openai_humaneval`.
MMLU = [
    {"question": f"{subject} question {n}", "subject": subject, "choices": ["a b", "c d", "e", "f"], "answer": n % 4}
    for subject in SUBJECTS
    for n in range(7)
]
HELLASWAG = [
    {
        "ind": n, "activity_label": "Baking cookies", "ctx_a": f"A woman opens oven {n}.", "ctx_b": "she", "ctx": "…",
        "endings": ["takes [step] cookies out.", "eats it.", "sleeps.", "flies."], "source_id": f"activitynet~{n}",
        "split": "val", "split_type": "indomain", "label": str(n % 4),
    }
    for n in range(12)
]  # fmt: skip
HUMANEVAL = [
    {
        "task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n", "entry_point": "add",
    }
]  # fmt: skip


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def stock(tmp_path):
    """The harness's files of HellaSwag and HumanEval, and its group MMLU with two subjects; documents of all."""
    harness = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    folder, data = tmp_path / "tasks", tmp_path / "data"
    data.mkdir()
    for name in ("hellaswag", "humaneval"):
        shutil.copytree(harness / name, folder / name)
    (folder / "mmlu").mkdir()
    wanted = [f"mmlu_{subject}.yaml" for subject in SUBJECTS]
    for name in ("_default_template_yaml", "_mmlu.yaml", "_mmlu_stem.yaml", "_mmlu_other.yaml", *wanted):
        shutil.copy(harness / "mmlu" / "default" / name, folder / "mmlu")
    group = folder / "mmlu" / "_mmlu.yaml"
    group.write_text("".join(line for line in group.open() if "social" not in line and "humanities" not in line))
    write_rows(data / "mmlu.jsonl", MMLU)
    write_rows(data / "mmlu_fewshot.jsonl", [row | {"question": f"{row['question']} worked"} for row in MMLU])
    write_rows(data / "hellaswag.jsonl", HELLASWAG)
    write_rows(data / "humaneval.jsonl", HUMANEVAL)
    return folder, data


def test_shots_are_those_of_the_papers():
    """Sreenivas et al. 2024, table 1; a number that is given counts for all tasks."""
    papers = {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5, "humaneval": 0}
    assert with_presets(["minitron", "minitron_code"]) == papers
    assert set(with_presets(["small"]).values()) == {0}
    assert set(with_presets(list(PRESETS), 3).values()) == {3}


def test_mmlu_and_hellaswag_read_local_documents_with_the_shots_of_the_papers(stock):
    """Prompts hold five and ten worked examples, never the document, and of MMLU those of its subject."""
    folder, data = stock
    shots = with_presets(["minitron"])
    settings, tokenizer = HarnessSettings(show_progress=False, limit=2), pocket_tokenizer()
    with TaskSource.opened(["mmlu", "hellaswag"], folder, data) as source:
        mmlu, hellaswag = source.load("mmlu"), source.load("hellaswag")
        assert {name: len(task.eval_docs) for name, task in mmlu.tasks.items()} == {
            "mmlu_anatomy": 7, "mmlu_business_ethics": 7,
        }  # fmt: skip
        for loaded, count in ((mmlu, "worked"), (hellaswag, "A woman")):
            for task in loaded.tasks.values():
                task.set_fewshot_seed(1234)
                number = shots[loaded.name]
                document = next(iter(task.eval_docs))
                prompt = task.fewshot_context(document, number)
                assert prompt.count(count) == number + (loaded is hellaswag)
                assert prompt.count(task.doc_to_text(document)) == 1
        assert "Baking cookies: A woman opens oven 0. She" in prompt
        assert "[step]" not in prompt
        found = run_task(pocket_model("llama"), tokenizer, mmlu, settings, 1).results
    assert set(found) >= {"mmlu", "mmlu_anatomy", "mmlu_business_ethics"}
    assert found["mmlu"]["acc"]["num_documents"] == 4
    assert found["mmlu_anatomy"]["acc"]["chance"] == 0.25


def test_parts_of_a_group_and_rows_without_their_task_are_refused(stock):
    folder, data = stock
    write_rows(data / "mmlu.jsonl", MMLU[:7])
    with (
        pytest.raises(DataError, match=r"no documents of mmlu_business_ethics .1 of the 2 tasks of mmlu"),
        TaskSource.opened(["mmlu"], folder, data),
    ):
        pass
    write_rows(data / "mmlu_business_ethics.jsonl", MMLU[7:])  # a file of the task itself
    with TaskSource.opened(["mmlu"], folder, data) as source:
        assert len(source.load("mmlu").tasks) == 2
    write_rows(data / "mmlu.jsonl", [row | {"subject": "?"} for row in MMLU])
    with pytest.raises(DataError, match="no column names the task"), TaskSource.opened(["mmlu"], folder, data):
        pass


class CodeEval:
    """What the metric `code_eval` does, in this process; the real one comes from the Hub."""

    def compute(self, references, predictions, k):
        passed = 0
        for test, [code] in zip(references, predictions, strict=True):
            try:
                exec(f"{code}\n{test}", {})
                passed += 1
            except Exception:
                continue
        return ({"pass@1": passed / len(references)}, {})


def test_humaneval_runs_code_only_when_asked_for(stock, monkeypatch):
    """It has no worked examples; a model that writes the solution passes."""
    import evaluate
    from lm_eval.models.huggingface import HFLM

    folder, data = stock
    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())
    monkeypatch.delenv(tasks.CODE_VARIABLE, raising=False)
    with (
        pytest.raises(DataError, match=r"'humaneval' executes code.*confirm_run_unsafe_code=True"),
        TaskSource.opened(["minitron_code"], folder, data),
    ):
        pass
    settings = HarnessSettings(show_progress=False, confirm_run_unsafe_code=True)
    [(name, shots)] = with_presets(["minitron_code"]).items()
    model, tokenizer, passed = pocket_model("llama"), pocket_tokenizer(), []
    with TaskSource.opened([name], folder, data, runs_code=True) as source:
        for answer in (HUMANEVAL[0]["canonical_solution"], "    return a - b\n"):
            asked = []

            def write(_, requests, *, asked=asked, answer=answer, **__):
                asked += [one.args[0] for one in requests]
                return [answer] * len(requests)

            monkeypatch.setattr(HFLM, "generate_until", write)
            [metrics] = run_task(model, tokenizer, source.load(name), settings, shots).results.values()
            assert asked == [HUMANEVAL[0]["prompt"]]
            passed += [measured["value"] for key, measured in metrics.items() if key.startswith("pass@1")]
    assert passed == [1.0, 0.0]


def test_quantised_copies_do_the_tasks_too():
    recipe = Recipe.from_dict(
        {
            "teacher": "t", "output_dir": "o", "data": {"train": "a.txt", "eval": "b.txt"},
            "prune": {"intermediate_size": 0.5}, "quantize": ["int8"], "evaluate": {"tasks": ["piqa"]},
        }
    )  # fmt: skip
    assert _task_arguments(recipe)["task_models"] == ["teacher", "student", "student_int8"]
    assert set(_task_arguments(recipe)["task_models"]) <= set(_evaluated_models(recipe))
