"""Refitted output projections against numpy's least squares on the activations themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_hf.data import TokenRows
from minitron_hf.errors import PlanError
from minitron_hf.importance import estimate_importance
from minitron_hf.planning import PrunerConfig, make_plan
from minitron_hf.repair import repaired_weights
from minitron_hf.surgery import apply_plan, prune_model
from pocket import pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(24, 19)), None)


def planned(model, **request):
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**request, multiple_of=1), scores)


def inputs(model, path: str) -> np.ndarray:
    """What a projection is given, [tokens, inputs]."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(torch.tensor(ROWS.rows))
    handle.remove()
    return seen[0].flatten(0, -2).double().numpy()


@pytest.mark.parametrize(
    ("name", "writer"), [("llama", "model.layers.{}.mlp.down_proj"), ("gpt2", "transformer.h.{}.mlp.c_proj")]
)
def test_neurons_are_refitted_as_by_lstsq(name: str, writer: str):
    teacher = pocket_model(name)
    plan = planned(teacher, intermediate_size=0.5)
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-12))
    plain = apply_plan(teacher, plan)
    for layer in plan.layers_kept:
        path = writer.format(layer)
        x, kept = inputs(teacher, path), plan.kept["ffn"][layer]

        def matrix(model, path=path):
            weight = model.get_submodule(path).weight.detach().numpy()
            return weight if name == "gpt2" else weight.T

        wanted = x @ matrix(teacher)
        expected = np.linalg.lstsq(x[:, kept], wanted, rcond=None)[0]
        np.testing.assert_allclose(matrix(student), expected, rtol=1e-5, atol=1e-7)
        errors = [np.linalg.norm(x[:, kept] @ matrix(model) - wanted) for model in (student, plain)]
        assert errors[0] < 0.99 * errors[1]


def test_heads_are_refitted_and_channels_cut_as_planned():
    teacher = pocket_model("llama")
    plan = planned(teacher, num_attention_heads=0.5, hidden_size=0.5)
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-12))
    path, channels = "model.layers.0.self_attn.o_proj", plan.kept["hidden"]
    x = inputs(teacher, path)
    width = x.shape[1] // plan.sizes["heads"]["teacher"]
    kept = np.concatenate([np.arange(head * width, (head + 1) * width) for head in plan.kept["heads"][0]])
    wanted = x @ teacher.get_submodule(path).weight.detach().numpy().T
    expected = np.linalg.lstsq(x[:, kept], wanted, rcond=None)[0][:, channels]
    factor = plan.scales.get("self_attn.o_proj.weight", 1.0)
    found = student.get_submodule(path).weight.detach().numpy().T
    np.testing.assert_allclose(found, factor * expected, rtol=1e-5, atol=1e-7)


def test_nothing_to_refit_without_a_cut_of_units():
    teacher = pocket_model("llama")
    assert repaired_weights(teacher, planned(teacher, hidden_size=0.5), ROWS) == {}


def test_experts_are_refused_by_name():
    teacher = pocket_model("mixtral")
    plan = planned(teacher, num_experts=0.5)
    with pytest.raises(PlanError, match="experts"):
        repaired_weights(teacher, plan, ROWS)


def test_prune_model_repairs_and_notes_it():
    teacher = pocket_model("llama")
    request = PrunerConfig(intermediate_size=0.5, multiple_of=1)
    plain, student = (
        prune_model(teacher, request, calibration_data=ROWS, repair=repair) for repair in (None, "least_squares")
    )
    assert any("least squares" in note for note in student.pruning_plan.notes)
    changed = [
        name
        for (name, one), two in zip(plain.named_parameters(), student.parameters(), strict=True)
        if not torch.equal(one, two)
    ]
    assert changed == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(len(plain.model.layers))]
    with pytest.raises(PlanError, match="calibration_data"):
        prune_model(teacher, request, scores=estimate_importance(teacher, metric="random"), repair="least_squares")
