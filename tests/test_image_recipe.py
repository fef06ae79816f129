"""Conversations about images in recipes and at the command line, against the Python path and by their refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from minitron_hf.data import load_text_dataset
from minitron_hf.distillation.inputs import refuse_image_settings
from minitron_hf.errors import DataError, MinitronError
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.files import read_json
from minitron_hf.models import load_model
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.estimates import estimate_recipe
from minitron_hf.recipe.runner import run_recipe
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from pocket import pocket_model, pocket_tokenizer
from pocket_images import TEMPLATE, image_dataset, image_rows, pocket_image_model, pocket_processor
from test_cli import minitron
from test_images import make_trainer, other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vision-language teacher with its processor; rows as a saved dataset, and as lines that name image files."""
    folder = tmp_path_factory.mktemp("images")
    pocket_image_model(torch.float32).save_pretrained(folder / "teacher")
    pocket_processor().save_pretrained(folder / "teacher")
    image_dataset(6).save_to_disk(folder / "saved")
    (folder / "pictures").mkdir()
    write_lines(folder / "rows.jsonl", image_rows(6))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = []
    for number, row in enumerate(rows):
        name = f"pictures/{path.stem}-{number}.png"
        row["images"][0].save(path.parent / name)
        lines.append(json.dumps({**row, "images": [name]}))
    path.write_text("\n".join(lines))


def values(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    rows = str(folder / "rows.jsonl")
    return {
        "teacher": str(folder / "teacher"),
        "data": {"train": rows, "eval": rows},
        "output_dir": str(output),
        "prune": {"intermediate_size": 0.5, "hidden_size": 24, "repair": "least_squares"},
        "scores": {"num_rows": 6, "max_length": 64},
        "distill": {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2},
        "evaluate": {"speed": False, "max_length": 64},
        **changes,
    }


def run(settings: dict[str, Any]) -> Path:
    return run_recipe(Recipe.from_dict(settings), show_progress=False, report=lambda line: None)


def test_files_name_images_beside_them(folder):
    found, saved = load_text_dataset(str(folder / "rows.jsonl")), load_text_dataset(str(folder / "saved"))
    assert len(found) == len(saved) == 6
    for one, same in zip(found, saved):
        assert one["images"][0].tobytes() == same["images"][0].tobytes()


@pytest.mark.slow
def test_lines_without_images_may_come_first(folder, tmp_path):
    """The first lines have no entry `images`; recipes and commands count and train on the others."""
    alone = {
        "messages": [{"role": role, "content": [{"type": "text", "text": "Hi"}]} for role in ("user", "assistant")]
    }
    lines = [json.dumps(alone)] * 2 + (folder / "rows.jsonl").read_text().splitlines()
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = str(tmp_path / "rows.jsonl")
    assert [len(row["images"]) for row in load_text_dataset(rows)] == [0, 0, 1, 1, 1, 1, 1, 1]
    settings = values(folder, tmp_path / "run", data={"train": rows, "eval": rows})
    check_recipe(Recipe.from_dict(settings))
    assert read_json(run(settings) / "evaluation.json")["data"]["num_rows"] == 8


def test_a_recipe_is_the_python_path(folder, tmp_path):
    """Scores and measurements are those of the same calls in Python; the student loads with its processor."""
    settings = values(folder, tmp_path / "run")
    check_recipe(Recipe.from_dict(settings))
    made = run(settings)
    teacher, processor, rows = load_model(folder / "teacher"), pocket_processor(), image_dataset(6)
    read = {"processing_class": processor, "max_length": 64, "show_progress": False}
    expected = estimate_importance(teacher, rows, num_rows=6, **read)
    found = ImportanceScores.from_pretrained(made)
    torch.testing.assert_close(found.axes["ffn"], expected.axes["ffn"], rtol=1e-4, atol=1e-6)
    measured = evaluate_models({"teacher": teacher, "student": load_model(made)}, rows, speed=False, **read)
    for name in ("teacher", "student"):
        loss = measured["models"][name]["metrics"]["loss"]["value"]
        stored = read_json(made / "evaluation.json")["models"][name]["metrics"]["loss"]["value"]
        assert stored == pytest.approx(loss, rel=1e-4)
    for student in (made, made / "pruned"):
        assert (student / "processor_config.json").is_file()
    trained = read_json(made / "distillation.json")
    assert trained["global_step"] == 2
    assert trained["arguments"]["packing"] is False
    before, after = (load_file(path / "model.safetensors") for path in (made / "pruned", made))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.slow
def test_blends_targets_rounds_and_controls_read_images(folder, tmp_path):
    saved, lines = str(folder / "saved"), str(folder / "rows.jsonl")
    settings = values(folder, tmp_path / "run")
    settings |= {
        "data": {"train": [lines, lines], "eval": lines, "calibration": saved},
        "prune": {"target_parameters": 0.97, "multiple_of": 1},
        "controls": ["random_pruning", "random_init"],
    }
    check_recipe(Recipe.from_dict(settings))
    made = run(settings)
    assert set(read_json(made / "evaluation.json")["models"]) >= {"student", "random_pruning", "random_init"}
    rounds = [{"prune": {"intermediate_size": 0.75}}, {"prune": {"intermediate_size": 0.5}}]
    made = run({**values(folder, tmp_path / "rounds", rounds=rounds), "prune": {}})
    assert (made / "rounds" / "1" / "processor_config.json").is_file()
    settings = values(folder, tmp_path / "searched")
    settings |= {
        "prune": {},
        "search": {
            "space": {"intermediate_size": [0.5, 0.75]},
            "max_parameters": 90_000,
            "tolerance": 0.5,
            "num_candidates": 1,
            "num_rounds": 1,
            "num_tokens": 64,
        },
        "teacher_correction": {"original_learning_rate": 1e-4, "num_tokens": 128, "arguments": {"max_length": 64}},
    }
    check_recipe(Recipe.from_dict(settings))
    assert (run(settings) / "evaluation.json").is_file()


def test_the_command_line_reads_images(folder, tmp_path):
    teacher, rows = folder / "teacher", folder / "rows.jsonl"
    length = ("--set", "max_length=64")
    steps = [
        ("score", teacher, "--data", rows, "-o", tmp_path / "scores", *length),
        (
            *("plan", teacher, "--scores", tmp_path / "scores", "--intermediate-size", "0.5", "-o", tmp_path / "plan"),
            *("--set", "repair=least_squares"),
        ),
        ("prune", teacher, "--plan", tmp_path / "plan", "--data", rows, "-o", tmp_path / "pruned", *length),
        (
            *("distill", tmp_path / "pruned", "--teacher", teacher, "--train-data", rows, "--eval-data", rows),
            *("-o", tmp_path / "student", "--set", "max_steps=1", *length),
        ),
        (
            *("evaluate", f"teacher={teacher}", f"student={tmp_path / 'student'}", "--data", rows),
            *("-o", tmp_path / "measured", "--set", "speed=false", *length),
        ),
    ]
    for step in steps:
        done = minitron(*step)
        assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "measured" / "evaluation.json")["models"]["student"]["metrics"]["kl_divergence"]
    assert (tmp_path / "student" / "processor_config.json").is_file()


