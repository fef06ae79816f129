"""Streamed repairs and changes of basis: the files of the path through memory, byte for byte, layer by layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from minitron_hf.data import TokenRows
from minitron_hf.errors import DataError, OutputError, PlanError, UnsupportedModelError
from minitron_hf.models import load_for_compute, load_model
from minitron_hf.pruning import stored_tensors
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_with_plan
from minitron_hf.pruning.repair import refit, repaired_weights
from minitron_hf.pruning.repair_passes import segments_of
from minitron_hf.pruning.stored_checkpoint import open_checkpoint
from minitron_hf.pruning.stored_layers import computing, in_dtype, is_stored
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.saving import save_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import POCKETS, cuttable, pocket_model, pocket_tokenizer, pocket_tokens
from test_streaming import assert_same_files

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(10, 19)), None)
#: Untied and tied, biases, experts of one module and one by one, gaps before dropped layers, several kinds of layers.
REQUESTS = {
    "llama": {"intermediate_size": 0.5, "num_attention_heads": 0.5, "hidden_size": 0.5, "layers_to_drop": [1]},
    "gemma2": {"intermediate_size": 0.5, "hidden_size": 0.5},
    "gpt2": {"intermediate_size": 0.5, "layers_to_drop": [1, 2]},
    "mixtral": {"num_experts": 0.5, "moe_intermediate_size": 0.5, "hidden_size": 0.5},
    "qwen3_next": {"intermediate_size": 0.5, "hidden_size": 0.5},
}


@pytest.fixture(autouse=True)
def plain_products_of_groups(monkeypatch):
    """Experts of a pocket are too narrow for PyTorch's own product of groups."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_, **__: False)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    pocket_model(name, dtype=dtype, **changes).save_pretrained(folder, max_shard_size="20KB")
    return folder


def planned(teacher: Path, **request) -> PruningPlan:
    model = load_model(teacher)
    rotated = "hidden_basis" in request
    scores = estimate_importance(
        model, ROWS if rotated else None, show_progress=False, hidden_covariance=rotated,
        **({} if rotated else {"metric": "random", "seed": 3}),
    )  # fmt: skip
    return make_plan(model, PrunerConfig(**{"repair": "least_squares_all", **request}, multiple_of=1), scores)


def streamed(teacher: Path, target: Path, plan: PruningPlan, data=ROWS, **arguments) -> Path:
    return prune_checkpoint(teacher, target, plan, data=data, batch_size=4, show_progress=False, **arguments)


def through_memory(teacher: Path, target: Path, plan: PruningPlan, **arguments) -> Path:
    """The oracle: load all of it, repair, cut, save in the stored dtype."""
    stored = load_model(teacher).dtype
    data = ROWS if plan.repair else None
    student = prune_with_plan(load_for_compute(teacher), plan, data, batch_size=4, **arguments)
    save_model(student.to(stored), target)
    plan.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", REQUESTS)
def test_files_are_those_of_a_repair_in_memory(name: str, tmp_path: Path):
    teacher = saved(name, tmp_path / "teacher")
    plan = planned(teacher, **REQUESTS[name])
    assert plan.repair == "least_squares_all"
    streamed(teacher, tmp_path / "student", plan)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")


@pytest.mark.slow
@pytest.mark.parametrize("name", POCKETS)
def test_every_family_is_repaired_alike_or_refused_by_name(name: str, tmp_path: Path):
    teacher = saved(name, tmp_path / "teacher")
    sizes = ("intermediate_size", "moe_intermediate_size", "num_experts", "hidden_size")
    request = {size: 0.5 for size in sizes if size in cuttable(name)}
    plan = planned(teacher, **request)
    if name in READ_MORE:
        with pytest.raises(UnsupportedModelError, match=r"cannot run one by one.*--in-memory"):
            streamed(teacher, tmp_path / "student", plan)
        assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
        return
    if plan.repair:
        streamed(teacher, tmp_path / "student", plan)
        expected = through_memory(teacher, tmp_path / "expected", plan)
        own, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "student", expected))
        assert own.keys() == other.keys()
        for key, weight in own.items():  # processors without bfloat16 may round once more
            torch.testing.assert_close(weight, other[key], rtol=2**-7, atol=1e-3)


#: Their layers read what an earlier one has chosen, beside the residual stream.
READ_MORE = {"glm_moe_dsa", "hy_v4"}


