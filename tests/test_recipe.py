"""Recipes: sections are checked by name, overrides are YAML, and every shipped recipe is a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minitron_hf.errors import DataError, PlanError
from minitron_hf.recipe.reading import apply_overrides
from minitron_hf.recipe.schema import Recipe

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
