"""Streaming: the files of the path through memory, byte for byte, from parts of the teacher's files."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hub_server import hub_server_fixture  # noqa: F401 (a fixture)
from minitron_hf.errors import HubError, MinitronError, MismatchError, OutputError, UnsupportedModelError
from minitron_hf.models import load_config, load_model
from minitron_hf.pruning import stored_reading, streaming
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.stored_checkpoint import is_streamable, open_checkpoint
from minitron_hf.pruning.stored_tensors import DTYPES, lazy_tensors
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.saving import add_older_keys, save_model
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.weights import model_digest
from pocket import POCKETS, cuttable, pocket_model, pocket_tokenizer, pocket_tokens
from test_surgery import plan_for, requests

NAMES = list(POCKETS)


def saved(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, size: str = "20KB", **kwargs) -> Path:
    """A pocket teacher on disk, in shards."""
    pocket_model(name, dtype=dtype).save_pretrained(folder, max_shard_size=size, **kwargs)
    return folder


def through_memory(source: Path, target: Path, plan: PruningPlan, **kwargs) -> Path:
    """The oracle: load all of it, cut, save."""
    save_model(apply_plan(load_model(source), plan), target, **kwargs)
    plan.save_pretrained(target)
    return target


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    differing = [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)]
    assert not differing


# The student


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_the_path_through_memory(name: str, tmp_path: Path):
    teacher = saved(name, tmp_path / "teacher")
    plan = plan_for(load_model(teacher), **requests(name)["everything"])
    assert plan.kept or cuttable(name) == {"num_hidden_layers"}
    assert plan.layers_dropped or "num_hidden_layers" not in cuttable(name)
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")

    student, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values())
    assert len(student.get_submodule(POCKETS[name].layers)) == len(plan.layers_kept)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("size", ["3KB", "9KB"])
def test_shards_are_those_of_save_pretrained(name: str, size: str, tmp_path: Path):
    teacher = saved(name, tmp_path / "teacher", size="5GB")
    plan = plan_for(load_model(teacher), **requests(name)["everything"])
    prune_checkpoint(teacher, tmp_path / "student", plan, max_shard_size=size, show_progress=False)
    assert (tmp_path / "student" / "model.safetensors.index.json").is_file()
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan, max_shard_size=size), tmp_path / "student")


def test_float16_is_cut_as_in_memory_and_refused_beyond_its_range(tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher", dtype=torch.float16)
    model = load_model(teacher)
    plan = plan_for(model, hidden_size=24, norm_compensation=True)
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")
    model.model.norm.weight.data.fill_(60000.0)
    model.save_pretrained(tmp_path / "large")
    plan = plan_for(model, hidden_size=24, norm_compensation=True)  # multiplies the norms by √(36 / 24)
    with pytest.raises(UnsupportedModelError, match="range of float16"):
        prune_checkpoint(tmp_path / "large", tmp_path / "refused", plan, show_progress=False)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("request_", [{"layers_to_drop": [1]}, {}], ids=str)
def test_tensors_that_are_not_cut_are_copied(request_: dict, tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher")
    plan = plan_for(load_model(teacher), **request_)
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("original", [True, False])
def test_experts_are_read_one_by_one_or_stacked(name: str, original: bool, tmp_path: Path):
    """Checkpoints hold one tensor per expert, models and new checkpoints one for all."""
    teacher = saved(name, tmp_path / "teacher", save_original_format=original)
    stored = {key for path in teacher.glob("*.safetensors") for key in load_file(path)}
    assert any(".experts.0." in key for key in stored) == original
    plan = plan_for(load_model(teacher), **requests(name)["experts and their neurons"])
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")
    assert any(".experts.0." in key for key in load_file(tmp_path / "student" / "model.safetensors"))


def test_names_that_transformers_changes_while_loading(tmp_path: Path):
    """GPT-2 on the Hub has no prefix, and masks that the model no longer holds."""
    teacher = saved("gpt2", tmp_path / "teacher", size="5GB")
    tensors = load_file(teacher / "model.safetensors")
    plan = plan_for(load_model(teacher), hidden_size=16, num_hidden_layers=2)
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    renamed["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    assert renamed.keys().isdisjoint(tensors)
    save_file(renamed, teacher / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")


@pytest.mark.parametrize("in_config", ["float16", "bfloat16", "float32", None])
def test_dtype_is_that_of_loading_with_auto(in_config: str | None, tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher", dtype=torch.float16)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "dtype": in_config}))
    plan = plan_for(load_model(teacher), **requests("llama")["everything"])
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "student" / "model.safetensors").values()}
    assert dtypes == {getattr(torch, in_config or "float16")}


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_tied_and_stored_too(equal: bool, tmp_path: Path):
    """Transformers ties what is equal, and keeps apart what is not, whatever the config says."""
    teacher = saved("qwen2-tied", tmp_path / "teacher", size="5GB")
    tensors = load_file(teacher / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    model = load_model(teacher)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    if not equal:
        with pytest.raises(MinitronError):
            apply_plan(model, plan_for(model, hidden_size=24))
        return
    plan = plan_for(model, hidden_size=24, norm_compensation=True)
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
def test_digest_of_the_weights_is_that_of_the_loaded_model(name: str, tmp_path: Path):
    teacher = saved(name, tmp_path)
    assert model_digest(open_checkpoint(teacher)) == model_digest(load_model(teacher))


def test_files_beside_the_weights(tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher")
    pocket_tokenizer(chat_template="{{ messages }}").save_pretrained(teacher)
    add_older_keys(teacher)
    GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3).save_pretrained(teacher)
    for name in ("LICENSE.txt", "NOTICE", "README.md", "evaluation.json", "optimizer.pt"):
        (teacher / name).write_text(name)
    plan = plan_for(load_model(teacher), hidden_size=24)
    assert prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False) == tmp_path / "student"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE.txt", "NOTICE"):
        assert filecmp.cmp(teacher / name, tmp_path / "student" / name, shallow=False)
    assert not {"README.md", "evaluation.json", "optimizer.pt"} & {p.name for p in (tmp_path / "student").iterdir()}
    assert GenerationConfig.from_pretrained(tmp_path / "student").top_k == 3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == len(pocket_tokenizer())
    assert PruningPlan.from_pretrained(tmp_path / "student").digest == plan.digest
    assert oct((tmp_path / "student").stat().st_mode) == oct(teacher.stat().st_mode)


# Memory


class Meter:
    """What is read from files, and what is handed out at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest = self.total = self.points = 0
        ranges, points = stored_reading.read_ranges, stored_reading.read_points

        def read_ranges(*args):
            for made in ranges(*args):
                self.largest, self.total = max(self.largest, made.nbytes), self.total + made.nbytes
                yield made

        def read_points(stored, shape, dtype, index):
            self.points += len(index[0])
            before = self.largest, self.total
            made = points(stored, shape, dtype, index)
            self.largest, self.total = before
            return made

        monkeypatch.setattr(stored_reading, "read_ranges", read_ranges)
        monkeypatch.setattr(stored_reading, "read_points", read_points)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "qwen2_moe"])
