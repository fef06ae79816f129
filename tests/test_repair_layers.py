"""Projections that make up for the dropped layers after them: against numpy's least squares, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_hf.data import TokenRows
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_with_plan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.repair_gaps import find_gaps
from minitron_hf.pruning.repair_solve import RIDGES
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(24, 19)), None)


def planned(model, **request) -> PruningPlan:
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**{"repair": "least_squares", **request}, multiple_of=1), scores)


def observed(model, *paths: str, rows: TokenRows = ROWS) -> list[np.ndarray]:
    """The first input of each of some modules, and the output of the last, [tokens, width]."""
    seen = {}

    def before(path):
        def hook(_, args, kwargs):
            seen[path] = args[0] if args else kwargs["hidden_states"]

        return hook

    def after(_, __, output):
        seen["output"] = output[0] if isinstance(output, tuple) else output

    modules = [model.get_submodule(path) for path in paths]
    handles = [
        module.register_forward_pre_hook(before(path), with_kwargs=True) for path, module in zip(paths, modules)
    ]
    handles.append(modules[-1].register_forward_hook(after))
    with torch.no_grad():
        model(torch.tensor(rows.rows))
    for handle in handles:
        handle.remove()
    return [seen[name].flatten(0, -2).double().numpy() for name in (*paths, "output")]


def matrix(model, path: str) -> np.ndarray:
    weight = model.get_submodule(path).weight.detach().double().numpy()
    return weight if "c_proj" in path else weight.T


def bias(model, path: str) -> np.ndarray | float:
    found = model.get_submodule(path).bias
    return 0.0 if found is None else found.detach().double().numpy()


#: Pocket → the projection of layer 0 that makes up for the layers after it, and what its layer multiplies it by.
WRITERS = {
    "llama": ("model.layers.0.mlp.down_proj", lambda config: 1.0),
    "gpt2": ("transformer.h.0.mlp.c_proj", lambda config: 1.0),
    "phi": ("model.layers.0.mlp.fc2", lambda config: 1.0),  # beside its attention, not after it
    "granite": ("model.layers.0.mlp.down_proj", lambda config: config.residual_multiplier),
    "mamba2": ("backbone.layers.0.mixer.out_proj", lambda config: 1.0),
}


@pytest.mark.parametrize("cut", [{}, {"intermediate_size": 0.5}])
@pytest.mark.parametrize("name", WRITERS)
def test_dropped_layers_are_made_up_for_as_by_lstsq(name: str, cut: dict):
    if cut and name == "mamba2":
        pytest.skip("has no neurons")
    teacher = pocket_model(name)
    path, factor = WRITERS[name]
    layers, dropped = (
        path.rpartition(".0.")[0],
        [1, 2] if len(teacher.get_submodule(path.split(".0.")[0])) > 3 else [1],
    )
    plan = planned(teacher, layers_to_drop=dropped, **cut)
    x, before, _, after = observed(teacher, path, f"{layers}.{dropped[0]}", f"{layers}.{dropped[-1]}")
    wanted = x @ matrix(teacher, path) + bias(teacher, path) + (after - before) / factor(teacher.config)
    kept = plan.kept["ffn"][0] if cut else np.arange(x.shape[1])
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-13))
    plain = apply_plan(teacher, planned(teacher, layers_to_drop=dropped, **cut, repair=None))
    constant = np.ones((len(x), 1)) if teacher.get_submodule(path).bias is not None else np.zeros((len(x), 0))
    best = np.hstack([x[:, kept], constant])
    expected = best @ np.linalg.lstsq(best, wanted, rcond=None)[0]
    found, uncorrected = (x[:, kept] @ matrix(one, path) + bias(one, path) for one in (student, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(found - wanted) < 0.99 * np.linalg.norm(uncorrected - wanted)
    changed = {f"{path}.{part}" for part in ("weight", "bias")}
    if not cut:
        for (parameter, one), two in zip(plain.named_parameters(), student.parameters(), strict=True):
            assert torch.equal(one, two) == (parameter not in changed), parameter


def test_few_tokens_are_reproduced_exactly():
    """With fewer tokens than inputs, the streams after the dropped layers are equal there, and so are all logits."""
    teacher = pocket_model("llama")
    width, depth = teacher.config.intermediate_size, teacher.config.num_hidden_layers
    rows = TokenRows((ROWS.rows[0][: min(19, width - 1)],), None)
    plan = planned(teacher, layers_to_drop=[*range(1, depth - 1)])
    student, plain = (
        apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, rows, ridge=ridge))
        for ridge in (1e-14, 1e9)
    )
    ids = torch.tensor(rows.rows)
    with torch.no_grad():
        expected, found, without = (model(ids).logits for model in (teacher, student, plain))
    assert (without - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_add_nothing_change_nothing():
    teacher = pocket_model("llama")
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.get_submodule(f"model.layers.1.{path}").weight.data.zero_()
    plan = planned(teacher, layers_to_drop=[1])
    repaired = repaired_weights(teacher, plan, ROWS)
    for name, weight in repaired.items():
        torch.testing.assert_close(weight, dict(teacher.named_parameters())[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("gemma2", [1]), ("olmo2", [1]), ("gemma3n_text", [1]), ("llama", [0])],
)
def test_nothing_makes_up_for_layers_where_no_projection_can(name: str, dropped: list[int], caplog):
    """A norm is between the projection and the stream; or several streams; or no layer is before. Plans note it."""
    teacher = pocket_model(name)
    plan = planned(teacher, layers_to_drop=dropped, keep_first_layers=0)
    assert find_gaps(teacher, plan) == {}
    assert repaired_weights(teacher, plan, ROWS) == {}
    note = f"nothing makes up for layer {dropped[0]}:"
    assert note in caplog.text
    notes = prune_with_plan(teacher, plan, ROWS).pruning_plan.notes
    assert notes[: len(plan.notes)] == plan.notes
    assert [note in one for one in notes[len(plan.notes) :]] == [True]


def test_every_run_of_layers_has_a_projection_of_its_own():
    teacher = pocket_model("llama", num_hidden_layers=7)
    plan = planned(teacher, layers_to_drop=[1, 3, 4, 6], keep_last_layers=0)
    found = find_gaps(teacher, plan)
    assert {path: (gap.first, gap.last, gap.factor) for path, (_, _, gap) in found.items()} == {
        f"model.layers.{before}.mlp.down_proj": (first, last, pytest.approx(1.0))
        for before, first, last in ((0, 1, 1), (2, 3, 4), (5, 6, 6))
    }
    whole = repaired_weights(teacher, plan, ROWS, ridge=1e-3, batch_size=24)
    passes = repaired_weights(teacher, plan, ROWS, ridge=1e-3, batch_size=24, memory_limit=1)
    assert whole.keys() == {f"{path}.weight" for path in found}
    assert all(torch.equal(whole[name], passes[name]) for name in whole)


def test_held_out_rows_choose_the_ridge(monkeypatch):
    teacher = pocket_model("llama")
    plan = planned(teacher, layers_to_drop=[1], intermediate_size=0.5)
    path, kept = "model.layers.0.mlp.down_proj", plan.kept["ffn"][0]
    x, before, after = observed(teacher, path, "model.layers.1")
    cut = np.setdiff1d(np.arange(x.shape[1]), kept)
    target = x[:, cut] @ matrix(teacher, path)[cut] + after - before
    is_held = np.repeat(np.arange(len(ROWS.rows)) % 4 == 3, len(ROWS.rows[0]))
    errors = {}
    for ridge in RIDGES:
        fitted = x[~is_held][:, kept]
        gram = fitted.T @ fitted
        gram += ridge * np.mean(np.diag(gram)) * np.eye(len(kept))
        change = np.linalg.solve(gram, fitted.T @ target[~is_held])
        errors[ridge] = np.linalg.norm(x[is_held][:, kept] @ change - target[is_held])
    best = min(errors, key=errors.get)
    monkeypatch.setattr("minitron_hf.pruning.repair.NUM_PROBES", 1)
    chosen, given = (repaired_weights(teacher, plan, ROWS, ridge=ridge)[f"{path}.weight"] for ridge in (None, best))
    torch.testing.assert_close(chosen, given, rtol=1e-9, atol=1e-12)
