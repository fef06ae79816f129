"""The run folder: stages leave files, skip what is done, refuse what does not fit, and resume."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from minitron_hf.data import token_rows
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.errors import DataError, MismatchError, OutputError, PlanError, UnsupportedModelError
from minitron_hf.formats import without_new_defaults
from minitron_hf.models import count_parameters, load_model
from minitron_hf.progress import progress_bars
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.publishing.card import write_model_card
from minitron_hf.publishing.hub import uploaded_files
from minitron_hf.publishing.readme import END_OF_CARD
from minitron_hf.recipe import environment, runner, stages, training
from minitron_hf.recipe import run as run_module
from minitron_hf.recipe.actions import search_arguments
from minitron_hf.recipe.identity import FIELDS_OF
from minitron_hf.recipe.run import Run
from minitron_hf.recipe.schema import Recipe
from minitron_hf.recipe.stages import STAGES
from minitron_hf.recipe.usage import Usage
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_config, pocket_model, pocket_tokenizer

TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with a pocket teacher, its tokenizer and two corpora."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = pocket_tokenizer()
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for name, texts in (("train", TEXTS), ("eval", TEXTS[::7])):
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def values(workshop, tmp_path):
    return {
        "teacher": str(workshop / "teacher"),
        "data": {"train": str(workshop / "train.jsonl"), "eval": str(workshop / "eval.jsonl")},
        "output_dir": str(tmp_path / "run"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": {"max_steps": 4, "max_length": 16, "per_device_train_batch_size": 2},
        "evaluate": {"num_rows": 4, "speed": False, "prompts": ["the old"]},
    }


def run(values, **kwargs):
    lines: list[str] = []
    folder = runner.run_recipe(Recipe.from_dict(values), show_progress=False, report=lines.append, **kwargs)
    return folder, lines


def test_a_run_leaves_a_repository_and_is_skipped_the_second_time(values):
    values["distill"]["freeze_embeddings"] = True
    folder, lines = run({**values, "controls": ["random_pruning", "random_init", "cross_entropy"]})
    assert not any("skipped" in line for line in lines)
    published = set(uploaded_files(folder))
    assert published >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "scores.safetensors",
        "pruner_config.json",
        "pruning_plan.json",
        "pruning_plan.safetensors",
        "distillation.json",
        "evaluation.json",
        "samples.json",
        "teacher.json",
        "recipe.yaml",
        "README.md",
        "plots/training.png",
        "plots/importance.png",
    }
    assert not [name for name in published if name.startswith(("pruned", "controls", "stages", "checkpoint"))]
    student = AutoModelForCausalLM.from_pretrained(folder)
    plan = json.loads((folder / "pruning_plan.json").read_text())
    assert sum(p.numel() for p in student.parameters()) == plan["student"]["num_parameters"]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation["models"]) == [
        "teacher",
        "pruned",
        "student",
        "random_pruning",
        "random_init",
        "cross_entropy",
    ]
    for name, freezes in (("random_pruning", True), ("random_init", False)):  # random embeddings are trained
        record = json.loads((folder / "controls" / name / "distillation.json").read_text())
        assert record["arguments"]["freeze_embeddings"] == freezes
    sizes = {values["num_parameters"] for name, values in evaluation["models"].items() if name != "teacher"}
    assert sizes == {plan["student"]["num_parameters"]}

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    _, lines = run({**values, "controls": ["random_pruning", "random_init", "cross_entropy"]})
    assert all("skipped" in line for line in lines)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}

    # What decides memory and speed alone does not repeat a training; what decides the student does.
    digests = runner.stage_digests(Recipe.from_dict(values), folder)
    for setting in ({"activation_checkpointing": True}, {"per_device_eval_batch_size": 1}, {"logging_steps": 2}):
        changed = Recipe.from_dict({**values, "distill": {**values["distill"], **setting}})
        assert runner.stage_digests(changed, folder) == digests
    slower = Recipe.from_dict({**values, "distill": {**values["distill"], "learning_rate": 1e-5}})
    assert runner.stage_digests(slower, folder)["distill"] != digests["distill"]


def recorded(values, status="running"):
    """The digests of a recipe, after its stages have written their records as the runner does."""
    recipe, folder = Recipe.from_dict(values), Path(values["output_dir"])
    folder.mkdir(exist_ok=True)
    digests = runner.stage_digests(recipe, folder)
    for stage in runner.stages_until(recipe):
        runner._write_record(folder, stage, recipe, digests[stage.name], status, Usage())
    return digests


def with_distill(values, **settings):
    return {**values, "distill": {**values["distill"], **settings}}


def earlier_arguments(arguments, num_processes=1):
    """The settings of a training as earlier versions recorded them."""
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows = arguments.get(batches[0], 8) * arguments.get(batches[1], 1) * num_processes
    return {**{name: value for name, value in arguments.items() if name not in batches}, "rows_in_a_step": rows}


def test_a_stage_that_goes_on_with_other_running_settings_keeps_its_digest(values, monkeypatch):
    """Its record says what it began with: with later settings beside it, the digest could not be made again."""
    with monkeypatch.context() as older:
        older.setattr(stages, "deciding_arguments", earlier_arguments)
        begun = recorded(values)
    for settings in ({"logging_steps": 2, "activation_checkpointing": True}, {"logging_steps": 2}, {"save_steps": 3}):
        changed = with_distill(values, **settings)
        assert recorded(changed) == begun
        assert recorded(changed, "done") == begun
    assert recorded(values) == begun


@pytest.mark.parametrize("of_earlier_version", [False, True])
def test_a_search_is_not_repeated_because_of_the_memory_and_speed_of_its_training(
    values, monkeypatch, of_earlier_version
):
    search = {"space": {"intermediate_size": [0.25, 0.5]}, "max_parameters": 1e9, "num_tokens": 64}
    values |= {"prune": {}, "search": search}
    with monkeypatch.context() as older:
        if of_earlier_version:
            older.setattr(stages, "_search_settings", search_arguments)
        begun = recorded(values, "done")

    def digests(**settings):
        return runner.stage_digests(Recipe.from_dict(with_distill(values, **settings)), Path(values["output_dir"]))

    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for settings in (split, {"activation_checkpointing": True}, {"dataloader_num_workers": 1}, {"max_eval_rows": 3}):
        assert digests(**settings) == begun, settings
    for settings in ({"temperature": 2.0}, {"per_device_train_batch_size": 4}):
        changed = digests(**settings)
        assert [name for name in begun if changed[name] != begun[name]][:2] == ["search", "plan"]


@pytest.mark.parametrize("of_earlier_version", [False, True])
def test_the_rows_in_a_step_decide_the_corrected_teacher_however_they_are_split(
    values, monkeypatch, of_earlier_version
):
    """As many processes make as many rows; a record of an earlier version is taken for one of one process."""
    monkeypatch.setattr(stages, "require_launchable", lambda config, num_processes: num_processes)
    section = {"original_learning_rate": 1e-3, "num_tokens": 96}

    def recipe(num_processes=1, **arguments):
        several = {"distributed": {"config": "ddp", "num_processes": num_processes}} if num_processes > 1 else {}
        correction = {**section, "arguments": arguments} if arguments else section
        return Recipe.from_dict({**values, **several, "teacher_correction": correction})

    def digest_of(*args, **arguments):
        return runner.stage_digests(recipe(*args, **arguments), Path(values["output_dir"]))["correct"]

    with monkeypatch.context() as older:
        if of_earlier_version:
            older.setattr(stages, "_correction_settings", lambda recipe: asdict(recipe.teacher_correction))
        begun = recorded({**values, "teacher_correction": section})["correct"]
    assert digest_of(1) == begun
    assert digest_of(1, logging_steps=2) == begun
    assert digest_of(2) != begun
    assert digest_of(2, per_device_train_batch_size=4) == begun
    assert digest_of(1, per_device_train_batch_size=2, gradient_accumulation_steps=4) == begun
    assert digest_of(1, per_device_train_batch_size=4) != begun


def test_digests_do_not_depend_on_secrets_and_on_where_results_are_published(values):
    values["teacher_correction"] = {"original_learning_rate": 1e-3, "num_tokens": 64}
    before = runner.stage_digests(Recipe.from_dict(values))
    hub = {"push_to_hub": True, "hub_token": "hf_x", "hub_model_id": "me/x", "hub_revision": "b", "report_to": "wandb"}
    values["distill"] |= {**hub, "teacher_model_init_kwargs": {"token": "hf_x"}}
    values["teacher_correction"]["arguments"] = {"hub_token": "hf_x"}
    recipe = Recipe.from_dict(values)
    distill = next(stage for stage in runner.stages_of(recipe) if stage.name == "distill")
    assert distill.dependencies(recipe)["distill"]["teacher_model_init_kwargs"] == {}
    del values["distill"]["teacher_model_init_kwargs"]
    assert runner.stage_digests(Recipe.from_dict(values)) == before
    values["distill"]["max_steps"] += 1
    changed = runner.stage_digests(Recipe.from_dict(values))
    assert [name for name in before if changed[name] != before[name]] == ["distill", "evaluate", "card"]


def test_a_quiet_run_hides_the_bars_of_other_libraries(capfd):
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def shown():
        return (
            logging.is_progress_bar_enabled(),
            not datasets.are_progress_bars_disabled(),
            not are_progress_bars_disabled(),
        )

    before = shown()
    with progress_bars(False):
        assert shown() == (False, False, False)
        list(logging.tqdm(range(3)))
    assert capfd.readouterr().err == ""
    assert shown() == before
    with progress_bars(True):
        assert shown() == before


def test_until_stops_and_the_rest_follows_later(values):
    folder, lines = run(values, until="plan")
    assert [line.split("]")[0] for line in lines] == ["[score", "[plan"]
    assert not (folder / "pruned").exists()
    _, lines = run(values, until="prune")
    assert ["skipped" in line for line in lines] == [True, True, False]
    costs = json.loads((folder / "costs.json").read_text())  # the last stage, too
    assert [one["stage"] for one in costs["stages"]] == ["score", "plan", "prune"]


def test_a_run_of_a_version_with_fewer_settings_goes_on(values, monkeypatch):
    """A setting that the record lacks and that has its default is no change; with another value, it is one."""
    values["scores"]["depth_metric"] = "perplexity"  # then scores depend on the sizes
    whole = PrunerConfig.to_dict

    def earlier(self: PrunerConfig) -> dict:
        return {name: value for name, value in whole(self).items() if name not in ("portable", "nonuniform_sizes")}

    with monkeypatch.context() as older:
        older.setattr(PrunerConfig, "to_dict", earlier)
        run(values, until="plan")
    assert all("skipped" in line for line in run(values, until="plan")[1])
    _, lines = run(values, until="prune")
    assert ["skipped" in line for line in lines] == [True, True, False]
    values["prune"]["portable"] = True
    with pytest.raises(MismatchError, match=r"\(prune.portable: None → True\)"):
        run(values, until="plan")


def test_settings_of_data_that_a_record_lacks_are_no_change():
    now = {
        "data": {"source": "x", "split": "train", "parts": [{"num_rows": None, "weight": 2}]},
        "other": {"split": 1},
    }
    then = {"data": {"source": "x", "parts": [{"weight": 2}]}, "other": {}}
    assert without_new_defaults(now, then, FIELDS_OF) == {**then, "other": {"split": 1}}
    changed = {"data": {**now["data"], "split": "test"}}
    assert without_new_defaults(changed, then, FIELDS_OF)["data"]["split"] == "test"


@pytest.mark.either_cpu
def test_the_student_is_cut_without_loading_the_teacher(values, monkeypatch):
    folder, _ = run(values, until="plan")
    monkeypatch.delattr(run_module, "load_for_compute")
    run(values, until="prune")
    expected = apply_plan(load_model(values["teacher"]), PruningPlan.from_pretrained(folder))
    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), expected.parameters()))


@pytest.mark.either_cpu
def test_a_narrower_dtype_is_for_computing_alone(values):
    """A recipe that computes in bfloat16 cuts the float32 weights that are stored, whole and in the plan's name."""
    values["teacher"] = {"model": values["teacher"], "dtype": "bfloat16"}
    folder, _ = run(values, until="prune")
    teacher, plan = load_model(values["teacher"]["model"]), PruningPlan.from_pretrained(folder)
    expected = apply_plan(teacher, plan)  # refused where the plan is of other weights
    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    for (name, found), wanted in zip(pruned.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted), name


