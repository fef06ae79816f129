"""Stages hold the tensors of one row, one batch or one chunk at a time: measured, with unchanged results."""

from __future__ import annotations

import pytest
import torch

from minitron_hf import estimate_importance, evaluate_models
from minitron_hf.data import TokenRows
from minitron_hf.distillation.fake_runs import AllocationCounter
from minitron_hf.distillation.stage_memory import stage_memory
from minitron_hf.distillation.stage_workload import Workload
from minitron_hf.errors import UnsupportedModelError
from minitron_hf.evaluation import quality
from minitron_hf.families import spec_for
from minitron_hf.pruning.candidates import Candidate, Divergence
from minitron_hf.scoring import activations, weights
from minitron_hf.scoring.activations import ActivationPass
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokens


def rows_of(count: int, length: int = 16) -> TokenRows:
    return TokenRows(tuple(tuple(pocket_tokens(length, seed=seed).tolist()) for seed in range(count)), None)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_weights_are_summed_in_chunks(monkeypatch, name):
    """The same scores, and less memory than one tensor in float64."""
    model = pocket_model(name, dtype=torch.float32)
    whole = estimate_importance(model, metric="magnitude")
    monkeypatch.setattr(weights, "CHUNK_VALUES", 100)
    with AllocationCounter([*model.parameters(), *model.buffers()]) as counted:
        chunked = estimate_importance(model, metric="magnitude")
    for axis, values in whole.axes.items():
        torch.testing.assert_close(chunked.axes[axis], values, equal_nan=True)
    torch.testing.assert_close(chunked.blocks, whole.blocks, equal_nan=True)
    largest = max(parameter.numel() for parameter in model.parameters())
    scores = sum(values.nbytes for values in whole.axes.values()) + whole.blocks.nbytes
    assert max(counted.moments) < 8 * largest + 4 * scores


def test_matrices_of_groups_are_kept_up_to_a_limit(monkeypatch):
    """As many bytes as `stage_memory` says; those beyond the limit are computed again, with the same scores."""
    model, rows = pocket_model("llama", dtype=torch.float32), rows_of(3)
    spec, batch = spec_for(model.config), {"input_ids": torch.tensor(rows.rows)}
    load = Workload(dtype=torch.float32, device="cpu")

    def kept() -> int:
        observer = ActivationPass(spec, model, "mean")
        with torch.no_grad(), observer.hooks():
            observer.run(batch)
            observer.run(batch)
        return observer.kept_gram_bytes

    expected = stage_memory(model.config, model.config, load, stages=["score"])["score"]["matrices of groups"]
    assert kept() == expected > 0
    scores = estimate_importance(model, rows, batch_size=1, show_progress=False)
    monkeypatch.setattr(activations, "KEPT_GRAM_BYTES", expected // 2)
    assert 0 < kept() <= expected // 2
    again = estimate_importance(model, rows, batch_size=1, show_progress=False)
    torch.testing.assert_close(again.axes["kv"], scores.axes["kv"], rtol=0, atol=0)


def test_unknown_families_have_the_logits_of_one_row_too(monkeypatch):
    model, rows = pocket_model("llama", dtype=torch.float32), rows_of(4)
    known = evaluate_models({"model": model}, rows, speed=False, show_progress=False)

    def refuse(*_):
        raise UnsupportedModelError("It is unknown.")

    monkeypatch.setattr(quality, "run_backbone", refuse)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(tuple(logits.shape)))
    found = evaluate_models({"model": model}, rows, speed=False, show_progress=False)
    handle.remove()
    assert {shape[0] for shape in shapes} == {1}
    loss = [result["models"]["model"]["metrics"]["loss"]["value"] for result in (known, found)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-6)


def test_candidates_are_measured_batch_by_batch():
    """The hidden states of a student exist for one batch at a time."""
    model = pocket_model("llama", dtype=torch.float32)
    divergence, passes = Divergence(model, rows_of(6), batch_size=2), []
    handle = model.base_model.register_forward_hook(lambda *_: passes.append(1))
    states = divergence._hidden(model)
    assert next(states).shape == (2 * 15, model.config.hidden_size)
    assert len(passes) == 1
    assert len(list(states)) == 2
    handle.remove()


def test_a_divergence_that_is_not_finite_is_refused():
    """NaN has no place in an order: it would be ranked anywhere."""
    model, student = (pocket_model("llama", dtype=torch.float16) for _ in range(2))
    divergence = Divergence(model, rows_of(3))
    with torch.no_grad():
        student.model.norm.weight.fill_(torch.inf)
    candidate = Candidate(PrunerConfig(hidden_size=8), 0)
    with pytest.raises(UnsupportedModelError, match=r"KL of nan.*not finite in torch.float16.*dtype='float32'"):
        divergence(student, candidate)
    assert not candidate.row_sums
