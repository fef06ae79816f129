"""Models that do not fit into memory: scored, planned and cut like those that do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_hf import (
    PrunerConfig,
    apply_plan,
    estimate_importance,
    make_plan,
    models,
    plan_for_target,
    prune_model,
    repaired_weights,
    weights,
)
from minitron_hf.data import TokenRows
from minitron_hf.errors import MismatchError, PlanError, UnsupportedModelError
from pocket import cuttable, pocket_model, pocket_tokens

ROWS = [pocket_tokens(40, seed=seed).tolist() for seed in range(3)]
#: Untied, tied, and experts that are stacked while they are loaded; where weights are kept.
CASES = {
    "disk": ["llama", "gpt2", "gemma2", "mixtral"],
    "disk, embeddings too": ["llama", "gemma2"],
    "memory": ["llama", "gpt2", "mixtral"],
}


@pytest.fixture(params=[(where, name) for where, names in CASES.items() for name in names], ids=", ".join)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with most of its weights elsewhere, and the same model in memory."""
    where, name = request.param
    model = pocket_model(name, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    if where == "memory":
        offloaded = pocket_model(name, dtype=torch.float32)
        offloaded.save_pretrained(tmp_path / "model")  # as the other was, which completes its config
        cpu_offload(offloaded, execution_device="cpu")
    else:
        placed = {"device_map": "auto", "max_memory": {"cpu": model.get_memory_footprint() // 2}}
        if where != "disk":
            layers = {f"model.layers.{index}": "disk" for index in range(1, model.config.num_hidden_layers)}
            others = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "lm_head": "disk", "model.norm": "cpu"}
            placed = {"device_map": {**others, "model.layers.0": "cpu", **layers}}
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            **placed,
            offload_folder=tmp_path / "offload",
            attn_implementation="eager",
            experts_implementation="eager",
        )
    missing = [parameter.is_meta for parameter in offloaded.parameters()]
    assert sum(missing) > len(missing) / 2
    assert weights.tensor_values(offloaded, "lm_head.weight").isfinite().all()
    return offloaded, model


def elsewhere(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


def test_scores_plans_and_students_are_the_same(pair):
    offloaded, model = pair
    before = elsewhere(offloaded)
    assert not weights.on_meta(offloaded)
    for embeddings in (True, False):
        counts = {models.count_parameters(m, embeddings=embeddings) for m in pair}
        assert len(counts) == 1
    assert weights.model_digest(offloaded) == weights.model_digest(model)
    found, expected = (estimate_importance(m, ROWS, max_length=20, batch_size=4, show_progress=False) for m in pair)
    assert found.digests == expected.digests
    assert found.digest == expected.digest

    cut = cuttable(next(name for name in ("mixtral", "gpt2", "llama", "gemma2") if name == model.config.model_type))
    config = PrunerConfig(
        **{
            name: 0.5
            for name in ("intermediate_size", "moe_intermediate_size", "num_experts", "num_hidden_layers")
            if name in cut
        },
        multiple_of=1,
    )
    plan = make_plan(offloaded, config, found)
    student, same = apply_plan(offloaded, plan), apply_plan(model, make_plan(model, config, expected))
    assert plan.digest == same.pruning_plan.digest
    assert not any(parameter.is_meta for parameter in student.parameters())
    assert weights.model_digest(student) == weights.model_digest(same)
    tokens = pocket_tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, same(tokens).logits)
    assert elsewhere(offloaded) == before


def test_other_weights_are_noticed(pair):
    offloaded, model = pair
    scores = estimate_importance(offloaded, metric="random")
    scores.require_model(model)
    scores.require_model(offloaded)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with pytest.raises(MismatchError, match="other weights"):
        scores.require_model(model)
    with pytest.raises(MismatchError, match="other weights"):
        estimate_importance(model, metric="random").require_model(offloaded)


def test_a_basis_is_refused_before_the_scoring():
    for tied in (False, True):
        offloaded = pocket_model("llama", dtype=torch.float32, tie_word_embeddings=tied)
        cpu_offload(offloaded, execution_device="cpu")
        request = PrunerConfig(hidden_size=0.5, hidden_basis="principal")
        with pytest.raises(PlanError, match="needs the whole teacher in memory"):
            prune_model(offloaded, request, calibration_data=ROWS, metric="not reached")
        scores = estimate_importance(offloaded, ROWS, hidden_covariance=True, max_length=40, show_progress=False)
        with pytest.raises(PlanError, match="needs the whole teacher in memory"):
            make_plan(offloaded, request, scores)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_measured_with_an_offloaded_head(tied):
    model, offloaded = (pocket_model("llama", dtype=torch.float32, tie_word_embeddings=tied) for _ in range(2))
    cpu_offload(offloaded, execution_device="cpu")
    request = PrunerConfig(target_parameters=0.7, multiple_of=1)
    scores = estimate_importance(model, metric="random")
    rows = TokenRows(tuple(map(tuple, ROWS)), None)
    plans = [plan_for_target(each, request, scores, rows, show_progress=False) for each in (offloaded, model)]
    assert plans[0].sizes == plans[1].sizes
    kls = [[candidate["proxy"]["value"] for candidate in plan.candidates] for plan in plans]
    assert kls[0] == pytest.approx(kls[1], rel=1e-5)


def test_only_a_model_on_several_devices_is_moved(monkeypatch):
    model, moved = pocket_model("llama", dtype=torch.float32), []
    monkeypatch.setattr(type(model), "to", lambda self, device: moved.append(device))
    weights.put_on_one_device(model, torch.device("cpu"))
    model.model.layers[1] = model.model.layers[1].to("meta")
    weights.put_on_one_device(model, torch.device("cpu"))
    assert moved == [torch.device("cpu")]


def test_an_offloaded_model_is_repaired_alike():
    """A pass ends inside the model, before Accelerate's hooks of the later modules."""
    model, offloaded = (pocket_model("llama", dtype=torch.float32) for _ in range(2))
    cpu_offload(offloaded, execution_device="cpu")
    before = elsewhere(offloaded)
    scores = estimate_importance(model, metric="random")
    plan = make_plan(model, PrunerConfig(intermediate_size=0.5, repair="least_squares", multiple_of=1), scores)
    rows = TokenRows(tuple(map(tuple, ROWS)), None)
    found, expected = (repaired_weights(each, plan, rows, memory_limit=1) for each in (offloaded, model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert elsewhere(offloaded) == before
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_an_offloaded_router_cannot_be_masked():
    model = pocket_model("mixtral", dtype=torch.float32)
    cpu_offload(model, execution_device="cpu")
    scores = estimate_importance(model, metric="random")
    plan = make_plan(model, PrunerConfig(num_experts=4, repair="least_squares"), scores)
    rows = TokenRows(tuple(map(tuple, ROWS)), None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.\S+ is offloaded.*prune_checkpoint"):
        repaired_weights(model, plan, rows)