@pytest.mark.either_cpu
def test_a_repair_is_part_of_the_run(values):
    """The student is the plan's with the projections refitted on the rows that were scored, and everything says so."""
    values["prune"]["repair"] = "least_squares"
    folder, _ = run(values, until="prune")
    teacher, plan = load_model(values["teacher"]), PruningPlan.from_pretrained(folder)
    rows = token_rows(TEXTS, pocket_tokenizer(), max_length=16, num_rows=8)
    expected = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, rows))
    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    for (name, found), wanted in zip(pruned.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)
    write_model_card(folder)
    assert "Least-squares repair: projections" in (folder / "README.md").read_text()
    streamed, _ = run({**values, "stream_weights": True, "output_dir": str(folder) + "-streamed"}, until="prune")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (streamed / "pruned" / name).read_bytes() == (folder / "pruned" / name).read_bytes(), name
    with pytest.raises(MismatchError, match=r"prune\.repair: least_squares → None"):
        run({**values, "prune": {"intermediate_size": 0.5}}, until="prune")


def test_a_changed_recipe_is_refused_before_any_work_and_redone_on_request(values):
    folder, _ = run(values, until="prune")
    changed = {**values, "prune": {"intermediate_size": 0.25}}
    with pytest.raises(MismatchError, match=r"prune\.intermediate_size: 0\.5 → 0\.25.*--redo"):
        run(changed, until="prune")
    old = (folder / "pruned" / "model.safetensors").stat().st_size
    _, lines = run(changed, until="prune", redo=True)
    assert ["skipped" in line for line in lines] == [True, False, False]
    assert (folder / "pruned" / "model.safetensors").stat().st_size < old