def test_only_a_few_rows_are_read_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = saved(name, tmp_path / "teacher", dtype=torch.float32)
    plan = plan_for(load_model(teacher), **requests(name)["everything"])
    expected = through_memory(teacher, tmp_path / "expected", plan)
    monkeypatch.setattr(stored_reading, "BLOCK_BYTES", 512)
    monkeypatch.setattr(stored_reading, "_GAP_BYTES", 0)
    meter = Meter(monkeypatch)
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert_same_files(expected, tmp_path / "student")
    assert meter.largest <= 512
    stored = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
    assert meter.total < stored * 0.75, "dropped layers, rows and experts are not read"
    assert meter.points > 1000, "the weights were compared with the plan's digest"


def test_dropped_layers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = saved("llama", tmp_path / "teacher")
    plan = make_plan(load_config(teacher), PrunerConfig(layers_to_drop=[0, 2, 3]))
    assert plan.teacher["digest"] is None
    meter = Meter(monkeypatch)
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    assert meter.total == sum(tensor.nbytes for tensor in load_file(tmp_path / "student/model.safetensors").values())


# Refusals: by name, and before anything is written


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "teacher", size="5GB")


@pytest.fixture
def plan(teacher: Path) -> PruningPlan:
    return plan_for(load_model(teacher), hidden_size=24, num_hidden_layers=3)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def change(teacher: Path, **tensors: torch.Tensor | None) -> None:
    path = teacher / "model.safetensors"
    stored = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({key: value for key, value in stored.items() if value is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model__norm__weight": None}, ["model.norm.weight is missing"]),
        ({"lm_head__weight": None, "model__norm__weight": None}, ["lm_head.weight is missing", "model.norm.weight"]),
        ({"model__extra__weight": torch.ones(3)}, ["model.extra.weight is not part of the model"]),
        ({"model__norm__weight": torch.ones(35)}, ["model.norm.weight", "(35,)", "expected (36,)"]),
    ],
)
def test_a_checkpoint_that_is_not_exactly_the_model(teacher, plan, tmp_path, tensors, words):
    change(teacher, **tensors)
    with pytest.raises(UnsupportedModelError) as error:
        prune_checkpoint(teacher, tmp_path / "student", plan)
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_expert(tmp_path, part):
    teacher = saved("mixtral", tmp_path / "teacher", size="5GB")
    plan = plan_for(load_model(teacher), hidden_size=24)
    change(teacher, **{f"model__layers__1__block_sparse_moe__experts__2__{part}__weight": None})
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM") as error:
        prune_checkpoint(teacher, tmp_path / "student", plan)
    names = ["layers.1.mlp.experts.down_proj", f"layers.1.block_sparse_moe.experts.2.{part}.weight missing"]
    assert any(name in str(error.value) for name in names)
    assert not (tmp_path / "student").exists()


