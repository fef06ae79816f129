"""What the README and the examples show runs as shown, at pocket size."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from typer.main import get_command

import minitron_hf
from minitron_hf.cli.app import app
from minitron_hf.distillation import trainer as trainer_module
from minitron_hf.families import families, wrapped_families
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_model, pocket_tokenizer, pocket_tokens
from test_cli import minitron

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in path.parts
}
TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Runs the Python blocks of a page in order, and returns their names; pushes are recorded, not made."""
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_dict({"text": TEXTS[:16]})
    names: dict[str, Any] = {
        "teacher": pocket_model("llama", dtype=torch.float32),
        "tokenizer": pocket_tokenizer(),
        "texts": TEXTS,
        "train": rows,
        "val": rows,
        "pushed": [],
    }
    names["student"] = names["teacher"]
    monkeypatch.setattr(
        trainer_module.DistillationTrainer,
        "push_to_hub",
        lambda self, **kwargs: names["pushed"].append(self.args.output_dir),
    )

    def run(page: str, number: int) -> dict[str, Any]:
        code = blocks(page, "python")
        assert len(code) == number
        for block in code:
            exec(compile(block, page, "exec"), names)
        return names

    return run


def test_the_block_of_the_readme_runs(shown):
    names = shown("README.md", 1)
    assert names["pushed"] == ["out"]
    assert names["student"].config.hidden_size < names["teacher"].config.hidden_size


def test_the_blocks_of_the_tutorial_run(shown, tmp_path):
    names = shown("docs/tutorial.md", 3)
    assert names["student"].config.num_hidden_layers == 4  # 0.75 of 5 layers
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]["student"]


def test_the_block_on_teacher_caches_runs(shown, tmp_path):
    names = shown("docs/guides/teacher-cache.md", 1)
    assert names["trainer"].state.global_step > 0
    assert json.loads((tmp_path / "cache" / "teacher_cache.json").read_text())["settings"]["top_k"] == 64


def test_every_python_block_is_run():
    run_here = {"README.md", "docs/tutorial.md", "docs/guides/teacher-cache.md", "docs/guides/measure.md"}
    # In test_contributing and test_outside_families, in test_metric_registry, and in test_divergence_registry.
    run_elsewhere = {"docs/guides/add-a-family.md", "docs/guides/add-a-metric.md", "docs/guides/add-a-divergence.md"}
    run_elsewhere.add("docs/guides/runtimes.md")  # in test_runtimes, on a pruned student
    run_elsewhere.add("docs/guides/images.md")  # in test_images: it needs a vision-language model
    run_elsewhere.add("docs/guides/vocabulary.md")  # in test_vocabulary_pruning: it needs another tokenizer
    run_elsewhere.add("docs/guides/width-or-depth.md")  # in test_basis, on a teacher whose head is tied
    assert {page for page in PAGES if blocks(page, "python")} == run_here | run_elsewhere


def test_the_guide_to_measuring_adds_a_callback_and_drafts(tmp_path, monkeypatch):
    from minitron_hf import MeasurementCallback
    from minitron_hf.evaluation import callback

    monkeypatch.setattr(callback, "require_tasks", lambda *args: None)
    teacher, draft = (pocket_model("llama", dtype=torch.float32, seed=seed) for seed in (0, 1))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(draft, arguments, processing_class=pocket_tokenizer())
    inputs = {"input_ids": pocket_tokens(1, 5), "max_new_tokens": 3}
    names = {"trainer": trainer, "teacher": teacher, "draft": draft, "inputs": inputs, "texts": ["the old man"]}
    for block in blocks("docs/guides/measure.md", "python"):
        exec(block, {"MeasurementCallback": MeasurementCallback, **names})
    assert any(isinstance(one, MeasurementCallback) for one in trainer.callback_handler.callbacks)


def test_the_recipe_blocks_are_recipes():
    """Whole recipes, or sections that a recipe of the README takes."""
    base = yaml.safe_load(blocks("README.md", "yaml")[0])
    recipe = Recipe.from_dict(base)
    assert recipe.pruner_config.hidden_size == 3072
    assert recipe.publish is not None
    shown = [(page, yaml.safe_load(block)) for page in PAGES for block in blocks(page, "yaml")]
    assert len(shown) > 4
    for page, block in shown:
        Recipe.from_dict(block if "teacher" in block else {**base, **block})
        if "rounds" in block:
            twice = Recipe.from_dict({**base, **block})
            assert [twice.in_round(number).pruner_config.hidden_size for number in (1, 2)] == [3584, 3072], page