def test_redo_until_a_stage_leaves_no_results_of_the_former_student(values):
    """They would lie beside the new one, and be pushed with it."""
    recorded(values, "done")
    folder = Path(values["output_dir"])
    results = ("evaluation.json", "samples.json", "README.md", "report.html")
    for name in results:
        (folder / name).write_text(f"{{}}\n{END_OF_CARD}\n" if name == "README.md" else "{}")
    changed = Recipe.from_dict(with_distill(values, learning_rate=5e-4))

    def clear(recipe):
        digests = runner.stage_digests(recipe, folder)
        runner._clear_unfinished(folder, runner.stages_until(recipe, "plan"), recipe, digests)
        return {name for name in results if (folder / name).exists()}

    assert clear(Recipe.from_dict(values)) == set(results), "with the same inputs they are up to date"
    assert clear(changed) == set()
    assert not (folder / "stages" / "evaluate.json").exists()


def test_what_the_owner_wrote_beside_the_card_stays_when_it_is_made_anew(values):
    folder = Path(values["output_dir"])
    [card] = [stage for stage in STAGES if stage.name == "card"]
    (folder / "plots").mkdir(parents=True)
    for name in ("training.png", "mine.png"):
        (folder / "plots" / name).touch()
    for text, left in (
        (f"# Card\n\n{END_OF_CARD}\nMine.\n", f"{END_OF_CARD}\nMine.\n"),
        (f"# Card\n\n{END_OF_CARD}\n", None),
        ("Not of this package.\n", "Not of this package.\n"),
    ):
        (folder / "README.md").write_text(text)
        runner._clear(folder, card)
        path = folder / "README.md"
        assert (path.read_text() if path.exists() else None) == left
    assert [path.name for path in (folder / "plots").iterdir()] == ["mine.png"]