@pytest.mark.slow
def test_a_cache_is_the_teacher_in_recipes_and_at_the_command_line(folder, tmp_path):
    """With k = vocabulary size, all ways to train end with the same weights."""
    training = {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2, "bf16": False}
    settings = values(folder, tmp_path / "run", distill=training, teacher_cache={"top_k": 97, "dtype": "float32"})
    check_recipe(Recipe.from_dict(settings))
    made = run(settings)
    rows, options = folder / "rows.jsonl", [f"--set={name}={json.dumps(value)}" for name, value in training.items()]
    cache, start = tmp_path / "cache", ("distill", made / "pruned", *options)
    from_cache = ("--train-data", cache, "--train-images", rows, "-o", tmp_path / "cached")
    steps = [
        (*start, "--teacher", folder / "teacher", "--train-data", rows, "-o", tmp_path / "online"),
        ("cache", folder / "teacher", "--data", rows, "-o", cache, "--top-k", 97, "--dtype", "float32", *options),
        (*start, *from_cache),
    ]
    for step in steps:
        done = minitron(*step)
        assert done.returncode == 0, done.stderr
    weights = [load_file(path / "model.safetensors") for path in (tmp_path / "online", tmp_path / "cached", made)]
    for name, value in weights[0].items():
        for others in weights[1:]:
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)
    for options, words in (
        (from_cache[:2], "Pass the corpus too"),
        ((*from_cache[:3], folder / "teacher"), "is the folder of a model"),
    ):
        done = minitron(*start, *options, "-o", tmp_path / "refused")
        assert done.returncode == 2
        assert words in " ".join(done.stderr.split())


@pytest.mark.slow
def test_the_costs_name_what_they_leave_out(folder, tmp_path):
    estimate = estimate_recipe(Recipe.from_dict(values(folder, tmp_path / "run")))
    assert any("what reading the images takes" in note for note in estimate.notes)
    assert all(one.seconds == one.seconds for one in estimate.stages)


# Refusals, the same before and in the run


