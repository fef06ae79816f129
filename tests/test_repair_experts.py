"""Refitted down projections of routed experts: against numpy's least squares on what the student routes, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_hf.data import TokenRows
from minitron_hf.distillation.stage_repair import expected_cut_inputs
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.repair_inputs import cut_inputs
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(40, 19)), None)


def planned(model, **request) -> PruningPlan:
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**{"repair": "least_squares", **request}, multiple_of=1), scores)


def states(model, path: str) -> torch.Tensor:
    """What a module is given, [B, T, H]."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor(ROWS.rows))
    handle.remove()
    return seen[0]


@torch.no_grad()
def run(block, x: torch.Tensor) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
    """Output of the experts of a block, [N, H], and what they are given: states, choices and weights of tokens."""
    seen = {}
    handle = block.experts.register_forward_hook(lambda _, args, output: seen.update(args=args, output=output))
    block(x)
    handle.remove()
    return seen["output"].reshape(-1, seen["output"].shape[-1]).numpy(), seen["args"]


def inner(experts, index: int, x: torch.Tensor) -> np.ndarray:
    gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[index]).chunk(2, dim=-1)
    return (experts.act_fn(gate) * up).detach().numpy()


#: Pocket, cut, index of a layer with experts.
CASES = [
    ("mixtral", {"num_experts": 0.5}, 0),
    ("mixtral", {"moe_intermediate_size": 0.5}, 1),
    ("qwen3_moe", {"moe_intermediate_size": 0.5, "num_experts": 0.5}, 1),
    ("deepseek_v3", {"num_experts": 0.5}, 2),
]


@pytest.mark.parametrize(("name", "cut", "layer"), CASES)
def test_experts_are_refitted_as_by_lstsq(name: str, cut: dict, layer: int):
    """Every expert fits, on the tokens that the student gives it, what it lacks and its share of what all lack."""
    teacher = pocket_model(name)
    plan = planned(teacher, **cut)
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-13))
    plain = apply_plan(teacher, planned(teacher, **cut, repair=None))
    path = f"model.layers.{layer}.mlp"
    block, own, refitted = (model.get_submodule(path) for model in (teacher, plain, student))
    x = states(teacher, path)
    wanted, _ = run(block, x)
    _, (given, chosen, weights) = run(own, x)
    kept = plan.kept_in(layer)
    experts = kept.get("experts", np.arange(len(block.experts.down_proj)))
    down = block.experts.down_proj.detach().numpy()
    whole = np.zeros_like(wanted)  # the kept experts as the student chooses them, with all their neurons
    inputs = {}
    for row, expert in enumerate(experts):
        tokens, places = np.nonzero(chosen.numpy() == row)
        weight_n1 = weights.numpy()[tokens, places][:, None]
        inputs[row] = tokens, weight_n1 * inner(block.experts, int(expert), given[tokens])
        np.add.at(whole, tokens, inputs[row][1] @ down[expert].T)
    share = (wanted - whole) / chosen.shape[1]
    assert "experts" in kept or np.abs(share).max() < 1e-9
    for row, (tokens, z) in inputs.items():
        neurons = kept["moe_ffn"][row] if "moe_ffn" in kept else np.arange(z.shape[1])
        if len(tokens) <= len(neurons):
            continue
        target = z @ down[experts[row]].T + share[tokens]
        expected = np.linalg.lstsq(z[:, neurons], target, rcond=None)[0]
        values = refitted.experts.down_proj[row].detach().numpy().T
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    errors = [np.linalg.norm(run(each, x)[0] - wanted) for each in (refitted, own)]
    assert errors[0] < 0.98 * errors[1]
    before = dict(plain.named_parameters())
    changed = {parameter for parameter, one in student.named_parameters() if not torch.equal(one, before[parameter])}
    assert all(parameter.endswith("experts.down_proj") for parameter in changed)


def test_dropped_duplicates_change_nothing():
    """Each dropped expert equals a kept one: with one expert a token, the student is the teacher, and stays it."""
    teacher = pocket_model("mixtral", num_experts_per_tok=1)
    kept = planned(teacher, num_experts=0.5).kept["experts"]
    for layer, block in enumerate(each.mlp for each in teacher.model.layers):
        dropped = np.setdiff1d(np.arange(len(block.experts.down_proj)), kept[layer])
        for one, other in zip(dropped, kept[layer]):
            for weight in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
                weight.data[one] = weight.data[other]
    plan = planned(teacher, num_experts=0.5)
    assert np.array_equal(plan.kept["experts"], kept)
    repaired = repaired_weights(teacher, plan, ROWS)
    for name, weight in repaired.items():
        torch.testing.assert_close(weight, dict(teacher.named_parameters())[name].detach(), rtol=1e-9, atol=1e-9)
    student = apply_plan(teacher, plan, repaired=repaired)
    ids = torch.tensor(ROWS.rows)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-9, atol=1e-9)


def test_passes_and_batches_do_not_matter():
    """Experts of a layer in passes of their own, beside heads that are cut, too; held-out rows choose the ridges."""
    teacher = pocket_model("qwen3_moe")
    plan = planned(teacher, num_experts=0.5, num_attention_heads=0.5)
    whole = repaired_weights(teacher, plan, ROWS)
    for arguments in ({"memory_limit": 1}, {"batch_size": 7}):
        parts = repaired_weights(teacher, plan, ROWS, **arguments)
        assert parts.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["llama4_text", "gpt_oss", "nemotron_h-latent", "granitemoehybrid"])
def test_other_layouts_of_experts(name: str):
    """Transposed weights, biases, a latent width, experts that compute all tokens: the outputs come closer."""
    teacher = pocket_model(name)
    plan = planned(teacher, num_experts=0.5)
    repaired = repaired_weights(teacher, plan, ROWS)
    assert {key for key in repaired if key.endswith("experts.down_proj")}
    own = dict(teacher.named_parameters())
    assert all(not torch.equal(values, own[key]) for key, values in repaired.items())
    student, plain = (apply_plan(teacher, plan, repaired=weights) for weights in (repaired, own))
    first = min(int(key.split(".")[2]) for key in repaired)
    layer = f"model.layers.{plan.layers_kept.index(first)}"
    ids = torch.tensor(ROWS.rows)
    seen = []
    for model in (teacher, student, plain):
        handle = model.get_submodule(layer).register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            model(ids)
        handle.remove()
    assert (seen[1] - seen[0]).norm() < 0.999 * (seen[2] - seen[0]).norm()


@pytest.mark.parametrize("cut", [{"num_experts": 0.5}, {"moe_intermediate_size": 0.5}])
def test_sums_of_experts_are_known_from_configs(cut: dict):
    teacher = pocket_model("mixtral")
    plan = planned(teacher, **cut)
    expected = expected_cut_inputs(teacher.config, plan.build_student_config(teacher.config), "least_squares")
    assert [one.num_bytes for one in expected] == [one.num_bytes for one in cut_inputs(teacher, plan)]
    sizes = {name: sizes["student"] for name, sizes in plan.sizes.items()}
    stacked = sizes["layers"] * sizes["experts"]
    assert len(expected) == stacked