@pytest.mark.slow
def test_redo_leaves_nothing_of_what_the_recipe_no_longer_has(values):
    space = {"space": {"intermediate_size": [0.25, 0.5]}, "max_parameters": 1e9, "tolerance": 1.0}
    search = {**space, "num_candidates": 1, "num_rounds": 1, "num_tokens": 32}
    folder, _ = run({**values, "prune": {}, "search": search})
    gone = [folder / name for name in ("search.json", "stages/search.json", "plots/search.png")]
    assert all(path.is_file() for path in gone)
    run(values, redo=True)
    assert not any(path.exists() for path in gone)
    assert (folder / "plots" / "training.png").is_file()
    assert "search" not in [one["stage"] for one in json.loads((folder / "costs.json").read_text())["stages"]]
    assert "were compared by KL" not in (folder / "README.md").read_text()


def test_text_that_the_recipe_now_reads_and_copies_made_by_hand_are_no_leftovers(values, tmp_path):
    folder = tmp_path / "run"
    for name in ("generated", "teacher_cache", "quantized", "stages"):
        (folder / name).mkdir(parents=True)
    for stage in ("generate", "cache"):
        (folder / "stages" / f"{stage}.json").write_text("{}")
    values["data"]["train"] = str(folder / "generated")
    runner._clear_unwanted(folder, Recipe.from_dict(values))
    assert sorted(path.name for path in folder.iterdir()) == ["generated", "quantized", "stages"]
    assert [path.name for path in (folder / "stages").iterdir()] == ["generate.json"]


