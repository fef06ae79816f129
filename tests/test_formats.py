"""Every file of a run has a format number; older formats are migrated, newer and unknown ones refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minitron_hf.data import load_text_dataset
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.checkpoints import last_checkpoint, remove_incomplete_checkpoints
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.errors import MismatchError
from minitron_hf.evaluation import benchmarks, evaluate, tasks
from minitron_hf.evaluation.task_results import TaskScores
from minitron_hf.formats import FORMATS, MIGRATIONS, WRITERS, read_artefact, require_readable, write_artefact
from minitron_hf.generation.corpus import generate_corpus
from minitron_hf.models import load_model, load_tokenizer
from minitron_hf.pruning.candidates import best_shape
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.publishing import hub, releases
from minitron_hf.publishing.card import render_model_card
from minitron_hf.recipe import runner
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.scores import ImportanceScores
from minitron_hf.search.architectures import search_architectures
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokenizer

TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]
MEASURED = {"teacher": {"piqa": {"acc,none": {"value": 0.5, "stderr": 0.1}}}}
#: Where the product leaves each kind of file, in the run folder.
PATHS = {
    "data-*.arrow": "teacher_cache/eval/data-00000.arrow",
    "teacher_cache.json": "teacher_cache/train/teacher_cache.json",
    "generation.json": "generated/generation.json",
    "teacher_correction.json": "corrected_teacher/teacher_correction.json",
    "checkpoint.json": "checkpoint-4/checkpoint.json",
    "stages/*.json": "stages/plan.json",
    "benchmarks/*.json": "benchmarks/piqa-0.json",
    "quantization.json": "quantized/int8/quantization.json",
}
#: What reads each kind of file.
READERS = {
    "scores.safetensors": ImportanceScores.from_pretrained,
    "search.json": lambda path: best_shape(path.parent),
    "pruner_config.json": PrunerConfig.from_pretrained,
    "pruning_plan.json": lambda path: PruningPlan.from_pretrained(path.parent),
    "teacher_correction.json": read_artefact,
    "data-*.arrow": lambda path: write_cache(path.parents[2], "eval"),
    "teacher_cache.json": lambda path: load_teacher_cache(path.parent),
    "generation.json": lambda path: write_corpus(path.parents[1]),
    "checkpoint.json": lambda path: last_checkpoint(path.parents[1]),
    "stages/*.json": lambda path: runner._record(path.parents[1], path.stem),
    "benchmarks/*.json": benchmarks._read,
    "quantization.json": lambda path: releases._require_copy_of(path.parents[2], path.parent),
}


def values(folder: Path) -> dict:
    return {
        "teacher": str(folder / "teacher"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "train.jsonl")},
        "output_dir": str(folder / "run"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": {"max_steps": 4, "max_length": 16, "per_device_train_batch_size": 2},
        "teacher_cache": {"top_k": 8},
        "teacher_correction": {
            "original_learning_rate": 1e-3,
            "num_tokens": 64,
            "arguments": {"max_length": 16, "per_device_train_batch_size": 2},
        },
        "evaluate": {"num_rows": 4, "speed": False, "prompts": ["the old"], "tasks": ["piqa"]},
    }


def write_cache(run_dir: Path, which: str) -> None:
    """Write one of the caches of the run again, as its stage does after an interruption."""
    teacher = run_dir / "corrected_teacher"
    settings = {name: value for name, value in values(run_dir.parent)["distill"].items() if name != "max_steps"}
    args = DistillationConfig(str(run_dir), packing=True, packing_strategy="wrapped", **settings)
    rows = load_text_dataset(str(run_dir.parent / "train.jsonl"))
    folder = run_dir / "teacher_cache" / which
    (folder / "teacher_cache.json").unlink(missing_ok=True)
    cache_teacher_logits(
        load_model(teacher), rows, folder, top_k=8, args=args, processing_class=load_tokenizer(teacher)
    )


def write_corpus(run_dir: Path) -> None:
    """Generate a corpus, or resume it."""
    generate_corpus(
        run_dir.parent / "teacher", ["the old"], run_dir / "generated", max_new_tokens=2, show_progress=False
    )


def write_benchmarks(models, tasks, *, output_path, **kwargs) -> dict:
    """Write what `measure_benchmarks` writes, without the harness."""
    scores = TaskScores(MEASURED["teacher"], {"piqa": {"acc": [0.0, 1.0]}}, {"piqa": []}, {}, {})
    content = {"task": "piqa", "key": "sha256:0", **vars(scores)}
    write_artefact(output_path / PATHS["benchmarks/*.json"], content, benchmarks.DOCUMENTS_KIND)
    write_artefact(output_path / benchmarks.BENCHMARKS_NAME, {"models": dict.fromkeys(models, MEASURED["teacher"])})
    return {}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with all stages, a search and a name on the Hub."""
    folder = tmp_path_factory.mktemp("formats")
    tokenizer, teacher = pocket_tokenizer(), pocket_model("llama")
    for one in (teacher, tokenizer):
        one.save_pretrained(folder / "teacher")
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:24]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "require_tasks", lambda *args, **kwargs: None)
        patch.setattr(evaluate, "require_tasks", lambda *args, **kwargs: None)
        patch.setattr(evaluate, "measure_benchmarks", write_benchmarks)
        made = runner.run_recipe(Recipe.from_dict(values(folder)), show_progress=False, report=lambda line: None)
    hub._prepare_files(made, "owner/student", HfApi(token="no token"), True, {})
    write_corpus(made)
    (made / "quantized" / "int8").mkdir(parents=True)
    write_artefact(made / PATHS["quantization.json"], {"method": "int8", "source_weights": None})
    scores = ImportanceScores.from_pretrained(made)
    space = {"intermediate_size": [0.5, 0.25]}
    search_architectures(
        load_model(folder / "teacher"),
        scores,
        space=space,
        max_parameters=10**6,
        tolerance=1.0,
        num_rows=4,
        max_length=16,
        calibration_data=TEXTS[:4],
        processing_class=tokenizer,
        output_dir=made,
        show_progress=False,
    )
    return made


