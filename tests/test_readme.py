"""What the README and the examples show runs as shown, at pocket size."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from typer.main import get_command

from minitron_hf.cli.app import app
from minitron_hf.distillation import trainer as trainer_module
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_model, pocket_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(
        trainer_module.DistillationTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(self.args.output_dir)
    )
    rows = Dataset.from_dict({"text": TEXTS[:16]})
    names = {
        "teacher": pocket_model("llama", dtype=torch.float32),
        "tokenizer": pocket_tokenizer(),
        "texts": TEXTS,
        "train": rows,
        "val": rows,
    }
    code = blocks("python")
    assert len(code) == 3
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert pushed == ["out"]
    assert names["student"].config.num_hidden_layers == 4  # the last plan: 0.75 of 5 layers
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]["student"]


def test_the_recipe_blocks_are_recipes():
    block, rounds = map(yaml.safe_load, blocks("yaml"))
    recipe = Recipe.from_dict(block)
    assert recipe.pruner_config.hidden_size == 3072
    assert recipe.publish is not None
    twice = Recipe.from_dict({**block, **rounds})
    assert [twice.in_round(number).pruner_config.hidden_size for number in (1, 2)] == [3584, 3072]


def test_commands_exist():
    known = set(get_command(app).commands)
    lines = " ".join(blocks("bash")) + README
    named = set(re.findall(r"minitron-hf ([a-z][a-z-]*)\b", lines)) - {"run"}
    assert named
    assert named <= known
    for recipe in re.findall(r"examples/[\w./-]+\.yaml", lines):
        assert (ROOT / recipe).is_file(), recipe


def test_quickstart_leaves_a_student_with_its_card(tmp_path, monkeypatch):
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    pocket_tokenizer(model_max_length=64).save_pretrained(tmp_path / "teacher")
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "text.jsonl").write_text(lines)
    arguments = [tmp_path / "teacher", tmp_path / "text.jsonl", tmp_path / "text.jsonl", tmp_path / "out", 2]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pruned from" in card
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").glob("*/")), ids=lambda folder: folder.name)
def test_reference_cards_render_again_byte_for_byte(folder):
    from minitron_hf import render_model_card

    assert render_model_card(folder) == (folder / "README.md").read_text(encoding="utf-8")