def test_a_stage_whose_output_is_gone_is_done_again(values):
    folder, _ = run(values, until="plan")
    (folder / "pruning_plan.json").unlink()
    _, lines = run(values, until="plan")
    assert ["skipped" in line for line in lines] == [True, False]


@pytest.mark.parametrize("number", [None, 99])
def test_a_stage_whose_files_cannot_be_read_is_not_skipped(values, number):
    folder, _ = run(values, until="prune")
    path = folder / "pruning_plan.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "format"}
    path.write_text(json.dumps(content if number is None else {"format": number, **content}))
    shapes = []
    with pytest.raises(
        MismatchError, match=r"stage 'plan'.*pruning_plan\.json has (no )?format.*`minitron-hf plan`.*--redo"
    ):
        run(values, until="prune", report_shapes=shapes.append)
    with pytest.raises(MismatchError, match="--redo"):
        runner.try_recipe(Recipe.from_dict(values), until="prune")
    assert not shapes  # nothing is announced before the refusal
    _, lines = run(values, until="prune", redo=True)
    assert ["skipped" in line for line in lines] == [True, False, False]


@pytest.mark.parametrize("share", [0, 0.9])
@pytest.mark.parametrize(("stage", "name"), [("prune", "pruned/model.safetensors"), ("distill", "model.safetensors")])
def test_a_finished_stage_whose_weights_are_cut_is_not_skipped(values, stage, name, share):
    """As a power cut leaves them."""
    recorded(values, "done")
    recipe, folder = Recipe.from_dict(values), Path(values["output_dir"])
    digests, path = runner.stage_digests(recipe, folder), folder / name
    path.parent.mkdir(exist_ok=True)
    save_file({"weight": torch.ones(9)}, path)
    runner._require_usable(folder, runner.stages_until(recipe), recipe, digests)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(MismatchError, match=rf"stage '{stage}' cannot be skipped: .*{name} is damaged.*--redo"):
        runner._require_usable(folder, runner.stages_until(recipe), recipe, digests)
    runner._clear_unfinished(folder, runner.stages_until(recipe, stage), recipe, digests)
    assert not path.exists()
    assert not (folder / "stages" / f"{stage}.json").exists()