def test_the_recipe_of_the_readme_is_a_part_of_the_file_that_it_names():
    """Every entry stands in the file with the same value, `publish` as a comment; the text names what is left out."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [named] = set(re.findall(r"minitron-hf run (\S+\.yaml)", readme))
    text, shown = (ROOT / named).read_text(encoding="utf-8"), yaml.safe_load(blocks("README.md", "yaml")[0])
    commented = re.sub(r"(?m)^# ", "", text[text.index("# publish:") :])
    file = yaml.safe_load(text) | yaml.safe_load(commented)
    for name, value in shown.items():
        assert (file[name] | value if isinstance(value, dict) else value) == file[name] or name == "teacher", name
    assert file["teacher"] == shown["teacher"]
    left_out = (file.keys() - shown.keys()) | (file["distill"].keys() - shown["distill"].keys())
    assert left_out >= {"scores", "per_device_train_batch_size", "warmup_steps", "evaluate"}
    assert "it also sets calibration, batches, warm-up and evaluation, and has `publish` as a comment" in readme


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page):
    known = get_command(app).commands
    for line in " ".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        for name, rest in re.findall(r"minitron-hf ([a-z][a-z-]*)([^#;|)]*)", line):
            assert name in known, line
            options = {option for one in known[name].params for option in (*one.opts, *one.secondary_opts)}
            assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= options, line
    named = set(re.findall(r"`minitron-hf ([a-z][a-z-]*)", PAGES[page]))
    assert named <= set(known)
    for recipe in re.findall(r"examples/[\w./-]+\.(?:yaml|py)", PAGES[page]):
        assert (ROOT / recipe).is_file(), recipe
    targets = set(re.findall(r"`make ([a-z-]+)", PAGES[page]))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        if not re.match(r"https?://", link):
            target = (ROOT / page).parent / link
            assert target.exists(), f"{page} links to {link}"


def test_the_reference_pages_are_current(tmp_path):
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    generate["write_generated"](tmp_path)
    for page in ("recipe.md", "configs.md", "cli.md"):
        assert (tmp_path / page).read_text() == PAGES[f"docs/reference/{page}"], "make reference writes it"


def test_the_index_leads_to_every_page():
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"index.md"}
    assert set(re.findall(r"\]\((.+?\.md)\)", PAGES["docs/index.md"])) == pages


def test_the_readme_counts_the_models():
    wrappers = {outer for outer, _ in wrapped_families()}
    said = re.search(
        r"\*\*Models\*\*: (\d+) model types.*?In (\d+)\s+types of models with images or sound",
        PAGES["README.md"],
        re.S,
    )
    assert said, "the line on models changed"
    assert [int(number) for number in said.groups()] == [len(families()), len(wrappers)]
    assert f"on a corpus | {len(families())} |" in PAGES["README.md"]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 12_000


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
def test_reference_cards_render_again_byte_for_byte(folder, tmp_path):
    from minitron_hf import PruningPlan, render_model_card
    from minitron_hf.publishing.report import render_report

    plan = PruningPlan.from_pretrained(folder)  # its two files belong together: the student can be cut again
    assert plan.student["num_parameters"] < plan.teacher["num_parameters"]
    assert render_model_card(folder) == (folder / "README.md").read_text(encoding="utf-8")
    shutil.copytree(folder, tmp_path / folder.name)
    done = minitron("card", tmp_path / folder.name)
    assert done.returncode == 0, done.stderr
    if (folder / "report.html").is_file():
        assert render_report(folder) == (folder / "report.html").read_text(encoding="utf-8")


def test_the_table_of_reference_cards_has_their_numbers():
    rows = [
        line.split(" | ") for line in (ROOT / "model_cards" / "README.md").read_text().splitlines() if "| `" in line
    ]
    assert {row[0].strip("|` ") for row in rows} == {folder.name for folder in (ROOT / "model_cards").glob("*/")}
    for name, _, divergence, share, _ in rows:
        card = (ROOT / "model_cards" / name.strip("|` ") / "README.md").read_text()
        [line] = [line for line in card.splitlines() if line.startswith("| KL(teacher ‖ model), nats per token |")]
        assert line.split("|")[3].strip() == divergence
        assert share == "–" or f"The student keeps {share} of the teacher's average" in card


def test_every_public_name_is_on_the_page_of_the_python_api():
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    listed = set(re.findall(r"minitron_hf\.(\w+)$", page, re.MULTILINE)) | set(vars(minitron_hf.errors))
    assert set(minitron_hf.__all__) - {"__version__"} <= listed