def bad_lines(folder: Path, tmp_path: Path, number: int, change: Any) -> Path:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[number] = json.dumps(change(json.loads(lines[number])))
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def two_images(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": row["images"] * 2}


def no_picture(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": ["pictures/none.png"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [(two_images, r"There are 2 image\(s\) and 1 part\(s\)"), (no_picture, r"An image cannot be read: .*none\.png")],
)
def test_bad_rows_are_named_by_the_dry_run_and_by_training(folder, tmp_path, change, message):
    rows = bad_lines(folder, tmp_path, 3, change)
    settings = values(folder, tmp_path / "run", data={"train": str(rows), "eval": str(folder / "rows.jsonl")})
    with pytest.raises(DataError, match=rf"data\.train: .*Row 3 .*{message}"):
        check_recipe(Recipe.from_dict(settings))
    teacher = load_model(folder / "teacher")
    data = load_text_dataset(str(rows))
    trainer = make_trainer(tmp_path / "out", other(teacher), teacher, data, pocket_processor(), max_steps=3)
    with pytest.raises(DataError, match=rf"Row 3 \(counted from 0\) of the train dataset: {message}"):
        trainer.train()
    with pytest.raises(DataError, match=rf"Row 3 \(counted from 0\) of the eval dataset: {message}"):
        trainer.evaluate()


def test_a_first_image_that_cannot_be_read_is_named(folder, tmp_path):
    rows = bad_lines(folder, tmp_path, 0, no_picture)
    done = minitron("score", folder / "teacher", "--data", rows, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "Row 0 (counted from 0): An image cannot be read" in done.stderr
    teacher = load_model(folder / "teacher")
    with pytest.raises(DataError, match=r"Row 0 .* of the train dataset: An image cannot be read"):
        make_trainer(tmp_path / "o", other(teacher), teacher, load_text_dataset(str(rows)), pocket_processor())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"max_steps": 1, "packing": True}}, r"distill\.packing: rows with images are not packed"),
        ({"distill": {"max_steps": 1, "padding_free": True}}, r"padding_free: rows with images are not packed"),
        ({"distill": {"max_steps": 1, "max_length": 7}}, r"The images of a row end at token 9, .* at most 7"),
        ({"scores": {"max_length": 8}}, r"The images of a row end at token 9, .* at most 8"),
        ({"teacher_cache": {"server": "http://127.0.0.1:9"}}, "The data holds images, and a server is sent tokens"),
        ({"distill": {"max_steps": 1, "assistant_only_loss": True}}, "can be found only by"),
    ],
)
def test_settings_that_images_exclude_are_refused_before_the_run(folder, tmp_path, changes, message):
    settings = values(folder, tmp_path / "run", **changes)
    with pytest.raises(MinitronError, match=rf"data\.train: .*{message}"):
        check_recipe(Recipe.from_dict(settings))


def test_ends_of_rows_cannot_be_kept():
    with pytest.raises(DataError, match="truncation_mode='keep_end': images stand at the beginning"):
        refuse_image_settings({"truncation_mode": "keep_end"})


def test_models_and_folders_that_cannot_read_images_are_refused(folder, tmp_path):
    rows = str(folder / "rows.jsonl")
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "text")
    pocket_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / "text")
    pocket_image_model(torch.float32).save_pretrained(tmp_path / "bare")
    pocket_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / "bare")
    for teacher, message in (
        ("text", r"holds images, and the model .*\(llama\) reads text alone"),
        ("bare", r"processor|reads text alone"),
    ):
        settings = values(folder, tmp_path / "run", teacher=str(tmp_path / teacher))
        with pytest.raises(MinitronError, match=message.replace("the model", "the teacher")):
            check_recipe(Recipe.from_dict(settings))
        done = minitron("score", tmp_path / teacher, "--data", rows, "-o", tmp_path / "out")
        assert done.returncode == 2, done.stderr
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a cat and a dog"}))
    settings = values(folder, tmp_path / "run", data={"train": str(texts), "eval": rows})
    with pytest.raises(DataError, match=r"data\.eval has images, data\.train has none"):
        check_recipe(Recipe.from_dict(settings))
    settings = values(folder, tmp_path / "run", data={"train": [str(texts), rows], "eval": rows})
    with pytest.raises(DataError, match=r"holds texts, and data\.train\.2 holds conversations with images"):
        check_recipe(Recipe.from_dict(settings))


def test_blends_keep_the_images(folder):
    from minitron_hf.recipe.run import Run

    settings = values(folder, folder / "blend", data={"train": [str(folder / "saved")] * 2, "eval": "none"})
    data = Run(Recipe.from_dict(settings)).dataset("train")
    assert isinstance(data, Dataset)
    assert set(data.column_names) == {"messages", "images"}
    assert data[0]["images"][0].size == (24, 20)