def test_a_killed_distillation_resumes_and_ends_where_an_uninterrupted_one_ends(values, tmp_path):
    values["distill"] = {**values["distill"], "max_steps": 8, "save_steps": 2, "eval_strategy": "no", "bf16": False}
    whole, _ = run(values, until="distill")
    broken = {**values, "output_dir": str(tmp_path / "broken")}
    run(broken, until="prune")
    # A process of its own, killed inside the training loop right after the checkpoint of step 4.
    script = f"""
import os, json
from transformers import TrainerCallback
from minitron_hf.recipe import runner
from minitron_hf.progress import progress_bars
from minitron_hf.distillation import trainer
from minitron_hf.recipe.schema import Recipe
from minitron_hf.recipe.stages import STAGES
from minitron_hf.pruning.repair import repaired_weights
class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os._exit(9)
original = trainer.DistillationTrainer.__init__
def patched(self, *args, **kwargs):
    original(self, *args, **kwargs)
    self.add_callback(Kill())
trainer.DistillationTrainer.__init__ = patched
runner.run_recipe(Recipe.from_dict(json.loads({json.dumps(json.dumps(broken))})), until="distill", show_progress=False)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr
    folder = Path(broken["output_dir"])
    assert list(folder.glob("checkpoint-*"))
    assert not (folder / "config.json").exists(), "an interrupted run must not look like a student"
    record = folder / "stages" / "distill.json"
    last = max(path.stat().st_mtime for path in folder.glob("checkpoint-*/*"))
    os.utime(record, (last - 1000, last - 1000))  # as if it had taken 1,000 seconds
    run(broken, until="distill")
    assert 1000 < json.loads(record.read_text())["seconds"] < 1100, "the time of a resumed stage is that of all parts"
    resumed = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    for name, tensor in expected.items():
        assert tensor.equal(resumed[name]), name


@pytest.mark.slow
def test_a_search_decides_the_sizes_and_is_not_done_twice(values):
    values |= {
        "prune": {"num_attention_heads": 6},
        "search": {
            "space": {"intermediate_size": [0.25, 0.5], "num_hidden_layers": [3, 4]},
            "max_parameters": 1e9,
            "tolerance": 1.0,
            "num_candidates": 2,
            "num_rounds": 1,
            "num_tokens": 32,
        },
    }
    shapes = runner.check_recipe(Recipe.from_dict(values))
    folder, lines = run(values, until="plan")
    assert [line.split("]")[0] for line in lines] == ["[score", "[search", "[plan"]
    found = json.loads((folder / "search.json").read_text())
    assert {one["name"] for one in shapes["candidates"]} == {one["name"] for one in found["candidates"]}
    assert [len(one["rounds"]) for one in found["candidates"]] == [1, 1, 0, 0]
    best = found["candidates"][0]
    plan = PruningPlan.from_pretrained(folder)
    assert plan.student["num_parameters"] == best["num_parameters"]
    for name in ("intermediate_size", "num_hidden_layers"):
        assert plan.pruner_config[name] == best["request"][name]
    assert plan.pruner_config["num_attention_heads"] == 6
    assert not (folder / "candidates").exists()
    _, lines = run(values, until="plan")
    assert all("skipped" in line for line in lines)
    with pytest.raises(MismatchError, match=r"stage 'search' was made from other inputs \(search.num_tokens"):
        run({**values, "search": {**values["search"], "num_tokens": 64}}, until="plan")


def test_a_dry_run_lists_the_shapes_that_meet_all_budgets(values):
    """Counted by hand: parameters, and 4 bytes each of them and of keys and values of the whole context."""
    teacher = load_model(values["teacher"])
    neuron = 3 * teacher.config.hidden_size + 2 * teacher.config.mlp_bias
    config, given = teacher.config, {"intermediate_size": [0.25, 0.5, 0.75], "num_hidden_layers": [2, 3, 4]}
    layer = {
        share: layer_of(teacher) - neuron * (config.intermediate_size - round(config.intermediate_size * share))
        for share in given["intermediate_size"]
    }
    fixed = sum(p.numel() for p in teacher.parameters()) - config.num_hidden_layers * layer_of(teacher)
    shapes = {
        (share, layers): fixed + layers * size
        for share, size in layer.items()
        for layers in given["num_hidden_layers"]
    }
    cache = 2 * 100 * config.num_key_value_heads * config.head_dim
    used = {name: 4 * (count + name[1] * cache) for name, count in shapes.items()}
    limit, most = sorted(shapes.values())[6], sorted(used.values())[4]
    expected = {
        count
        for name, count in shapes.items()
        if count <= limit and used[name] <= most and (count >= 0.8 * limit or used[name] >= 0.8 * most)
    }
    assert 0 < len(expected) < len(shapes)
    budgets = {"max_parameters": limit, "max_memory_bytes": most, "context_length": 100, "tolerance": 0.2}
    values |= {"prune": {"multiple_of": 1}, "search": {"space": given, **budgets}}
    found = runner.check_recipe(Recipe.from_dict(values))
    assert {one["num_parameters"] for one in found["candidates"]} == expected
    assert not any("max_seconds" in note for note in found["notes"])
    values["search"]["max_seconds_per_token"] = 1.0
    found = runner.check_recipe(Recipe.from_dict(values))
    assert {one["num_parameters"] for one in found["candidates"]} > expected, "a shape may use the time alone"
    assert any("max_seconds_per_token" in note for note in found["notes"])


def layer_of(model):
    return sum(p.numel() for p in model.model.layers[0].parameters())


def test_a_target_decides_the_sizes(values):
    values["prune"] = {"target_parameters": 0.5, "multiple_of": 1}
    shapes = runner.check_recipe(Recipe.from_dict(values))
    folder, _ = run(values, until="plan")
    plan = PruningPlan.from_pretrained(folder)
    assert {one["name"] for one in plan.candidates} == {one["name"] for one in shapes["candidates"]}
    assert plan.student["num_parameters"] <= 0.5 * plan.teacher["num_parameters"]
    chosen = json.loads((folder / "pruner_config.json").read_text())
    assert chosen["target_parameters"] is None
    assert chosen["intermediate_size"] == plan.sizes["ffn"]["student"]


def test_a_folder_with_other_files_is_refused(values):
    folder = Path(values["output_dir"])
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="already holds files"):
        run(values)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prune": {"intermediate_size": 10_000}}, PlanError, "larger than the teacher's"),
        ({"distill": {"learning_rat": 1}}, DataError, "learning_rat"),
        ({"distill": {"temperature": -1.0}}, DataError, "temperature"),
        ({"lora": {"rank": 3}}, DataError, "lora"),
        ({"lora": {"r": 2}, "controls": ["random_init"]}, DataError, "random_init trains all weights"),
        ({"scores": {"num_row": 3}}, DataError, "num_row"),
        ({"search": {"space": {"num_hidden_layers": [3]}}}, PlanError, "needs a budget"),
        (
            {"search": {"space": {"num_hidden_layers": [3]}, "max_parameters": 1, "x": 1}},
            DataError,
            "search: x is unkn",
        ),
        ({"search": {"space": {"num_hidden_layers": [3]}, "max_parameters": 1}}, PlanError, "none of the 1 shapes"),
    ],
)
def test_refusals_come_before_the_first_file(values, changes, error, words):
    with pytest.raises(error, match=words):
        run({**values, **changes})
    assert not Path(values["output_dir"]).exists()


def test_missing_data_is_refused_before_the_first_file(values):
    values["data"]["train"] = "./nowhere/train.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        run(values)
    assert not Path(values["output_dir"]).exists()


def test_a_model_elsewhere_in_the_folder_is_not_taken_for_the_students(values):
    with pytest.raises(DataError, match="no stage 'distil'"):
        run(values, until="distil")


def test_controls_and_earlier_rounds_are_not_pushed(values, tmp_path, monkeypatch):
    """They would go to the student's repository."""
    run(values, until="plan")
    pushed = []
    monkeypatch.setattr(training, "_training_settings", lambda run: {"push_to_hub": True})
    monkeypatch.setattr(training, "distill", lambda *args, **kwargs: pushed.append(args[4]["push_to_hub"]))
    whole = Run(Recipe.from_dict(values), show_progress=False)
    for folder in (whole.folder, whole.folder / "controls" / "random_init", whole.folder / "rounds" / "1"):
        training.train(whole, values["teacher"], folder, {})
    assert pushed == [True, False, False]