def test_a_layer_that_reads_more_than_the_one_before_returns_is_refused(tmp_path: Path):
    """The test of a short pass sees it: in a model of four layers, the last one reads what the first has noted."""
    teacher = saved("llama", tmp_path / "teacher", num_hidden_layers=4)
    plan = planned(teacher, intermediate_size=0.5, repair="least_squares")
    model = open_checkpoint(teacher)
    first, last, noted = model.model.layers[0], model.model.layers[3], {}
    first.register_forward_hook(lambda _, args, output: noted.update(x=output.clone()))
    last.register_forward_hook(lambda _, args, output: output + noted.pop("x", 0))
    with pytest.raises(UnsupportedModelError, match=r"Layer 3 of this LlamaForCausalLM.*--in-memory"):
        list(refit(model, plan, ROWS, processing_class=None))


@pytest.mark.parametrize("bf16", [True, False])
def test_weights_are_computed_as_load_for_compute_would_and_stored_as_the_teacher(bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_hf.hardware._cpu_has_bf16", lambda: bf16)
    teacher = saved("llama", tmp_path / "teacher", torch.bfloat16)
    plan = planned(teacher, intermediate_size=0.5, hidden_size=0.5, norm_compensation=True)
    streamed(teacher, tmp_path / "student", plan)
    assert {tensor.dtype for tensor in load_file(tmp_path / "student" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=", ".join
)
@pytest.mark.parametrize("repair", [None, "least_squares_all"])
def test_a_change_of_basis_is_streamed(changes: dict[str, bool], repair: str | None, tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher", **changes)
    plan = planned(teacher, hidden_size=0.5, hidden_basis="principal", repair=repair)
    assert plan.basis is not None
    arguments = {"data": ROWS, "batch_size": 4} if repair else {}
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False, **arguments)
    assert_same_files(through_memory(teacher, tmp_path / "expected", plan), tmp_path / "student")


def test_one_pass_finds_what_reads_the_norms(tmp_path: Path):
    """Of the teacher, for its rotation, the repair of the rotated one, and the surgery."""
    teacher = load_model(saved("llama", tmp_path / "teacher"))
    plan, lengths = planned(tmp_path / "teacher", hidden_size=0.5, hidden_basis="principal"), []
    teacher.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    prune_with_plan(teacher, plan, ROWS)
    prune_with_plan(teacher, plan, ROWS)
    assert lengths == [(1, 8)]


def test_a_limit_takes_more_passes_over_a_layer_and_gives_the_same(tmp_path: Path, monkeypatch):
    """With a limit of a byte each input is summed alone; every layer is read once per group and sweep."""
    teacher = saved("llama", tmp_path / "teacher")
    plan = planned(teacher, intermediate_size=0.5, num_attention_heads=0.5, layers_to_drop=[1])
    streamed(teacher, tmp_path / "student", plan)
    streamed(teacher, tmp_path / "limited", plan, memory_limit=1)
    assert_same_files(tmp_path / "student", tmp_path / "limited")


def test_the_tensors_of_one_layer_are_read_at_a_time(tmp_path: Path, monkeypatch):
    """Layers run one after the other, each for all batches; a layer that was let go is not called again."""
    teacher = saved("llama", tmp_path / "teacher", num_hidden_layers=5)
    plan = planned(teacher, intermediate_size=0.5, layers_to_drop=[2, 3])
    model, calls = open_checkpoint(teacher), []

    def held() -> list[int]:
        return [
            index
            for index, layer in enumerate(model.model.layers)
            if not any(isinstance(tensor, stored_tensors.LazyTensor) for tensor in layer.parameters())
        ]

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append((index, tuple(held()))))
    names = [name for name, _ in refit(model, plan, ROWS, processing_class=None, batch_size=4, ridge=1e-3)]
    assert [name.split(".")[2] for name in names] == ["0", "1", "4"]
    # Gaps and the pass that tests run once; three batches and the test of every segment, the gap within one.
    one, gap = [(0, (0,))] * 4, [(1, (1, 2, 3)), (2, (1, 2, 3)), (3, (1, 2, 3))] * 4
    assert calls[-(4 + 12 + 4) :] == [*one, *gap, *[(4, (4,))] * 4]
    assert not held()
    assert all(isinstance(tensor, stored_tensors.LazyTensor) for tensor in model.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_neurons_of_a_streamed_teacher_are_refitted_as_by_lstsq(tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher")
    plan = planned(teacher, intermediate_size=0.5, repair="least_squares")
    streamed(teacher, tmp_path / "student", plan, ridge=1e-12)
    model, student = load_model(teacher).double(), load_file(tmp_path / "student" / "model.safetensors")
    for layer in plan.layers_kept:
        path, seen = f"model.layers.{layer}.mlp.down_proj", []
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(torch.tensor(ROWS.rows))
        x, kept = seen[0].flatten(0, -2).numpy(), plan.kept["ffn"][layer]
        wanted = x @ model.get_submodule(path).weight.detach().numpy().T
        expected = np.linalg.lstsq(x[:, kept], wanted, rcond=None)[0]
        np.testing.assert_allclose(student[f"{path}.weight"].numpy().T, expected, rtol=1e-3, atol=1e-4)


def test_texts_are_tokenised_with_the_teachers_tokenizer(tmp_path: Path):
    teacher = saved("llama", tmp_path / "teacher")
    pocket_tokenizer().save_pretrained(teacher)
    plan, texts = planned(teacher, intermediate_size=0.5), ["The cat sat on the mat. " * 20] * 4
    rows = {"max_length": 16, "num_rows": 8}
    streamed(teacher, tmp_path / "student", plan, texts, **rows)
    streamed(teacher, tmp_path / "given", plan, texts, processing_class=pocket_tokenizer(), **rows)
    assert_same_files(tmp_path / "student", tmp_path / "given")


def test_padded_batches_of_a_loader(tmp_path: Path):
    """Masks and positions are those of each batch."""
    teacher = saved("llama", tmp_path / "teacher")
    plan, ids = planned(teacher, intermediate_size=0.5), pocket_tokens(6, 9)
    mask = torch.ones_like(ids)
    mask[::2, :3] = 0
    batches = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(2), mask.split(2))]
    loader = DataLoader(batches, batch_size=None)
    prune_checkpoint(teacher, tmp_path / "student", plan, data=loader, show_progress=False)
    save_model(prune_with_plan(load_model(teacher), plan, loader), tmp_path / "expected")
    plan.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "expected", tmp_path / "student")


