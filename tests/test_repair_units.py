"""Repairs of units beside neurons and heads of a plain decoder: against numpy's least squares, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_hf.data import TokenRows
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(24, 19)), None)


def planned(model, **request) -> PruningPlan:
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**{"repair": "least_squares", **request}, multiple_of=1), scores)


def seen_by(model, path: str) -> list[np.ndarray]:
    """The inputs of a module in a forward pass, [tokens, width] each."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.no_grad():
        model(torch.tensor(ROWS.rows))
    handle.remove()
    return [x.flatten(0, -2).double().numpy() for x in seen]


def weight(model, path: str) -> np.ndarray:
    return model.get_submodule(path).weight.detach().double().numpy().T


#: Pocket, cut, projection of a layer, and the norm with a gate before it.
CASES = [
    ("falcon_h1", {"mamba_num_heads": 0.5}, "model.layers.0.mamba.out_proj", "model.layers.0.mamba.norm"),
    ("nemotron_h", {"mamba_num_heads": 0.5}, "model.layers.0.mixer.out_proj", "model.layers.0.mixer.norm"),
    ("solar_open", {"shared_expert_intermediate_size": 0.5}, "model.layers.0.mlp.shared_experts.down_proj", ""),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0.5}, "model.layers.1.mlp.shared_expert.down_proj", ""),
    ("deepseek_v3", {"num_attention_heads": 0.5}, "model.layers.0.self_attn.o_proj", ""),
    ("qwen3-biases-tied", {"num_key_value_heads": 0.5}, "model.layers.0.self_attn.o_proj", ""),
    ("mamba", {"intermediate_size": 0.5}, "backbone.layers.0.mixer.x_proj", ""),
]


@pytest.mark.parametrize(("name", "cut", "path", "norm"), CASES)
def test_units_are_refitted_as_by_lstsq(name: str, cut: dict, path: str, norm: str):
    """The student's own inputs, on the teacher's stream, are fitted to the outputs of the teacher's projection."""
    teacher = pocket_model(name)
    plan = planned(teacher, **cut)
    plain = apply_plan(teacher, planned(teacher, **cut, repair=None))
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-13))
    [x], module = seen_by(teacher, path), teacher.get_submodule(path)
    wanted = x @ weight(teacher, path)
    # An independent way to the kept inputs: the columns of the plain student's weight among those of the teacher's.
    columns = [int(np.abs(weight(teacher, path) - row).sum(1).argmin()) for row in weight(plain, path)]
    inputs = x[:, columns]
    if norm:
        state, gate = (torch.tensor(each[:, columns]) for each in seen_by(teacher, norm))
        with torch.no_grad():
            inputs = plain.get_submodule(norm)(state[None], gate[None])[0].numpy()
    if module.bias is not None:
        wanted = wanted + module.bias.detach().numpy()
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    expected = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]

    def output(model) -> np.ndarray:
        found = model.get_submodule(path)
        rows = [weight(model, path), *([found.bias.detach().numpy()[None]] if found.bias is not None else [])]
        return inputs @ np.vstack(rows)

    np.testing.assert_allclose(output(student), expected, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    errors = [np.linalg.norm(output(model) - wanted) for model in (student, plain)]
    assert errors[0] < 0.97 * errors[1]
