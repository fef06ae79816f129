"""Checkpoints: whole ones alone are resumed, no step too many is taken, and none is taken for another training's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, trainer_utils
from trl import SFTConfig, SFTTrainer

from minitron_hf.distillation import checkpoints as checkpoints_module
from minitron_hf.distillation import saving
from minitron_hf.distillation.checkpoints import (
    MANIFEST_NAME,
    checkpoints,
    is_complete,
    last_checkpoint,
    load_renamed,
)
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.errors import HubError, MinitronError, MismatchError, OutputError
from minitron_hf.recipe.training import distill
from pocket import pocket_model, pocket_tokenizer
from test_trainer import make_trainer, models, text_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SETTINGS = {
    "max_steps": 4,
    "max_length": 16,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
}


def distilled(folder: Path, *, student_seed: int = 1, **changes):
    teacher = pocket_model("llama", dtype=torch.float32)
    student = pocket_model("llama", dtype=torch.float32, seed=student_seed, num_hidden_layers=2)
    distill(student, teacher, folder, pocket_tokenizer(), {**SETTINGS, **changes}, text_dataset())
    return weights_of(folder)


def weights_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished distillation: its folder, and the student."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, distilled(folder)


def copy_of(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_a_checkpoint_lists_its_files_and_what_it_was_trained_with(finished):
    [two, four] = checkpoints(finished[0])
    assert (two.name, four.name) == ("checkpoint-2", "checkpoint-4")
    manifest = json.loads((four / MANIFEST_NAME).read_text())
    present = {path.name for path in four.iterdir()} - {MANIFEST_NAME}
    assert manifest["files"] == {name: (four / name).stat().st_size for name in present}
    assert manifest["files"].keys() >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert manifest["trained_with"]["learning_rate"] == 1e-3


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")


@pytest.mark.parametrize("damage", [*FILES, "no optimizer", "no manifest", "half manifest", "no file at all"])
def test_a_torn_checkpoint_is_passed_over_and_removed(finished, tmp_path, damage):
    """Once for each kind of file, by the check; and as a whole, below, by what comes out."""
    folder = copy_of(finished, tmp_path)
    torn = folder / "checkpoint-4"
    if damage in FILES:
        (torn / damage).write_bytes((torn / damage).read_bytes()[:-7])
    elif damage == "half manifest":
        (torn / MANIFEST_NAME).write_bytes((torn / MANIFEST_NAME).read_bytes()[:50])
    elif damage == "no manifest":  # it is empty until all else is written
        (torn / MANIFEST_NAME).write_bytes(b"")
    elif damage == "no file at all":
        shutil.rmtree(torn)
        torn.mkdir()
    else:
        (torn / "optimizer.pt").unlink()
    assert not is_complete(torn)
    assert last_checkpoint(folder) == os.fspath(folder / "checkpoint-2")
    checkpoints_module.remove_incomplete_checkpoints(folder)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]


def test_checkpoints_of_the_stock_trainer_are_left_alone(tmp_path):
    """A training with TRL's trainer is gone on from, and its checkpoint stays, also beyond save_total_limit."""
    options = {"max_length": 16, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    args = SFTConfig(str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, bf16=False, **options)
    student, teacher = models(dtype=torch.float32)
    stock = SFTTrainer(student, args, train_dataset=text_dataset(), processing_class=pocket_tokenizer())
    stock.train()
    files = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    assert files
    (tmp_path / "checkpoint-900").mkdir()  # a torn one
    trainer = make_trainer(tmp_path, student, teacher, text_dataset(), **{**SETTINGS, **options, "max_steps": 4})
    trainer.args.save_steps = trainer.state.save_steps = trainer.args.save_total_limit = 1
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == files


def test_a_checkpoint_is_marked_as_unfinished_from_its_first_file_on(tmp_path, monkeypatch):
    """So that a killed one is never taken for one of the stock trainer."""
    seen = []
    save = Trainer._save_checkpoint

    def watched(self, *args, **kwargs):
        [folder] = checkpoints(tmp_path)
        seen.append({path.name: path.stat().st_size for path in folder.iterdir()})
        save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_checkpoint", watched)
    options = {**SETTINGS, "max_steps": 2}
    make_trainer(tmp_path, *models(dtype=torch.float32), text_dataset(), **options).train()
    assert seen == [{MANIFEST_NAME: 0}]


def test_a_run_behind_a_torn_checkpoint_ends_where_it_would_have(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    (folder / "checkpoint-900").mkdir()  # as `mkdir`
    assert same(distilled(folder), finished[1])
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]


def test_a_named_checkpoint_that_is_torn_is_refused(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    trainer = make_trainer(folder, *models(dtype=torch.float32), text_dataset(), max_steps=4)
    with pytest.raises(OutputError, match="is incomplete"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(OutputError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def without_times(folder: Path):
    values = json.loads((folder / "distillation.json").read_text())
    del values["train_runtime"]
    for entry in values["log_history"]:
        for name in [name for name in entry if name.endswith(("_runtime", "_per_second"))]:
            del entry[name]
    return values


def test_a_finished_run_takes_no_further_step(finished, tmp_path):
    """Constant rates would show one: the weights would be others."""
    folder = copy_of(finished, tmp_path)
    assert same(distilled(folder), finished[1])
    assert without_times(folder) == without_times(finished[0])
    assert json.loads((folder / "distillation.json").read_text())["global_step"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 2e-3}, r"learning_rate: 0.001 → 0.002"),
        ({"temperature": 2.0}, "temperature: 1.0 → 2.0"),
        ({"student_seed": 5}, "other weights of the student"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: constant → cosine"),
        ({"per_device_train_batch_size": 4}, "rows_in_a_step: 2 → 4"),
        ({"optim": "adafactor"}, "optim: adamw_torch → adafactor"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(finished, changes, words):
    before = (finished[0] / "distillation.json").read_bytes()
    with pytest.raises(MismatchError, match=rf"checkpoint-4 belongs to another training: {words}.*output folder"):
        distilled(finished[0], **changes)
    assert (finished[0] / "distillation.json").read_bytes() == before


def test_other_data_or_another_teacher_are_another_training(finished):
    [checkpoint] = [path for path in checkpoints(finished[0]) if path.name == "checkpoint-4"]
    student = pocket_model("llama", dtype=torch.float32, seed=1, num_hidden_layers=2)
    teacher = pocket_model("llama", dtype=torch.float32)
    rows = {**SETTINGS, "save_strategy": "no"}
    trainer = make_trainer(finished[0], student, teacher, text_dataset(), **rows)
    assert trainer.differences(checkpoint) == []
    trainer = make_trainer(finished[0], student, teacher, text_dataset(seed=3), **rows)
    assert trainer.differences(checkpoint) == ["other data"]
    teacher = pocket_model("llama", dtype=torch.float32, seed=9)
    trainer = make_trainer(finished[0], student, teacher, text_dataset(), **rows)
    assert trainer.differences(checkpoint) == ["other weights of the teacher"]


def test_a_constant_schedule_goes_on_for_longer(finished, tmp_path):
    """As a search does, whose rounds double the steps."""
    folder = copy_of(finished, tmp_path)
    longer = distilled(folder, max_steps=6)
    assert same(longer, distilled(tmp_path / "at once", max_steps=6))


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_from(finished, tmp_path):
    """Training on from its weights alone would give other ones, without a word."""
    folder = tmp_path / "run"
    distilled(folder, max_steps=2, save_only_model=True)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert last_checkpoint(folder) is None
    assert same(distilled(folder), finished[1])


def test_rotation_goes_by_steps_though_the_clock_was_set_back(tmp_path, monkeypatch):
    """The stock trainer sorts by the time of modification, and would delete the newer one."""

    class SetBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for path in checkpoints(args.output_dir):
                os.utime(path, (2e9 - 1e6 * state.global_step,) * 2)

    trainer = make_trainer(
        tmp_path,
        *models(dtype=torch.float32),
        text_dataset(),
        callbacks=[SetBack()],
        **{**SETTINGS, "max_steps": 6, "save_total_limit": 2},
    )
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


def test_a_run_that_was_killed_before_it_deleted_the_older_checkpoint_does_so(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    distilled(folder, save_total_limit=1)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4"]


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path, monkeypatch):
    """Its path is in the state; and intervals that are fractions are no other arguments than their steps."""
    warned = []
    monkeypatch.setattr(trainer_utils.logger, "warning", lambda message, *args: warned.append(message))
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl", "greater_is_better": True}
    saves = {"eval_strategy": "steps", "eval_steps": 0.5, "save_steps": 0.5, "logging_steps": 0.5}

    def trainer(folder: Path):
        data = text_dataset()
        return make_trainer(
            folder, *models(dtype=torch.float32), data, eval_dataset=data, **{**SETTINGS, **choice, **saves}
        )

    first = trainer(tmp_path / "first")
    first.train_or_resume()
    assert first.state.best_global_step == 2  # the first is the furthest from the teacher
    moved = trainer(Path(shutil.move(tmp_path / "first", tmp_path / "moved")))
    moved.train_or_resume()
    assert Path(moved.state.best_model_checkpoint) == tmp_path / "moved" / "checkpoint-2"
    assert same(moved.model.state_dict(), first.model.state_dict())
    assert not [message for message in warned if "do not match" in message]


def test_an_older_checkpoint_is_deleted_only_once_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []
    finish = checkpoints_module.CheckpointMixin._write_manifest

    def watched(self, folder, progress):
        seen.append([path.name for path in checkpoints(tmp_path) if is_complete(path)])
        finish(self, folder, progress)

    monkeypatch.setattr(checkpoints_module.CheckpointMixin, "_write_manifest", watched)
    options = {**SETTINGS, "save_total_limit": 1}
    make_trainer(tmp_path, *models(dtype=torch.float32), text_dataset(), **options).train()
    assert seen == [[], ["checkpoint-2"]]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_full_disk_is_one_message_and_the_run_goes_on_once_it_is_freed(finished, tmp_path, monkeypatch):
    save, count = torch.save, 0

    def full(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 5:  # within the second checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="Free space; the same command then resumes"):
        distilled(tmp_path / "run")
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "run") is not None
    assert same(distilled(tmp_path / "run"), finished[1])


def test_a_corrected_teacher_takes_no_further_step_and_refuses_other_settings(tmp_path, capsys):
    def corrected(**changes):
        arguments = {"original_learning_rate": 1e-2, "num_tokens": 4 * 32, "per_device_train_batch_size": 2}
        teacher = pocket_model("llama", dtype=torch.float32)
        fixed = {"max_length": 16, "lr_scheduler_type": "constant", "disable_tqdm": True, "bf16": False}
        correct_teacher(
            teacher,
            text_dataset(),
            tmp_path / "teacher",
            processing_class=pocket_tokenizer(),
            **{**arguments, **fixed, **changes},
        )
        return weights_of(tmp_path / "teacher")

    first = corrected()
    assert "'loss'" not in capsys.readouterr().out  # without bars, the stock trainer prints every log
    assert [path.name for path in checkpoints(tmp_path / "teacher")] == ["checkpoint-4"]
    assert same(corrected(), first)
    assert json.loads((tmp_path / "teacher" / "teacher_correction.json").read_text())["log_history"][-1]["step"] == 4
    with pytest.raises(MismatchError, match=r"learning_rate: 0.002 → 0.004"):
        corrected(original_learning_rate=2e-2)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_resumed_mixture_of_experts_ends_where_it_would_have(tmp_path, family):
    """Their checkpoints store experts one by one, and Mixtral's routers under another name."""

    def trained(folder, **changes):
        teacher, student = (pocket_model(family, dtype=torch.float32, seed=seed) for seed in (0, 1))
        distill(student, teacher, folder, pocket_tokenizer(), {**SETTINGS, **changes}, text_dataset())
        return weights_of(folder)

    whole = trained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert same(trained(tmp_path / "resumed"), whole)
    assert same(trained(tmp_path / "whole"), whole)  # finished: its weights are the last checkpoint's
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl", "greater_is_better": True}
    evaluated = {**best, "eval_strategy": "steps", "eval_steps": 2}
    teacher, student = (pocket_model(family, dtype=torch.float32, seed=seed) for seed in (0, 1))
    settings = {**SETTINGS, **evaluated}
    distill(student, teacher, tmp_path / "best", pocket_tokenizer(), settings, text_dataset(), text_dataset())
    assert same(weights_of(tmp_path / "best"), weights_of(tmp_path / "best" / "checkpoint-2"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors")
    model = pocket_model("llama", dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(MinitronError, match="lacks"):
        load_renamed(model, tmp_path)


def test_a_checkpoint_is_pushed_once_it_is_complete_and_a_failed_push_ends_nothing(tmp_path, monkeypatch, caplog):
    pushed = []

    def push(folder, repo_id, **options):
        pushed.append((Path(folder).name, is_complete(Path(folder)), repo_id))
        raise HubError("the Hub does not answer")

    monkeypatch.setattr(saving, "push_student_to_hub", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/student"))
    options = {**SETTINGS, "push_to_hub": True, "hub_token": "hf_x"}
    trainer = make_trainer(tmp_path, *models(dtype=torch.float32), text_dataset(), **options)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert pushed == [("checkpoint-2", True, "me/student"), ("checkpoint-4", True, "me/student")]
    assert trainer.state.global_step == 4
    assert "step 2 was not pushed, and training goes on: the Hub does not answer" in caplog.text
