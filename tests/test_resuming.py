"""What a run takes for done: contents decide, not names; `--redo` begins anew; and one run works in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from pkgutil import resolve_name

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import csv, parquet

from minitron_hf import interruption
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.errors import MismatchError, OutputError
from minitron_hf.files import file_digest
from minitron_hf.locks import locked_folder
from minitron_hf.pruning.plan import PLAN_NAME, PruningPlan
from minitron_hf.recipe import actions, identity, runner
from minitron_hf.recipe.estimates import StageCost
from minitron_hf.recipe.identity import dataset_identity, model_identity
from minitron_hf.recipe.run import Run
from minitron_hf.recipe.schema import DatasetSection, Recipe, TeacherSection
from minitron_hf.recipe.stages import stages_until
from minitron_hf.recipe.usage import Usage, read_costs
from test_runner import TEXTS, recorded, run, values, workshop  # noqa: F401 (fixtures)


@pytest.fixture
def own(values, tmp_path):  # noqa: F811
    """The recipe, with a teacher of its own that a test may change."""
    teacher = shutil.copytree(values["teacher"], tmp_path / "teacher")
    return {**values, "teacher": str(teacher)}


def flip(path: Path, at: int) -> None:
    """Change one byte, and leave size and time as they were."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_changed_byte_in_the_middle_of_the_teachers_weights_is_another_teacher(own):
    run(own, until="plan")
    weights = Path(own["teacher"]) / "model.safetensors"
    flip(weights, weights.stat().st_size // 2)
    with pytest.raises(MismatchError, match=r"stage 'score' was made from other inputs \(teacher.files.model"):
        run(own, until="plan")


def test_a_changed_tokenizer_is_another_teacher(own):
    before = model_identity(TeacherSection(own["teacher"]))
    with (Path(own["teacher"]) / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert model_identity(TeacherSection(own["teacher"])) != before
    (Path(own["teacher"]) / "README.md").write_text("no part of it")
    assert len(model_identity(TeacherSection(own["teacher"]))["files"]) == len(before["files"])


def test_a_saved_dataset_is_known_by_its_files(own, tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    own["data"] = {**own["data"], "train": str(tmp_path / "saved")}
    run(own, until="plan")
    (tmp_path / "saved" / "cache-0123.arrow").write_text("of the library")
    _, lines = run(own, until="plan")
    assert all("skipped" in line for line in lines)
    shutil.rmtree(tmp_path / "saved")
    Dataset.from_dict({"text": TEXTS[1:]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(MismatchError, match=r"stage 'score' was made from other inputs \(data.source"):
        run(own, until="plan")


def test_tasks_and_their_documents_are_known_by_their_files(own, tmp_path):
    """In the evaluation, and in a training whose best checkpoint they choose."""
    for name in ("tasks", "documents"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.yaml").write_text("task: one")

    def digests(folder):
        tasks, documents = str(folder / "tasks"), str(folder / "documents")
        own["evaluate"] |= {"include_path": tasks, "task_data": documents}
        own["distill"] |= {"load_best_model_at_end": True, "eval_include_path": tasks, "eval_task_data": documents}
        return runner.stage_digests(Recipe.from_dict(own))

    first = digests(tmp_path)
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "utils.pyc").write_bytes(b"of Python")
    shutil.copytree(tmp_path / "tasks", tmp_path / "moved" / "tasks")
    shutil.copytree(tmp_path / "documents", tmp_path / "moved" / "documents")
    assert digests(tmp_path / "moved") == first
    for name in ("tasks", "documents"):
        (tmp_path / name / "one.yaml").write_text("task: other")
        other = digests(tmp_path)
        assert {name for name in first if first[name] != other[name]} >= {"distill", "evaluate"}
        (tmp_path / name / "one.yaml").write_text("task: one")


def test_lines_that_name_image_files_are_known_with_them(tmp_path):
    for name, content in (("a.png", b"first"), ("b.png", b"second"), ("c.png", b"third")):
        (tmp_path / name).write_bytes(content)
    rows = [{"text": "none"}, {"images": ["a.png", "http://x/y.png"]}, {"images": ["b.png"]}, {"image": "c.png"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    section = DatasetSection(str(path))
    first = dataset_identity(section)
    assert dataset_identity(section) == first
    moved = shutil.copytree(tmp_path, tmp_path.parent / "moved")
    assert dataset_identity(DatasetSection(str(moved / "rows.jsonl"))) == first
    seen = {first["source"]}
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"edited")
        seen.add(dataset_identity(section)["source"])
    assert len(seen) == 4
    (tmp_path / "long.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert dataset_identity(DatasetSection(str(tmp_path / "long.csv")))["source"] == file_digest(tmp_path / "long.csv")
    for other in (tmp_path / "images.csv", tmp_path / "images.parquet"):
        table = pyarrow.table({"text": ["a", "b"], "image": ["a.png", "http://x/y.png"]})
        (csv.write_csv if other.suffix == ".csv" else parquet.write_table)(table, other)
        before = dataset_identity(DatasetSection(str(other)))
        assert dataset_identity(DatasetSection(str(other))) == before
        (tmp_path / "a.png").write_bytes(other.name.encode())
        assert dataset_identity(DatasetSection(str(other))) != before
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    whole = DatasetSection(str(path.with_suffix(".json")))
    before = dataset_identity(whole)
    (tmp_path / "b.png").write_bytes(b"edited again")
    assert dataset_identity(whole) != before
    path.write_text('{"text": "of \\"images\\""}\n{"text": "images"}')
    assert dataset_identity(section)["source"] == file_digest(path)  # as before


def test_a_changed_processor_is_another_teacher(own):
    before = model_identity(TeacherSection(own["teacher"]))
    for name in ("preprocessor_config.json", "processor_config.json"):
        (Path(own["teacher"]) / name).write_text("{}")
        after = model_identity(TeacherSection(own["teacher"]))
        assert after != before
        before = after


def test_a_hub_dataset_is_known_by_its_commit(monkeypatch, tmp_path):
    """Without a revision, and offline by the copy that would be read."""

    class Info:
        sha = "a" * 40

    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, *args, **kwargs: asked.append(args) or Info)
    section = DatasetSection("someone/texts")
    identity.hub_commit.cache_clear()
    first = dataset_identity(section)
    assert first["commit"] == "a" * 40
    assert dataset_identity(section) == first
    assert len(asked) == 1
    Info.sha = "b" * 40
    identity.hub_commit.cache_clear()
    assert dataset_identity(section) != first

    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--someone--texts" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--someone--texts" / "refs" / "main").write_text("b" * 40)
    identity.hub_commit.cache_clear()
    assert dataset_identity(section)["commit"] == "b" * 40
    identity.hub_commit.cache_clear()


def test_an_edited_plan_is_refused(values):  # noqa: F811
    """Also where what was edited decides nothing by itself, and would only be said."""
    folder, _ = run(values, until="plan")
    path = folder / PLAN_NAME
    plan = json.loads(path.read_text())
    plan["sizes"]["ffn"]["student"] += 8
    path.write_text(json.dumps(plan))
    with pytest.raises(MismatchError, match="is damaged"):
        PruningPlan.from_pretrained(folder)


def test_a_flipped_byte_in_a_teacher_cache_is_noticed(values):  # noqa: F811
    values["teacher_cache"] = {"top_k": 4}
    folder, _ = run(values, until="cache")
    [shard] = (folder / "teacher_cache" / "train").glob("data-*.arrow")
    load_teacher_cache(shard.parent)
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(MismatchError, match=r"data-00000.arrow has changed since it was written"):
        load_teacher_cache(shard.parent)


def test_checkpoints_of_other_inputs_are_not_dropped_unasked(values, monkeypatch):  # noqa: F811
    """They may have taken hours, and the change may be none that the user wants to pay for."""
    run(values, until="prune")
    wrong = {**values, "distill": {**values["distill"], "learning_rate": 1.0, "max_steps": 6, "save_steps": 1}}

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("minitron_hf.distillation.trainer.DistillationTrainer.save_student", broken)
    with pytest.raises(KeyboardInterrupt):
        run(wrong, until="distill")
    monkeypatch.undo()
    folder = Path(values["output_dir"])
    with pytest.raises(MismatchError, match=r"'distill' in .* was interrupted.*learning_rate: 1.0 → .*--redo"):
        run(values, until="distill")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    run(values, until="distill", redo=True)
    record = json.loads((folder / "distillation.json").read_text())
    assert (record["global_step"], record["arguments"]["learning_rate"]) == (4, 1e-4)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("stage", "work", "changes"),
    [
        ("generate", "generated/.unfinished-00000.jsonl", {"generate": {"num_rows": 9}}),
        ("search", "candidates/one/checkpoint-3/x", {"prune": {"num_attention_heads": 6}}),
        ("correct", "corrected_teacher/checkpoint-3/x", {"teacher_correction": {"num_tokens": 9}}),
        ("cache", "teacher_cache/train/data-00000.arrow", {"teacher_cache": {"top_k": 9}}),
        ("controls", "controls/random_init/config.json", {"controls": ["cross_entropy"]}),
        ("controls", "controls/random_init/checkpoint-3/x", {"controls": ["cross_entropy"]}),
    ],
)
def test_no_stage_drops_unasked_what_it_has_done(values, stage, work, changes):  # noqa: F811
    values |= {
        "data": {**values["data"], "train": [{"generated": True}, {"source": values["data"]["train"]}]},
        "generate": {"num_rows": 8},
        "prune": {},
        "search": {"space": {"intermediate_size": [0.25, 0.5]}, "max_parameters": 1e9},
        "teacher_correction": {"original_learning_rate": 1e-3, "num_tokens": 64},
        "teacher_cache": {"top_k": 4},
        "controls": ["random_init"],
    }
    folder = Path(values["output_dir"])
    recorded(values)
    merged = {name: {**values[name], **one} if isinstance(one, dict) else one for name, one in changes.items()}
    changed = Recipe.from_dict({**values, **merged})
    digests = runner.stage_digests(changed, folder)
    runner._require_usable(folder, runner.stages_until(changed, stage), changed, digests)  # nothing would be lost
    (folder / work).parent.mkdir(parents=True)
    (folder / work).write_text("hours")
    with pytest.raises(MismatchError, match=rf"'{stage}' in .* was interrupted.*--redo"):
        runner._require_usable(folder, runner.stages_until(changed, stage), changed, digests)


@pytest.mark.parametrize("status", ["running", "done"])
def test_added_controls_keep_the_finished_ones(values, status, monkeypatch):  # noqa: F811
    """Without `redo` where the stage was interrupted; with it where later stages were done without them."""
    trained = []
    monkeypatch.setattr(actions, "_train", lambda run, student, folder, **_: trained.append(folder.name))
    monkeypatch.setattr(actions, "_save_student", lambda *args: None)
    values["controls"] = ["cross_entropy"]
    folder, _ = run(values, until="prune")
    begun = recorded(values, "done")
    finished = folder / "controls" / "cross_entropy" / "config.json"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    recipe = Recipe.from_dict(values)
    [stage] = [one for one in runner.stages_of(recipe) if one.name == "controls"]
    runner._write_record(folder, stage, recipe, begun["controls"], status, Usage(seconds=100.0))
    values["controls"] = ["random_init", "cross_entropy"]
    changed = Recipe.from_dict(values)
    digests = runner.stage_digests(changed, folder)
    runner._require_usable(folder, runner.stages_until(changed, "controls"), changed, digests)
    if status == "done":
        runner._clear_unfinished(folder, runner.stages_until(changed, "controls"), changed, digests)
    runner._run_stage(Run(changed, show_progress=False), stage, digests, lambda line: None)
    assert trained == ["random_init"]
    assert finished.is_file()
    assert json.loads((folder / "stages" / "controls.json").read_text())["seconds"] >= 100


def test_an_edited_recipe_is_estimated_anew(values, monkeypatch):  # noqa: F811
    class Stub:
        def __init__(self, recipe, until):
            self.steps = recipe.distill["max_steps"]
            self.stages = [StageCost(one.name, 1.0).to_dict() for one in stages_until(recipe, until)]

        def to_dict(self):
            return {"stages": self.stages, "steps": self.steps}

    monkeypatch.setattr("minitron_hf.recipe.runner.estimate_recipe", Stub)
    for steps, estimates in ((4, 1), (4, 0), (6, 1), (6, 0)):
        found: list[Stub] = []
        values["distill"]["max_steps"] = steps
        run(values, until="plan", report_estimate=found.append)
        assert [one.steps for one in found] == [steps] * estimates
        assert read_costs(Path(values["output_dir"]))["estimate"]["steps"] == steps
    found = []
    for _ in range(2):
        run(values, until="prune", report_estimate=found.append)
    assert [one.stages[-1]["stage"] for one in found] == ["prune"], "later stages were not estimated yet"


@pytest.mark.parametrize("where", ["minitron_hf.recipe.actions.make_plan", "datasets.Dataset.map"])
def test_an_interrupt_that_a_library_swallows_ends_the_run_nevertheless(values, monkeypatch, where):  # noqa: F811
    """`datasets` catches everything while it hashes a function."""
    monkeypatch.setattr(interruption, "_arrived", [])
    module, _, name = where.rpartition(".")
    holder = resolve_name(module.replace("datasets.Dataset", "datasets:Dataset"))
    own = getattr(holder, name)

    def swallowing(*args, **kwargs):
        with contextlib.suppress(KeyboardInterrupt):
            interruption.interrupt(signal.SIGTERM)
        return own(*args, **kwargs)

    run(values, until="score")
    monkeypatch.setattr(holder, name, swallowing)
    with pytest.raises(KeyboardInterrupt):
        run(values, until="distill")
    folder = Path(values["output_dir"])
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))
    monkeypatch.setattr(interruption, "_arrived", [])
    monkeypatch.setattr(holder, name, own)
    run(values, until="distill")
    assert (folder / "model.safetensors").is_file()


def test_redo_goes_on_from_no_old_checkpoint(values, monkeypatch):  # noqa: F811
    """Of a stage with other inputs, or with the same ones that did not end."""
    values["distill"] = {**values["distill"], "save_steps": 1, "save_total_limit": None}
    folder, _ = run(values, until="distill")
    assert len(list(folder.glob("checkpoint-*"))) == 4
    shorter = {**values, "distill": {**values["distill"], "max_steps": 2}}
    run(shorter, until="distill", redo=True)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    (folder / "distillation.json").unlink()  # as if it had not ended
    begun = []
    train = "minitron_hf.distillation.checkpoints.CheckpointMixin.train"
    monkeypatch.setattr(train, lambda self, resume_from_checkpoint=None: begun.append(resume_from_checkpoint))
    monkeypatch.setattr("minitron_hf.distillation.trainer.DistillationTrainer.save_student", lambda *a, **k: None)
    with pytest.raises(FileNotFoundError):  # nothing was trained or saved
        (run(shorter, until="distill", redo=True)[0] / "config.json").read_text()
    assert begun == [None]


def test_redo_begins_a_search_and_a_correction_anew(values):  # noqa: F811
    """What they keep between interruptions is of the run before."""
    recipe = Recipe.from_dict(values)
    stages = {stage.name: stage for stage in runner.stages_of(recipe)}
    folder = Path(values["output_dir"])
    for name in ("candidates/one/checkpoint-3/x", "corrected_teacher/checkpoint-3/x", "search.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "stages").mkdir()
    for name in ("search", "correct"):
        record = {"status": "running", "digest": "the same", "settings": {}}
        (folder / "stages" / f"{name}.json").write_text(json.dumps(record))
        runner._clear_unfinished(folder, [stages[name]], recipe, {name: "the same"})
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_second_run_in_a_folder_is_refused(values):  # noqa: F811
    folder, _ = run(values, until="plan")
    pid = os.fork()
    if pid == 0:  # another process holds the folder
        with locked_folder(folder):
            (folder / "held").touch()
            signal.pause()
    try:
        while not (folder / "held").exists():
            pass
        with pytest.raises(OutputError, match=rf"is in use by process {pid} on "):
            run(values, until="plan")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    run(values, until="plan")


def test_iterations_are_part_of_a_recipe(values):  # noqa: F811
    values["scores"] = {**values["scores"], "iterations": 2}
    folder, _ = run(values, until="plan")
    assert PruningPlan.from_pretrained(folder).scores["settings"]["iterations"] == 2