def test_a_dtype_that_is_not_of_numbers(teacher, plan, tmp_path):
    path = teacher / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b'"BF16","shape":[36]') > 1
    path.write_bytes(data.replace(b'"BF16","shape":[36]', b'"Q_16","shape":[36]', 1))
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors"):
        prune_checkpoint(teacher, tmp_path / "student", plan)


def test_a_shard_that_was_not_copied_to_its_end(plan, tmp_path):
    teacher = saved("llama", tmp_path / "shards")
    shard = sorted(teacher.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UnsupportedModelError, match=f"{shard.name} is not a complete safetensors file"):
        prune_checkpoint(teacher, tmp_path / "student", plan)
    shard.unlink()
    with pytest.raises(UnsupportedModelError, match=f"not there: {shard.name}"):
        prune_checkpoint(teacher, tmp_path / "student", plan)


def test_pickled_weights_are_refused_with_a_way_out(teacher, plan, tmp_path):
    torch.save(load_file(teacher / "model.safetensors"), teacher / "pytorch_model.bin")
    assert is_streamable(teacher)
    (teacher / "model.safetensors").unlink()
    assert not is_streamable(teacher)
    with pytest.raises(UnsupportedModelError, match=r"only pytorch_model\.bin.*save_pretrained.*apply_plan"):
        prune_checkpoint(teacher, tmp_path / "student", plan)


def test_quantised_weights(teacher, plan, tmp_path):
    config = json.loads((teacher / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        prune_checkpoint(teacher, tmp_path / "student", plan)


def test_a_plan_for_other_weights(teacher, plan, tmp_path):
    change(teacher, model__norm__weight=load_file(teacher / "model.safetensors")["model.norm.weight"] + 1)
    with pytest.raises(MismatchError, match="other weights"):
        prune_checkpoint(teacher, tmp_path / "student", plan)
    assert not (tmp_path / "student").exists()


def test_a_plan_for_another_architecture(teacher, tmp_path):
    other = plan_for(pocket_model("llama", vocab_size=96), hidden_size=24)
    with pytest.raises(MismatchError, match="other sizes"):
        prune_checkpoint(teacher, tmp_path / "student", other)


def test_a_teacher_that_is_not_there(plan, tmp_path):
    with pytest.raises(HubError, match="does not exist"):
        prune_checkpoint(tmp_path / "nowhere", tmp_path / "student", plan)


def test_files_in_the_way(teacher, plan, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds files"):
        prune_checkpoint(teacher, tmp_path / "student", plan)
    assert (tmp_path / "student" / "notes.txt").read_text() == "mine"
    prune_checkpoint(teacher, tmp_path / "student", plan, overwrite=True, show_progress=False)
    assert not (tmp_path / "student" / "notes.txt").exists()
    assert (tmp_path / "student" / "config.json").is_file()


@pytest.mark.parametrize("target", [".", "teacher", "teacher/../teacher", "link"])
def test_the_teachers_folder_is_never_replaced(teacher, plan, tmp_path, target):
    source = shutil.copytree(teacher, tmp_path / "models" / "teacher")
    (tmp_path / "models" / "link").symlink_to(source)
    files = sorted(source.rglob("*"))
    with pytest.raises(OutputError, match="Choose another folder"):
        prune_checkpoint(source, tmp_path / "models" / target, plan, overwrite=True, show_progress=False)
    assert sorted(source.rglob("*")) == files


@pytest.mark.parametrize("missing", [1, 0])
def test_too_little_disk_is_refused_before_anything_is_written(teacher, plan, tmp_path, monkeypatch, missing):
    expected = through_memory(teacher, tmp_path / "expected", plan)
    needed = sum(tensor.nbytes for tensor in load_file(expected / "model.safetensors").values())
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - missing)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage)
    target = tmp_path / "new" / "student"
    if missing:
        with pytest.raises(OutputError, match=rf"needs {needed:,} bytes.*has {needed - 1:,} left"):
            prune_checkpoint(teacher, target, plan, overwrite=True)
        assert not target.parent.exists()
    else:
        prune_checkpoint(teacher, target, plan, show_progress=False)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=repr)
