"""Settings are checked against annotations and ranges; YAML is read as everyone means it."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, get_args

import pytest
import yaml
from transformers.trainer_utils import IntervalStrategy

import minitron_hf
from minitron_hf.cli.options import _number
from minitron_hf.errors import DataError, PlanError, did_you_mean
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.recipe.reading import BUDGETS, BYTE_BUDGETS, apply_overrides, read_yaml, write_yaml
from minitron_hf.recipe.rules import RANGES, Range, hints_of, require_settings, require_value
from minitron_hf.recipe.schema import CorrectionSection, Recipe
from minitron_hf.recipe.settings import check_settings, distillation_config, section_names
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.shapes import enumerate_shapes
from pocket import pocket_config


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, int, True),
        (3.0, int, False),
        (True, int, False),
        (1, bool, False),
        (3, float, True),
        ("3", float, False),
        (None, int | None, True),
        (None, Optional[int], True),  # noqa: UP045 (as libraries write it)
        (None, int, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (True, Literal[1], False),
        ("no", IntervalStrategy, True),
        ("never", IntervalStrategy, False),
        ("never", IntervalStrategy | str, True),
        (["a"], list[str], True),
        (["a", 1], list[str], False),
        ("ab", list[str], False),
        ([[1, 2]], list[list[int]], True),
        ({"a": 1}, Mapping[str, int], True),
        ([], dict, False),
        (object(), Any, True),
        ((1, 2), Sequence[int], True),
        ("x", Range, False),
    ],
)
def test_values_fit_annotations(value, hint, fits):
    with contextlib.nullcontext() if fits else pytest.raises(DataError, match="expected"):
        require_value(value, hint, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(value):
    with pytest.raises(DataError, match="finite"):
        require_value(value, float, "x")


@pytest.mark.parametrize(("name", "good", "bad"), [("seed", 0, -1), ("seed", 2**32 - 1, 2**32), ("max_steps", -1, 0)])
def test_ranges_have_ends(name, good, bad):
    require_value(good, int, f"distill.{name}")
    with pytest.raises(DataError, match=f"distill.{name}={bad}: expected"):
        require_value(bad, int, f"distill.{name}")


def test_ranges_hold_the_defaults_of_everything_that_is_checked():
    """A default that its own range refuses would be refused in a recipe that writes it out."""
    from peft import LoraConfig

    from minitron_hf.distillation.config import DistillationConfig
    from minitron_hf.evaluation.evaluate import evaluate_models
    from minitron_hf.scoring.importance import estimate_importance
    from minitron_hf.search.architectures import search_architectures

    for target in (DistillationConfig, LoraConfig, evaluate_models, estimate_importance, search_architectures):
        hints = hints_of(target)
        assert hints
        for name, parameter in inspect.signature(target).parameters.items():
            if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
                require_settings({name: parameter.default}, hints, "", "")


def test_every_range_belongs_to_something():
    from minitron_hf.cli import app
    from minitron_hf.recipe import schema, settings

    known = {*settings.scoring_hints(), *settings.distillation_hints(), *settings.search_hints()}
    for section in vars(schema).values():
        known |= set(getattr(section, "__dataclass_fields__", ()))
    for command in app.COMMANDS:
        known |= set(inspect.signature(command).parameters)
    from peft import LoraConfig

    from minitron_hf.evaluation.evaluate import evaluate_models
    from minitron_hf.generation.corpus import generate_corpus
    from minitron_hf.pruning.repair import repaired_weights

    for target in (LoraConfig, evaluate_models, generate_corpus, repaired_weights):
        known |= set(hints_of(target))
    assert {name for name in RANGES if name not in known} == set()


def test_choices_are_those_of_the_rooms_that_make_them():
    from minitron_hf.distillation.cache_coding import DTYPES
    from minitron_hf.distillation.correction import Method
    from minitron_hf.recipe.schema import CacheSection, CorrectionSection

    assert set(get_args(hints_of(CorrectionSection)["method"])) == set(get_args(Method))
    assert set(get_args(hints_of(CacheSection)["dtype"])) == set(DTYPES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("1e-4", 1e-4),
        ("-.5e3", -500.0),
        ("1_000", 1000),
        ("0x1f", 31),
        ("007", "007"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("~", None),
        ("", None),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_yaml_is_read_as_version_1_2(text, value):
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


#: By hand: what budgets of tokens and of parameters mean.
NUMBERS = {
    "500K": 500_000, "500k": 500_000, "0.4m": 400_000, "2M": 2_000_000, "50b": 50_000_000_000, "10B": 10_000_000_000,
    "4.35B": 4_350_000_000, "1t": 1_000_000_000_000, "15T": 15_000_000_000_000, "4.5e9": 4_500_000_000, "7": 7,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_budgets_are_read_alike_everywhere(text, tmp_path):
    """As an option, as an entry of --set and in a recipe; also in a section that a command reads by itself."""
    correction = f"{{original_learning_rate: 1e-3, num_tokens: {text}}}"
    (tmp_path / "recipe.yaml").write_text(
        f"{{teacher: t, output_dir: o, data: {{train: a, eval: b}}, prune: {{target_parameters: {text}}}, "
        f"teacher_correction: {correction}}}"
    )
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    changed = Recipe.from_yaml(
        tmp_path / "recipe.yaml", [f"prune.target_active_parameters={text}", f"teacher_correction={correction}"]
    )
    search = apply_overrides({}, [f"max_memory_bytes={text}", f"search.num_tokens={text}"])
    found = [
        _number("tokens", text),
        recipe.pruner_config.target_parameters,
        recipe.teacher_correction.num_tokens,
        changed.pruner_config.target_active_parameters,
        changed.teacher_correction.num_tokens,
        search["max_memory_bytes"],
        search["search"]["num_tokens"],
    ]
    assert found == [NUMBERS[text]] * len(found)
    assert {type(one) for one in found} == {int}


@pytest.mark.parametrize("text", ["0.5", "5e-1"])
def test_fractions_stay_fractions(text):
    assert _number("target", text) == apply_overrides({}, [f"target_parameters={text}"])["target_parameters"] == 0.5


@pytest.mark.parametrize("text", ["4.5Q", "k", "-2M", "nan", "infB", "1.2.3M", "0.0001k", "2MB"])
def test_other_numbers_are_refused_by_name(text):
    with pytest.raises(DataError, match=f"^--tokens {text}: expected a number above 0"):
        _number("tokens", text)
    with pytest.raises(DataError, match=f"^prune.target_parameters={text}: expected a number above 0"):
        apply_overrides({}, [f"prune.target_parameters='{text}'"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1MB", 10**6), ("24GB", 24 * 10**9), ("1.5gb", 15 * 10**8), ("2 TB", 2 * 10**12), ("3kB", 3000), ("1B", 10**9)],
)
def test_budgets_of_bytes_take_units(text, expected):
    found = [_number("max_memory_bytes", text)]
    for name in BYTE_BUDGETS:
        found.append(apply_overrides({}, [f"prune.{name}={text}"])["prune"][name])
    assert found == [expected] * 3
    assert {type(one) for one in found} == {int}


@pytest.mark.parametrize("text", ["MB", "-1GB", "nanGB", "1GiB", "0.0001KB"])
def test_other_sizes_are_refused_with_examples_of_bytes(text):
    with pytest.raises(DataError, match=f"^--max-memory-bytes {text}: expected a number of bytes above 0.* 24GB"):
        _number("max_memory_bytes", text)


def test_every_budget_is_an_entry_of_something():
    known = {name for names in section_names().values() for name in names}
    known |= {*CorrectionSection.__dataclass_fields__, *inspect.signature(repaired_weights).parameters}
    assert known >= {*BUDGETS}
    assert {*BUDGETS} >= {*BYTE_BUDGETS} >= {name for name in BUDGETS if name.endswith("bytes")}


def test_what_is_written_is_read_back():
    values = {"a": "no", "b": "1:30", "c": 1e-7, "d": [None, True, "true", "1e3", "007"], "e": {"f": ""}}
    assert read_yaml(write_yaml(values)) == values
    assert yaml.safe_load(write_yaml(values)) == values


@pytest.mark.parametrize("text", ["a: 1\na: 2", "x: {a: 1, a: 1}", "- {a: 1, 'a': 2}", "1: a\n1: b"])
def test_no_key_is_there_twice(text):
    with pytest.raises(DataError, match=r"Line .*there twice"):
        read_yaml(text)


def test_guesses_are_near_or_none():
    known = ["learning_rate", "max_length", "seed"]
    assert did_you_mean(["lerning_rate", "max_len"], known) == " Did you mean 'learning_rate', 'max_length'?"
    assert did_you_mean("SEED", known) == " Did you mean 'seed'?"
    assert did_you_mean("colour", known) == ""


def test_a_module_that_cannot_be_imported_says_why():
    """`from package import name` takes an AttributeError for a missing name."""
    code = (
        "import sys, types\n"
        "sys.modules['minitron_hf.errors'] = types.ModuleType('minitron_hf.errors')\n"
        "import minitron_hf\n"
        "from minitron_hf import MinitronError"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError: minitron_hf.errors cannot be imported" in result.stderr
    assert "ImportError" not in result.stderr
    with pytest.raises(AttributeError):
        _ = minitron_hf.nothing


def test_keys_of_digits_are_integers_and_only_corpora_take_a_source():
    kwargs = {"distill": {"teacher_model_init_kwargs": {"max_memory": {0: "10GB"}}}}
    set_to = apply_overrides(kwargs, ["distill.teacher_model_init_kwargs.max_memory.0=5GB"])
    assert set_to["distill"]["teacher_model_init_kwargs"]["max_memory"] == {0: "5GB"}
    assert apply_overrides({"data": {"train": ["a", "b"]}}, ["data.train.2.weight=3"]) == {
        "data": {"train": ["a", {"source": "b", "weight": 3}]}
    }
    for values, override, words in (
        ({"evaluate": {"prompts": ["x"]}}, "evaluate.prompts.1.a=3", "1 is not a section"),
        (kwargs, "distill.teacher_model_init_kwargs.max_memory.0.a=3", "0 is not a section"),
    ):
        with pytest.raises(DataError, match=words):
            apply_overrides(values, [override])


@pytest.mark.parametrize("key", [1, None, True])
def test_keys_that_are_no_names_are_refused_by_name(key):
    config = pocket_config("llama")
    with pytest.raises(PlanError, match=f"has no {key}"):
        enumerate_shapes(config, {key: [0.5], "hidden_size": [0.5]}, PrunerConfig())
    with pytest.raises(DataError, match=f"teacher_model_init_kwargs takes no {key}"):
        distillation_config(Path("x"), {"teacher_model_init_kwargs": {key: 2, "device_map": "cpu"}}, "distill.")


def test_a_chat_template_is_shared_by_all_rounds(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    given = {"data": {"train": str(tmp_path / "a.txt"), "eval": str(tmp_path / "a.txt")}, "teacher": "t"}
    rounds = [{"prune": {"hidden_size": 0.5}, "distill": {"chat_template_path": "x"}}]
    recipe = Recipe.from_dict(given | {"output_dir": "o", "rounds": rounds})
    with pytest.raises(DataError, match=r"rounds\.1\.distill\.chat_template_path: all rounds.+share one template"):
        check_settings(recipe)