def test_the_teachers_folder_is_not_the_runs(values):
    with pytest.raises(OutputError, match="is the teacher's own"):
        runner.check_recipe(Recipe.from_dict({**values, "output_dir": values["teacher"]}))


@pytest.mark.parametrize(
    ("changes", "bytes_of_first", "bytes_of_last"),
    [
        ({}, 4 + 4 + 12, 4 + 4 + 12),  # pruned, trained, and one checkpoint
        ({"save_only_model": True}, 4 + 4 + 4, 4 + 4 + 4),
        ({"save_strategy": "no"}, 4 + 4, 4 + 4),
        ({"controls": ["cross_entropy"]}, 4 + 4 + 12, 4 + 2 * (4 + 12)),
        ({"controls": ["cross_entropy", "random_init"]}, 4 + 4 + 12, 4 + 3 * (4 + 12)),
    ],
)
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_run_needs_the_disk_that_it_fills(values, monkeypatch, changes, bytes_of_first, bytes_of_last, num_rounds):
    controls, settings = changes.get("controls", []), {k: v for k, v in changes.items() if k != "controls"}
    recipe = Recipe.from_dict({**values, "controls": controls})
    args = [DistillationConfig(values["output_dir"], report_to="none", **settings)] * num_rounds
    config = pocket_config("llama", dtype="float32")
    students = [config] * num_rounds
    stages = {"prune", "distill", *(["controls"] if controls else [])}
    needed = count_parameters(config) * ((num_rounds - 1) * bytes_of_first + bytes_of_last)
    for free in (needed, needed - 1):
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        refused = pytest.raises(OutputError, match="Free space") if free < needed else contextlib.nullcontext()
        with refused:
            environment.check_disk(recipe, stages, args, config, students)