@pytest.fixture(params=FORMATS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def artefact(kind, run_dir):
    """The file of a kind, restored afterwards."""
    path = run_dir / PATHS.get(kind, kind)
    before = path.read_bytes()
    yield path
    path.write_bytes(before)


def read(path: Path, kind: str) -> None:
    READERS.get(kind, lambda path: render_model_card(path.parent))(path)


def set_format(path: Path, number: int | None) -> None:
    """Write a file anew with another format number, or without one."""

    def changed(text: str | bytes) -> str:
        content = {name: value for name, value in json.loads(text).items() if name != "format"}
        return json.dumps(content if number is None else {"format": number, **content})

    if path.suffix == ".json":
        path.write_text(changed(path.read_text()))
    elif path.suffix == ".safetensors":
        tensors = load_file(path)
        with safe_open(path, "np") as stored:
            save_file(tensors, path, metadata={"minitron_hf": changed(stored.metadata()["minitron_hf"])})
    else:
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        header = {b"minitron_hf": changed(table.schema.metadata[b"minitron_hf"])}
        with pa.ipc.new_stream(str(path), table.schema.with_metadata(header)) as writer:
            writer.write_table(table)


def test_what_this_version_writes_is_read(artefact, kind):
    read(artefact, kind)


def test_a_newer_format_is_refused_by_name(artefact, kind):
    number = FORMATS[kind] + 1
    require_readable(artefact)
    set_format(artefact, number)
    if "/" not in kind:  # `run` and `evaluate` read their own
        with pytest.raises(MismatchError, match=f"has format {number}"):
            require_readable(artefact.parent)
    with pytest.raises(MismatchError) as caught:
        read(artefact, kind)
    assert re.search(
        rf"{re.escape(artefact.name)} has format {number}, and minitron-hf \S+ reads format .*\b{FORMATS[kind]} of "
        rf"{re.escape(kind)}\. Install a newer minitron-hf, or write it again with {re.escape(WRITERS[kind])}\.",
        str(caught.value),
    )


def test_a_file_without_a_number_is_migrated_or_refused(artefact, kind):
    set_format(artefact, None)
    if kind in ("samples.json", "benchmarks.json"):  # had another structure
        content = json.loads(artefact.read_text())
        artefact.write_text(json.dumps(content["samples"] if kind == "samples.json" else content["models"]))
    if (kind, 0) in MIGRATIONS:
        read(artefact, kind)
    else:
        with pytest.raises(MismatchError, match=rf"{re.escape(artefact.name)} has no format number.* write it again"):
            read(artefact, kind)


def test_benchmarks_of_the_student_alone_are_migrated(run_dir):
    path = run_dir / "benchmarks.json"
    before = path.read_bytes()
    path.write_text(json.dumps({"format": MEASURED["teacher"]["piqa"]}))  # a task of any name
    try:
        assert read_artefact(path) == {"format": 1, "models": {"student": {"format": MEASURED["teacher"]["piqa"]}}}
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("hub.json", {"format": []}, "has format []"),
        ("hub.json", {"format": "two"}, "has format 'two'"),
        ("hub.json", {"format": -1}, "has format -1"),
        ("teacher.json", [1, 2], "does not hold what teacher.json held in format 0"),
        ("benchmarks.json", {"piqa": 3}, "does not hold what benchmarks.json held in format 0"),
        ("evaluation.json", [], "has no format number"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(MismatchError, match=re.escape(words)):
        read_artefact(tmp_path / name)


def test_a_checkpoint_of_a_newer_version_is_not_removed(run_dir):
    path = run_dir / PATHS["checkpoint.json"]
    before = path.read_bytes()
    set_format(path, 2)
    with pytest.raises(MismatchError, match="has format 2"):
        remove_incomplete_checkpoints(run_dir)
    assert path.is_file()
    path.write_bytes(before)


def test_the_page_on_files_lists_every_format():
    page = (Path(__file__).parents[1] / "docs/reference/files.md").read_text()
    assert {
        kind: int(number) for kind, number in re.findall(r"^\| `(.+?)` \| (\d+) \|", page, re.MULTILINE)
    } == FORMATS


def test_every_kind_of_file_has_a_command_that_writes_it():
    assert WRITERS.keys() == FORMATS.keys()