def test_what_cannot_be_repaired_leaves_no_files(tmp_path: Path, monkeypatch):
    teacher = saved("llama", tmp_path / "teacher")
    plan, plain = (planned(teacher, intermediate_size=0.5, repair=repair) for repair in ("least_squares", None))
    target = tmp_path / "student"
    with pytest.raises(PlanError, match=r"needs calibration data.*data=texts"):
        prune_checkpoint(teacher, target, plan)
    with pytest.raises(PlanError, match="no repair, so data, ridge would have no effect"):
        prune_checkpoint(teacher, target, plain, data=ROWS, ridge=1.0)
    with pytest.raises(DataError, match="memory_limit=0"):
        streamed(teacher, target, plan, memory_limit=0)
    with pytest.raises(DataError, match="tokenizer"):
        streamed(teacher, target, plan, ["some text"], processing_class=None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("minitron_hf.pruning.streaming.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="bytes, and the disk"):
        streamed(teacher, target, plan)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_refitted_weights_that_wait_need_room_on_the_disk(name, tmp_path: Path, monkeypatch):
    """As many bytes as their files hold; GPT-2 has biases, too."""
    teacher = saved(name, tmp_path / "teacher")
    plan = planned(teacher, intermediate_size=0.5, repair="least_squares")
    refitted = repaired_weights(load_model(teacher), plan, ROWS, show_progress=False)
    waiting = sum(tensor.nbytes for tensor in refitted.values())
    weights = sum(
        one.nbytes for one in load_file(streamed(teacher, tmp_path / "first", plan) / "model.safetensors").values()
    )
    copied = sum(path.stat().st_size for path in teacher.iterdir() if path.name.startswith("tok"))
    for free, fits in ((weights + copied + waiting + 50_000, True), (weights + copied + waiting - 1, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr("minitron_hf.pruning.streaming.shutil.disk_usage", lambda _, usage=usage: usage)
        if fits:
            streamed(teacher, tmp_path / "fits", plan)
            continue
        with pytest.raises(OutputError, match=f"its refitted weights {waiting:,} meanwhile"):
            streamed(teacher, tmp_path / "student", plan)
    assert not (tmp_path / "student").exists()


def test_a_stored_model_computes_what_a_loaded_one_does(tmp_path: Path):
    teacher, ids = saved("gemma2", tmp_path / "teacher", torch.bfloat16), pocket_tokens(2, 7)
    model, loaded = in_dtype(open_checkpoint(teacher), torch.float32), load_model(teacher).float()
    with torch.no_grad(), computing(model):
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert is_stored(model)
    assert not is_stored(loaded)


def test_segments_are_layers_and_gaps():
    class Cut:
        def __init__(self, layer, last=None):
            self.layer = layer
            self.gap = None if last is None else type("Gap", (), {"last": last})

    cuts = [Cut(0), Cut(1, last=3), Cut(4), Cut(6)]
    assert segments_of(cuts, 6) == [range(1), range(1, 4), range(4, 5), range(5, 6)]