def test_several_gpus_in_one_process_are_refused_before_the_run(values, monkeypatch):
    monkeypatch.setattr(DistillationConfig, "n_gpu", 2)
    with pytest.raises(UnsupportedModelError, match=r"One process sees 2 GPUs.*Set distributed"):
        runner.check_recipe(Recipe.from_dict(values))
    runner.check_recipe(Recipe.from_dict(values), until="prune")
    runner.check_recipe(Recipe.from_dict({**values, "distributed": {"config": "ddp", "num_processes": 2}}))


def test_check_recipe_predicts_the_students_size(values):
    shapes = runner.check_recipe(Recipe.from_dict(values))
    folder, _ = run(values, until="prune")
    student = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    assert shapes["num_parameters"]["student"] == sum(p.numel() for p in student.parameters())
    assert shapes["sizes"]["ffn"]["student"] == student.config.intermediate_size


def test_lora_trains_an_adapter_and_leaves_a_stock_student(values):
    folder, _ = run({**values, "lora": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}, until="distill")
    assert not (folder / "adapter_config.json").exists()
    student = AutoModelForCausalLM.from_pretrained(folder)
    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    changed = {name for name, tensor in student.state_dict().items() if not tensor.equal(pruned.state_dict()[name])}
    assert changed
    assert all(".q_proj." in name or ".up_proj." in name for name in changed)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distill": {"max_steps": 4, "assistant_only_loss": True}}, {"cache", "distill", "evaluate"}),
        ({"teacher": {"model": "{}", "dtype": "bfloat16"}}, {"cache", "distill", "evaluate"}),
        ({"distill": {"max_steps": 4, "max_eval_rows": 3}}, {"cache"}),
    ],
)
def test_stages_depend_on_what_decides_their_results(values, changes, expected):
    values |= {"teacher_cache": {"top_k": 9}, "distill": {"max_steps": 4}}
    if "teacher" in changes:
        changes["teacher"]["model"] = values["teacher"]
    before, after = (
        {stage.name: stage.dependencies(one) for stage in STAGES if stage.wanted(one)}
        for one in (Recipe.from_dict(values), Recipe.from_dict(values | changes))
    )
    assert {name for name in before if before[name] != after[name]} == expected


def test_a_cached_teacher_is_asked_once_and_not_loaded_for_training(values, monkeypatch):
    values |= {"teacher_cache": {"top_k": 9, "dtype": "float32"}}
    values["distill"]["max_eval_rows"] = 3
    folder, lines = run(values, until="cache")
    assert [line.split("]")[0] for line in lines] == ["[score", "[plan", "[prune", "[cache"]
    monkeypatch.setattr(
        run_module.Run, "distillation_teacher", property(lambda self: pytest.fail("the teacher was loaded"))
    )
    changed = {**values, "distill": {**values["distill"], "learning_rate": 2e-4}}
    _, lines = run(changed, until="distill")  # of which the cache is no matter
    assert ["skipped" in line for line in lines] == [True] * 4 + [False]
    files = [folder / f"teacher_cache/{name}/teacher_cache.json" for name in ("train", "eval")]
    rows = [json.loads(path.read_text()) for path in files]
    assert rows[1]["num_rows"] == 3 < rows[0]["num_rows"]  # no more than training evaluates
    cached = json.loads((folder / "distillation.json").read_text())
    assert [entry["top_k"] for entry in cached["teacher_cache"]] == [9, 9]
    assert not [name for name in uploaded_files(folder) if name.startswith("teacher_cache/")]
    with pytest.raises(MismatchError, match=r"stage 'cache' was made from other inputs \(distill.temperature"):
        run({**values, "distill": {**values["distill"], "temperature": 2.0}}, until="cache")
    with pytest.raises(MismatchError, match=r"stage 'cache' was made from other inputs \(distill.max_eval_rows"):
        run({**values, "distill": {**values["distill"], "max_eval_rows": 4}}, until="cache")
