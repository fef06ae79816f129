"""A small walk through everything, for every set of versions that `setup.cfg` allows (`make ranges`)."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import minitron_hf
from minitron_hf import PrunerConfig, apply_plan, make_plan, prune_checkpoint, prune_model, run_recipe, save_model
from minitron_hf.cli.app import app
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.models import count_parameters, load_model
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.survey import matrix
from pocket import POCKETS, pocket_config, pocket_model, pocket_tokenizer, pocket_tokens

pytestmark = pytest.mark.ranges

TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "ab" for d in "klm"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(pocket_model("llama", dtype=torch.float32), folder, pocket_tokenizer())
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages(minitron_hf.__path__, "minitron_hf."):
        if ".metrics" not in module.name:
            importlib.import_module(module.name)


def test_every_family_counts_as_its_table_says():
    for name in POCKETS:
        model = AutoModelForCausalLM.from_config(pocket_config(name))
        assert count_parameters(model.config) == count_parameters(model), name


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"intermediate_size": 20}),
        ("gpt2", {"intermediate_size": 20}),
        ("mixtral", {"moe_intermediate_size": 8}),
        ("gemma3_text", {"num_hidden_layers": 4}),
    ],
)
def test_student_in_memory_from_disk_and_loaded_by_the_stock_class_are_one(name: str, sizes: dict, tmp_path: Path):
    model = pocket_model(name, dtype=torch.float32)
    save_model(model, tmp_path / "teacher")
    tokens = pocket_tokens(4, 16)
    scores = estimate_importance(model, tokens.tolist())
    plan = make_plan(model, PrunerConfig(**sizes), scores)
    prune_checkpoint(tmp_path / "teacher", tmp_path / "student", plan, show_progress=False)
    student = apply_plan(model, plan)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, student(tokens).logits, rtol=1e-4, atol=1e-4)
        prompt = tokens[:1, :4]
        made = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached, uncached = (student.generate(prompt, use_cache=used, **made) for used in (True, False))
    assert cached.tolist() == uncached.tolist()


def test_a_run_from_the_command_line_leaves_a_published_student(teacher: Path, tmp_path: Path):
    texts = str(teacher / "texts.jsonl")
    recipe = {
        "teacher": str(teacher),
        "data": {"train": texts, "eval": texts},
        "output_dir": str(tmp_path / "run"),
        "prune": {"intermediate_size": 0.5, "num_hidden_layers": 4},
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": {"max_steps": 2, "max_length": 16, "per_device_train_batch_size": 2},
        "evaluate": {"num_rows": 2, "speed": False, "prompts": ["the old"]},
    }
    folder = run_recipe(Recipe.from_dict(recipe), show_progress=False, report=lambda line: None)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert {"teacher", "student"} <= evaluation["models"].keys()
    assert "It loads with Transformers 4.57 and later." in (folder / "README.md").read_text()
    assert load_model(folder).config.num_hidden_layers == 4


def test_an_adapter_is_trained_with_hidden_losses(teacher: Path, tmp_path: Path):
    student = prune_model(str(teacher), PrunerConfig(intermediate_size=40), calibration_data=TEXTS)
    arguments = {
        "activation_checkpointing": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 16,
        "report_to": "none",
    }
    trainer = DistillationTrainer(
        model=student,
        teacher_model=str(teacher),
        args=DistillationConfig(str(tmp_path / "out"), hidden_loss="mse", **arguments),
        train_dataset=minitron_hf.load_text_dataset(str(teacher / "texts.jsonl")),
        processing_class=pocket_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_student(tmp_path / "student")
    assert load_model(tmp_path / "student").config.intermediate_size == 40


@pytest.mark.parametrize("arguments", [["families"], ["families", "llama"], ["run", "--help"], ["prune", "--help"]])
def test_commands_print(arguments: list[str]):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "layers" in result.output or "Options" in result.output


def test_families_that_the_installed_version_lacks_are_marked(monkeypatch: pytest.MonkeyPatch):
    known = set(matrix.CONFIG_MAPPING) - {"llama"}
    monkeypatch.setattr(matrix, "CONFIG_MAPPING", known)
    monkeypatch.setattr(matrix.transformers, "__version__", "5.0")
    remark = "not in Transformers 5.0, which is installed; update it"
    table = matrix.support_matrix()
    assert remark in table.remarks
    [name] = [name for names, _ in table.rows for name in names if re.fullmatch(r"llama[^a-z0-9_ ()-]*", name)]
    assert name != "llama"  # its remark's number
    assert matrix.missing_from_transformers("of-another-package") == ()


def test_the_oldest_constraints_are_the_lower_bounds():
    import ranges

    assert ranges.OLDEST.read_text() == ranges.oldest_constraints()
