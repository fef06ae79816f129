"""Recipes: sections are checked by name, overrides are YAML, and every shipped recipe is a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_hf.errors import DataError, PlanError
from minitron_hf.evaluation import evaluate, tasks
from minitron_hf.recipe.reading import apply_overrides
from minitron_hf.recipe.runner import run_recipe, try_recipe
from minitron_hf.recipe.schema import PublishSection, Recipe
from minitron_hf.recipe.stages import _distill_settings, _evaluation_settings, stages_until
from pocket import pocket_model, pocket_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
MINIMAL = {
    "teacher": "some/teacher",
    "data": {"train": "train.jsonl", "eval": {"source": "eval.jsonl", "split": "train[:5]"}},
    "output_dir": "runs/x",
    "prune": {"hidden_size": 0.5},
}


def test_strings_stand_for_sources_and_defaults_are_filled_in():
    recipe = Recipe.from_dict(MINIMAL)
    assert recipe.teacher.model == "some/teacher"
    assert recipe.data.train.source == "train.jsonl"
    assert recipe.data.train.text_field == "text"
    assert recipe.data.eval.split == "train[:5]"
    assert recipe.data.calibration is None
    assert recipe.pruner_config.hidden_size == 0.5
    assert recipe.publish is None
    # What later versions added changes no digest of a finished stage.
    assert PublishSection("me/student").given() == {"repo_id": "me/student", "private": True, "revision": None}
    assert (
        PublishSection("me/student", tag="v1", quantized=True).given().items()
        >= {"tag": "v1", "quantized": True}.items()
    )


def test_the_written_recipe_reads_back_equal():
    recipe = Recipe.from_dict({**MINIMAL, "publish": {"repo_id": "me/student"}, "controls": ["random_init"]})
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prun": {}}, ["no entry prun", "prune"]),
        ({"teacher": {"modle": "x"}}, ["teacher has no entry modle", "model"]),
        ({"data": {"train": "x"}}, ["data lacks", "eval"]),
        ({"teacher": {}}, ["teacher lacks", "model"]),
        ({"evaluate": {"num_rows": "many"}}, ["evaluate.num_rows='many'", "an integer or null"]),
        ({"evaluate": {"speed": 3}}, ["evaluate.speed=3", "true or false"]),
        ({"evaluate": {"batch_size": True}}, ["evaluate.batch_size=True", "an integer"]),
        ({"prune": [1]}, ["prune=[1]", "entries"]),
        ({"controls": ["magic"]}, ["magic", "random_pruning"]),
        ({"publish": {"private": True}}, ["publish lacks", "repo_id"]),
        ({"search": {"max_parameters": 1e9}}, ["search lacks space"]),
        ({"search": {"space": {"hidden_size": [0.5]}}}, ["hidden_size: in prune and in search.space"]),
        ({"prune": {"target_parameters": 0.5}, "search": {"space": {"hidden_size": [1]}}}, ["leave out one"]),
        ({"prune": {}}, ["lacks prune"]),
        ({"data": "corpus"}, ["data: expected a section"]),
    ],
)
def test_mistakes_are_refused_by_name(changes, words):
    with pytest.raises(DataError) as raised:
        Recipe.from_dict({**MINIMAL, **changes})
    for word in words:
        assert word in str(raised.value)


def test_unknown_pruner_field_is_refused_by_name():
    with pytest.raises(PlanError, match="hiden_size"):
        Recipe.from_dict({**MINIMAL, "prune": {"hiden_size": 3}}).pruner_config  # noqa: B018


def test_overrides_reach_into_sections_that_do_not_exist_or_are_short():
    changed = apply_overrides(
        MINIMAL, ["distill.learning_rate=1e-3", "data.train.split=test", "publish=null", "evaluate.prompts=[a, b]"]
    )
    recipe = Recipe.from_dict(changed)
    assert recipe.distill == {"learning_rate": 1e-3}
    assert recipe.data.train.source == "train.jsonl"
    assert recipe.data.train.split == "test"
    assert recipe.evaluate.prompts == ["a", "b"]
    assert MINIMAL["data"]["train"] == "train.jsonl"
    short = {**MINIMAL, "generate": {"prompts": "p.jsonl"}}
    changed = apply_overrides(short, ["generate.prompts.num_rows=3"])["generate"]["prompts"]
    assert changed == {"source": "p.jsonl", "num_rows": 3}


@pytest.mark.parametrize("override", ["novalue", "=3", "output_dir.x=3"])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(DataError, match="--set"):
        apply_overrides(MINIMAL, [override])


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="Cannot read the recipe"):
        Recipe.from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(DataError, match="not valid YAML"):
        Recipe.from_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(DataError, match="no sections"):
        Recipe.from_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_recipes(path):
    recipe = Recipe.from_yaml(path)
    assert recipe.pruner_config
    assert recipe.output_dir


#: Sizes of the teachers of shipped recipes, of which pockets keep the same fractions.
TEACHER_SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
#: What makes a recipe small, wherever the name stands.
SMALL = {
    "max_length": 16,
    "num_rows": 4,
    "batch_size": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "warmup_steps": 1,
    "logging_steps": 1,
    "num_tokens": 64,
    "num_prompts": 2,
    "max_new_tokens": 4,
    "speed": False,
}


#: A chat template whose conversations fit into `max_length`.
SHORT_CHAT = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)


def at_pocket_size(values: Any, folder: Path, name: str = "") -> Any:
    """A recipe for the pocket teacher and text in `folder`; every key stays."""
    if name == "teacher":
        return str(folder / "teacher")
    is_source = name in ("train", "eval", "calibration") and isinstance(values, str)
    if is_source or (isinstance(values, dict) and "source" in values):
        weights = {"weight": values["weight"]} if "weight" in values else {}
        return {"source": str(folder / "text.jsonl"), **weights}
    if name == "output_dir":
        return str(folder / "run")
    if name in TEACHER_SIZES and isinstance(values, int):
        return values / TEACHER_SIZES[name]
    if name == "space":
        return {size: listed[:1] if size == "num_hidden_layers" else listed[-2:] for size, listed in values.items()}
    if name == "max_parameters":
        return 100_000
    if name == "tolerance":
        return 1.0
    if isinstance(values, dict):
        return {key: at_pocket_size(value, folder, key) for key, value in values.items()}
    if isinstance(values, list):
        return [at_pocket_size(value, folder) for value in values]
    return SMALL.get(name, values)


@pytest.fixture(params=sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def pocket_recipe(request, tmp_path, monkeypatch) -> Recipe:
    """A shipped recipe at pocket size; the tasks of lm-evaluation-harness are not run."""
    model_type = "qwen3" if request.param.name.startswith("qwen3") else "llama"
    pocket_model(model_type, dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    values = yaml.safe_load(request.param.read_text())
    texts = [f"the {a} {b} of {c} is d" for a in ("old", "new") for b in "xyz" for c in "abcd"]
    rows: list[Any] = [{"text": text} for text in texts]
    if "generate" in values:  # a chat model
        rows = [
            {"messages": [{"role": role, "content": text[-8:-5]} for role in ("user", "assistant")]} for text in texts
        ]
    pocket_tokenizer(chat_template=SHORT_CHAT if "generate" in values else None).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for module in (tasks, evaluate):
        monkeypatch.setattr(module, "require_tasks", lambda *args, **kwargs: None)
    monkeypatch.setattr(evaluate, "measure_benchmarks", lambda *args, **kwargs: {})
    shipped, small = Recipe.from_dict(values), Recipe.from_dict(at_pocket_size(values, tmp_path))
    assert [stage.name for stage in stages_until(small)] == [stage.name for stage in stages_until(shipped)]
    return small


def test_shipped_recipes_pass_every_check_at_pocket_size(pocket_recipe):
    assert try_recipe(pocket_recipe)["num_parameters"]["teacher"] > 0


@pytest.mark.slow
def test_shipped_recipes_run_at_pocket_size(pocket_recipe):
    folder = run_recipe(pocket_recipe, show_progress=False, report=lambda line: None)
    assert "pruned from" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").is_file()


def test_what_is_measured_in_training_changes_no_finished_stage(tmp_path, monkeypatch):
    """All entries of an evaluation are recorded; tasks that training measures are not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.jsonl").write_text('{"text": "the old"}')
    changed = Recipe.from_dict({**MINIMAL, "evaluate": {"draft_prompts": 4, "speed_batch_sizes": [2]}})
    recorded = _evaluation_settings(changed)["evaluate"]
    assert (recorded["draft_prompts"], recorded["speed_batch_sizes"]) == (4, [2])
    logged = Recipe.from_dict({**MINIMAL, "distill": {"eval_tasks": ["piqa"], "eval_task_limit": 3}})
    assert _distill_settings(logged) == _distill_settings(Recipe.from_dict(MINIMAL))