def test_an_interrupted_write_leaves_no_checkpoint(teacher, plan, tmp_path, monkeypatch, kind):
    old = prune_checkpoint(teacher, tmp_path / "old", plan, show_progress=False)
    monkeypatch.setattr(stored_reading, "BLOCK_BYTES", 1024)
    boxes, calls, halves = stored_reading.read_box, [], []

    def interrupted(*args):
        folders = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        calls.extend(folders)  # as soon as there is one
        if len(calls) == 40:
            halves.append(shutil.copytree(folders[0], tmp_path / "half"))
            raise kind
        return boxes(*args)

    monkeypatch.setattr(stored_reading, "read_box", interrupted)
    for target in (tmp_path / "student", old):
        calls.clear()
        shutil.rmtree(tmp_path / "half", ignore_errors=True)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            prune_checkpoint(teacher, target, plan, overwrite=True, show_progress=False)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        # What would be there had the machine stopped then.
        assert (tmp_path / "half" / "model.safetensors").stat().st_size > 0
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert len(halves) == 2
    assert not (tmp_path / "student").exists()
    AutoModelForCausalLM.from_pretrained(old)


# The Hub

FROM_THE_HUB = """
import json, sys
from huggingface_hub import HfApi
from minitron_hf import PruningPlan, prune_checkpoint
from minitron_hf.errors import MinitronError
source, plan, target = sys.argv[1:]
if source != "-":
    HfApi().create_repo("lab/teacher", exist_ok=True)
    HfApi().upload_folder(repo_id="lab/teacher", folder_path=source)
try:
    prune_checkpoint("lab/teacher", target, PruningPlan.from_pretrained(plan), show_progress=False)
except MinitronError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_a_teacher_on_the_hub(hub_server, tmp_path, size):
    teacher = saved("llama", tmp_path / "teacher", size=size)
    (teacher / "LICENSE").write_text("Apache")
    (teacher / "consolidated.safetensors").write_text("the same again in another layout")
    plan = plan_for(load_model(teacher), hidden_size=24)
    plan.save_pretrained(tmp_path / "plan")

    def run(source: object, target: str, **env: str) -> str:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))},
            **{"HF_ENDPOINT": hub_server.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HOME": str(tmp_path / "home"), **env},
        }
        command = [sys.executable, "-c", FROM_THE_HUB, str(source), str(tmp_path / "plan"), str(tmp_path / target)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert not run(teacher, "student")
    through_memory(teacher, tmp_path / "expected", plan)
    (tmp_path / "student" / "LICENSE").unlink()
    assert_same_files(tmp_path / "expected", tmp_path / "student")
    assert not hub_server.count("GET", "consolidated"), "only what is needed is downloaded"
    if size == "5GB":
        return  # offline, one file is found like many
    assert not run("-", "offline", HF_HUB_OFFLINE="1")
    assert (tmp_path / "offline" / "model.safetensors").is_file()
    assert "HubError" in run("-", "elsewhere", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))


def test_the_student_generates(teacher, plan, tmp_path):
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    expected = apply_plan(load_model(teacher), plan).float()
    tokens = pocket_tokens(2, 5)
    assert torch.equal(student.generate(tokens, max_new_tokens=5), expected.generate(tokens, max_new_tokens=5))


def test_files_are_those_of_safetensors(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{part}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for part, dtype in enumerate(DTYPES.values())
        for name in ("b", "ä", "a", 'with "quotes" \\ and\ttab')
    }
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    found = lazy_tensors(tmp_path / "expected.safetensors")
    streaming._write_safetensors(tmp_path / "made.safetensors", found, streaming.tqdm(disable=True))
    assert filecmp.cmp(tmp_path / "expected.safetensors", tmp_path / "made.safetensors", shallow=False)
    with safe_open(tmp_path / "made.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
