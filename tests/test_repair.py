"""Refitted projections against numpy's least squares on the activations themselves."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_hf.data import TokenRows
from minitron_hf.errors import DataError, PlanError, UnsupportedModelError
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.repair import input_groups, repaired_weights
from minitron_hf.pruning.repair_inputs import CutInputs, Projection, cut_inputs
from minitron_hf.pruning.repair_solve import DEFAULT_RIDGE, RIDGES
from minitron_hf.pruning.repair_sums import input_products
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.saving import in_stored_dtype
from minitron_hf.scoring.calibration import load_calibration
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from pocket import pocket_config, pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(24, 19)), None)


def planned(model, **request):
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**{"repair": "least_squares", **request}, multiple_of=1), scores)


def inputs(model, path: str) -> np.ndarray:
    """What a projection is given, [tokens, inputs]."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(torch.tensor(ROWS.rows))
    handle.remove()
    return seen[0].flatten(0, -2).double().numpy()


def bias(model, path: str) -> np.ndarray | float:
    found = model.get_submodule(path).bias
    return 0.0 if found is None else found.detach().numpy()


def least_squares(x: np.ndarray, wanted: np.ndarray, *, has_bias: bool) -> tuple[np.ndarray, np.ndarray | float]:
    """Weight and bias that reproduce some outputs best."""
    if not has_bias:
        return np.linalg.lstsq(x, wanted, rcond=None)[0], 0.0
    found = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), wanted, rcond=None)[0]
    return found[:-1], found[-1]


@pytest.mark.parametrize(
    ("name", "writer"), [("llama", "model.layers.{}.mlp.down_proj"), ("gpt2", "transformer.h.{}.mlp.c_proj")]
)
def test_neurons_are_refitted_as_by_lstsq(name: str, writer: str):
    teacher = pocket_model(name)
    plan = planned(teacher, intermediate_size=0.5)
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-12))
    plain = apply_plan(teacher, planned(teacher, intermediate_size=0.5, repair=None))
    for layer in plan.layers_kept:
        path = writer.format(layer)
        x, kept = inputs(teacher, path), plan.kept["ffn"][layer]

        def matrix(model, path=path):
            weight = model.get_submodule(path).weight.detach().numpy()
            return weight if name == "gpt2" else weight.T

        wanted = x @ matrix(teacher) + bias(teacher, path)
        expected, expected_bias = least_squares(x[:, kept], wanted, has_bias=name == "gpt2")
        np.testing.assert_allclose(matrix(student), expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(bias(student, path), expected_bias, rtol=1e-5, atol=1e-7)
        errors = [np.linalg.norm(x[:, kept] @ matrix(one) + bias(one, path) - wanted) for one in (student, plain)]
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


@pytest.mark.parametrize("name", ["llama", "gemma", "phi", "qwen2", "olmo2"])
def test_readers_of_cut_channels_are_refitted_as_by_lstsq(name: str):
    """Every projection that reads a norm of the kept channels reproduces what the teacher's reads, at its best."""
    teacher = pocket_model(name)
    plan = planned(teacher, hidden_size=0.5, repair="least_squares_all")
    plain = apply_plan(teacher, planned(teacher, hidden_size=0.5, repair=None))
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-12))
    observed = {projection.path: cut for cut in cut_inputs(teacher, plan) for projection in cut.projections}
    assert observed
    assert {name for name in READERS[name] if name in observed} == set(READERS[name])
    for path, cut in observed.items():
        states = inputs(teacher, cut.path)[:, plan.kept["hidden"]]
        with torch.no_grad():  # the student's own norm, in place
            x = plain.get_submodule(cut.path)(torch.tensor(states)).numpy()
        wanted = inputs(teacher, path) @ teacher.get_submodule(path).weight.detach().numpy().T + bias(teacher, path)
        expected, expected_bias = least_squares(x, wanted, has_bias=teacher.get_submodule(path).bias is not None)
        found, before = (model.get_submodule(path).weight.detach().numpy().T for model in (student, plain))
        # Outputs of a LayerNorm have a fixed weighted mean, so weights and bias together are not unique.
        best = x @ expected + expected_bias
        np.testing.assert_allclose(x @ found + bias(student, path), best, rtol=1e-4, atol=1e-4 * np.abs(best).max())
        errors = [
            np.linalg.norm(x @ weight + bias(model, path) - wanted)
            for weight, model in ((found, student), (before, plain))
        ]
        assert errors[0] < 0.9 * errors[1]
    same = {f"{path}.{part}" for path in observed for part in ("weight", "bias")}
    for (name, one), two in zip(plain.named_parameters(), student.parameters(), strict=True):
        assert name in same or torch.equal(one, two), name


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_routers_and_stacked_experts_are_refitted_as_by_lstsq(name: str):
    """They read the same norm: every output of every expert that stays, and the router's, on all tokens."""
    teacher = pocket_model(name)
    plan = planned(teacher, hidden_size=0.5, num_experts=4, repair="least_squares_all")
    plain = apply_plan(teacher, planned(teacher, hidden_size=0.5, num_experts=4, repair=None))
    student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-12))
    router = {"mixtral": "gate", "gpt_oss": "router"}[name]
    for layer in range(teacher.config.num_hidden_layers):
        norm, kept = f"model.layers.{layer}.post_attention_layernorm", plan.kept["experts"][layer]
        [cut] = [cut for cut in cut_inputs(teacher, plan) if cut.path == norm]
        assert {p.tensor for p in cut.projections} == {"weight", "gate_up_proj"}
        states = inputs(teacher, norm)[:, plan.kept["hidden"]]
        with torch.no_grad():
            x = plain.get_submodule(norm)(torch.tensor(states)).numpy()
            wanted = teacher.get_submodule(norm)(torch.tensor(inputs(teacher, norm))).numpy()
        theirs, own, before = (model.model.layers[layer].mlp for model in (teacher, student, plain))
        transpose = name == "mixtral"
        pairs = [[getattr(mlp, router).weight.T for mlp in (theirs, own, before)]]
        pairs[0][0] = pairs[0][0][:, kept]
        for row, expert in enumerate(kept):
            stacks = (theirs.experts.gate_up_proj[expert], *(m.experts.gate_up_proj[row] for m in (own, before)))
            pairs.append([stack.T if transpose else stack for stack in stacks])
        for weight, found, cut_only in (tuple(w.detach().numpy() for w in pair) for pair in pairs):
            has_bias = name == "gpt_oss" and weight.shape[1] == 4  # of the router
            target = wanted @ weight
            expected, _ = least_squares(x, target, has_bias=has_bias)
            error, best = (x @ w - target for w in (found, expected))
            if has_bias:
                error, best = (e - e.mean(0) for e in (error, best))
            np.testing.assert_allclose(np.linalg.norm(error), np.linalg.norm(best), rtol=1e-5)
            assert np.linalg.norm(error) < 0.95 * np.linalg.norm(x @ cut_only - target)


READERS = {
    "llama": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
    "gemma": ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.gate_proj"],
    "phi": ["model.layers.1.self_attn.v_proj", "model.layers.0.mlp.fc1"],
    "qwen2": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"],
    "olmo2": [],
}


def test_a_large_ridge_leaves_the_plain_student():
    teacher = pocket_model("llama")
    plan = planned(teacher, hidden_size=0.5, intermediate_size=0.5, repair="least_squares_all")
    repaired = repaired_weights(teacher, plan, ROWS, ridge=1e12)
    assert repaired
    for name, weight in repaired.items():
        torch.testing.assert_close(weight, dict(teacher.named_parameters())[name].detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("repair", ["least_squares", "sequential"])
def test_no_ridge_and_a_neuron_that_is_always_0(repair):
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5, repair=repair)
    with torch.no_grad():
        for layer, kept in enumerate(plan.kept["ffn"]):
            teacher.model.layers[layer].mlp.up_proj.weight[kept[0]] = 0
    plan = replace(plan, teacher={**plan.teacher, "digest": None})
    given, other = (repaired_weights(teacher, plan, ROWS, ridge=ridge) for ridge in (0, 1e-10))
    for name, weight in given.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-4)


def test_held_out_rows_choose_the_ridge(monkeypatch):
    """Every fourth row is held out: numpy fits the others with each ridge, and the best one is taken for all rows."""
    monkeypatch.setattr("minitron_hf.pruning.repair.NUM_PROBES", 1)
    teacher = pocket_model("llama")
    for name in ("gate_proj", "up_proj"):  # neurons that nearly repeat others
        weight = teacher.get_submodule(f"model.layers.0.mlp.{name}").weight.data
        weight[1::2] = weight[::2] + 0.2 * weight[1::2]
    plan = planned(teacher, intermediate_size=0.5)
    path, kept = "model.layers.0.mlp.down_proj", plan.kept["ffn"][0]
    x, weight = inputs(teacher, path), teacher.get_submodule("model.layers.0.mlp.down_proj").weight.detach().numpy().T
    is_held = np.repeat(np.arange(len(ROWS.rows)) % 4 == 3, len(ROWS.rows[0]))
    cut = np.setdiff1d(np.arange(x.shape[1]), kept)
    errors = {}
    for ridge in RIDGES:
        fitted = x[~is_held]
        gram = fitted[:, kept].T @ fitted[:, kept]
        gram += ridge * np.mean(np.diag(gram)) * np.eye(len(kept))
        change = np.linalg.solve(gram, fitted[:, kept].T @ fitted[:, cut] @ weight[cut])
        errors[ridge] = np.linalg.norm(x[is_held][:, kept] @ change - x[is_held][:, cut] @ weight[cut])
    best = min(errors, key=errors.get)
    assert best not in (DEFAULT_RIDGE, RIDGES[0], RIDGES[-1])
    for arguments in ({}, {"batch_size": 5}, {"memory_limit": 1}):
        chosen = repaired_weights(teacher, plan, ROWS, **arguments)
        given = repaired_weights(teacher, plan, ROWS, ridge=best)
        for name, values in given.items():
            torch.testing.assert_close(chosen[name], values, rtol=1e-9, atol=1e-12)
    few = TokenRows(ROWS.rows[:3], None)  # none is held out
    chosen, given = (repaired_weights(teacher, plan, few, ridge=ridge) for ridge in (None, DEFAULT_RIDGE))
    assert all(torch.equal(chosen[name], values) for name, values in given.items())


@pytest.mark.parametrize("request_", [{"intermediate_size": 0.5}, {"hidden_size": 0.5, "repair": "least_squares_all"}])
def test_sums_of_all_rows_and_of_those_held_out(request_):
    teacher = pocket_model("llama")
    cuts = cut_inputs(teacher, planned(teacher, **request_))
    calibration = load_calibration(teacher, ROWS, None, len(ROWS.rows), None, True, 5)
    sums, num_tokens = input_products(teacher, cuts, calibration, cuts)
    assert num_tokens == sum(map(len, ROWS.rows))
    is_held = np.repeat(np.arange(len(ROWS.rows)) % 4 == 3, len(ROWS.rows[0]))
    for cut in cuts:
        x = inputs(teacher, cut.path)
        kept, rest = x[:, cut.kept_K], x[:, cut.rest_R]
        if cut.norm is not None:
            norms = ((x, teacher.get_submodule(cut.path)), (kept, cut.norm))
            rest, kept = (_rms(y, norm.variance_epsilon) * norm.weight.detach().numpy() for y, norm in norms)
            rest[:, cut.kept_K] -= kept
        both = np.concatenate([kept, rest], axis=1)
        everything, held = sums[cut.path].all, sums[cut.path].held_out
        rest_of = everything.without(held)
        for moments, rows in ((everything, slice(None)), (held, is_held), (rest_of, ~is_held)):
            np.testing.assert_allclose(moments.products, kept[rows].T @ both[rows], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(moments.totals, both[rows].sum(0), rtol=1e-4, atol=1e-4)
            assert moments.count == len(both[rows])
            kept_mean, mean = kept[rows].mean(0), both[rows].mean(0)
            centred = (kept[rows] - kept_mean).T @ (both[rows] - mean)
            np.testing.assert_allclose(moments.centre_().products, centred, rtol=1e-4, atol=1e-3)


def _rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def test_little_text_is_warned_of(caplog):
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5)
    repaired_weights(teacher, plan, TokenRows(ROWS.rows[:2], None))
    assert "calibration tokens" in caplog.text
    caplog.clear()
    repaired_weights(teacher, plan, TokenRows(ROWS.rows * 4, None))
    assert not caplog.text


def test_nothing_to_refit_without_a_cut_that_the_repair_makes_up_for():
    teacher = pocket_model("llama")
    plan = planned(teacher, hidden_size=0.5)
    assert plan.repair is None
    assert (
        f"repair={plan.pruner_config['repair']!r} changes nothing: no units that it makes up for are cut."
        in plan.notes
    )
    assert repaired_weights(teacher, plan, ROWS) == {}


@pytest.mark.parametrize(
    ("name", "request_", "words"),
    [
        ("llama", {"num_attention_heads": 0.5, "head_add_back": True}, "head_add_back"),
        ("llama", {"intermediate_size": 0.5, "repair": "wishes"}, "'wishes'.*'least_squares'"),
    ],
)
def test_what_cannot_be_repaired_is_refused_by_the_plan(name: str, request_: dict, words: str):
    with pytest.raises(PlanError, match=words):
        student_config(pocket_config(name), PrunerConfig(**{"repair": "least_squares", **request_}))


def test_a_plan_says_what_becomes_of_it(tmp_path):
    """A repair is part of the plan: of its digest and its files; it is neither left out nor added unseen."""
    teacher = pocket_model("llama")
    plan, without = (planned(teacher, intermediate_size=0.5, repair=how) for how in ("least_squares", None))
    assert plan.digest != without.digest
    plan.save_pretrained(tmp_path)
    assert PruningPlan.from_pretrained(tmp_path).repair == "least_squares"
    assert json.loads((tmp_path / "pruning_plan.json").read_text())["repair"] == "least_squares"
    with pytest.raises(PlanError, match="needs data"):
        apply_plan(teacher, plan)
    with pytest.raises(PlanError, match="no repair"):
        apply_plan(teacher, without, repaired=repaired_weights(teacher, plan, ROWS))


def test_prune_model_repairs_after_verifying():
    teacher = pocket_model("llama")
    plain, student = (
        prune_model(
            teacher,
            PrunerConfig(intermediate_size=0.5, multiple_of=1, repair=repair),
            calibration_data=ROWS,
            verify=bool(repair),
        )
        for repair in (None, "least_squares")
    )
    notes = student.pruning_plan.notes
    assert any(note.startswith("Least-squares repair") for note in notes)
    assert any(note.startswith("Verified") for note in notes)
    changed = [
        name
        for (name, one), two in zip(plain.named_parameters(), student.parameters(), strict=True)
        if not torch.equal(one, two)
    ]
    assert changed == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(len(plain.model.layers))]
    request = PrunerConfig(intermediate_size=0.5, repair="least_squares")
    with pytest.raises(PlanError, match="calibration_data"):
        prune_model(teacher, request, scores=estimate_importance(teacher, metric="random"))
    iterated = prune_model(teacher, request, calibration_data=ROWS, iterations=2)
    assert iterated.pruning_plan.repair == "least_squares"


def test_a_memory_limit_takes_more_passes_and_gives_the_same():
    """Each pass ends at its last projection: with one projection a pass, layer l runs in the passes of layers ≥ l."""
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5, num_attention_heads=0.5)
    whole = repaired_weights(teacher, plan, ROWS, batch_size=len(ROWS.rows), ridge=1e-3)
    calls = dict.fromkeys(range(len(teacher.model.layers)), 0)

    def count(layer: int):
        def hook(*_):
            calls[layer] += 1

        return teacher.model.layers[layer].self_attn.q_proj.register_forward_pre_hook(hook)

    handles = [count(layer) for layer in calls]
    parts = repaired_weights(teacher, plan, ROWS, batch_size=len(ROWS.rows), memory_limit=1, ridge=1e-3)
    for handle in handles:
        handle.remove()
    depth = len(calls)
    assert calls == {layer: 2 * (depth - layer) for layer in calls}  # two projections a layer
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    with pytest.raises(DataError, match="memory_limit=0"):
        repaired_weights(teacher, plan, ROWS, memory_limit=0)
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=f"ridge={ridge}"):
            repaired_weights(teacher, plan, ROWS, ridge=ridge)


def test_groups_hold_what_fits():
    cuts = [
        CutInputs(str(kept), torch.arange(kept), torch.arange(kept, 10), (Projection(str(kept), 1),))
        for kept in (4, 4, 2, 8)
    ]
    groups = [[len(cut.kept_K) for cut in group] for group in input_groups(cuts, 8 * 10 * 6)]
    assert groups == [[4], [4, 2], [8]]
    assert [cut.num_bytes for cut in cuts] == [320, 320, 160, 640]


def test_a_float32_teacher_is_refitted_as_exactly_as_float64_would():
    """Neurons of very different sizes, some of them nearly equal, as in real models; against numpy in float64."""
    teacher = pocket_model("llama", dtype=torch.float32)
    path = "model.layers.0.mlp.down_proj"
    up = teacher.get_submodule("model.layers.0.mlp.up_proj").weight.data
    up *= torch.logspace(0, 3, len(up))[torch.randperm(len(up), generator=torch.Generator().manual_seed(1)), None]
    up[1] = up[0] * (1 + 1e-3 * torch.randn(up.shape[1], generator=torch.Generator().manual_seed(0)))
    plan = planned(teacher, intermediate_size=0.5)
    ridge = 1e-6
    found = repaired_weights(teacher, plan, ROWS, ridge=ridge)[f"{path}.weight"].double().numpy().T
    x, kept = inputs(teacher, path), plan.kept["ffn"][0]
    weight = teacher.get_submodule(path).weight.detach().double().numpy().T
    gram = x[:, kept].T @ x[:, kept]
    gram += ridge * np.mean(np.diag(gram)) * np.eye(len(kept))
    cut = np.setdiff1d(np.arange(x.shape[1]), kept)
    expected = weight.copy()
    expected[kept] += np.linalg.solve(gram, x[:, kept].T @ x[:, cut] @ weight[cut])
    wanted = x @ weight
    gap = np.linalg.norm(x[:, kept] @ (found - expected)[kept]) / np.linalg.norm(wanted)
    assert gap < 1e-5
    np.testing.assert_array_equal(found[cut], weight[cut])


def test_inputs_that_are_not_finite_are_refused():
    teacher = pocket_model("llama", dtype=torch.float32)
    plan = planned(teacher, intermediate_size=0.5)
    teacher.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"),))
    with pytest.raises(UnsupportedModelError, match="down_proj are not finite in float32"):
        repaired_weights(teacher, plan, ROWS)


def test_held_out_rows_choose_the_ridge_of_a_projection_with_a_bias(monkeypatch):
    """The bias makes up for the means of the fitted rows, so numpy subtracts these from the held-out rows, too."""
    monkeypatch.setattr("minitron_hf.pruning.repair.NUM_PROBES", 1)
    teacher = pocket_model("gpt2")
    first = teacher.transformer.h[0].mlp.c_fc  # neurons that nearly repeat others, with large means
    first.weight.data[:, 1::2] = first.weight.data[:, ::2] + 0.2 * first.weight.data[:, 1::2]
    first.bias.data += 1.0
    plan = planned(teacher, intermediate_size=0.5)
    path, kept = "transformer.h.0.mlp.c_proj", plan.kept["ffn"][0]
    x, weight = inputs(teacher, path), teacher.get_submodule(path).weight.detach().numpy()
    cut = np.setdiff1d(np.arange(x.shape[1]), kept)
    is_held = np.repeat(np.arange(len(ROWS.rows)) % 4 == 3, len(ROWS.rows[0]))
    mean = x[~is_held].mean(0)
    fitted, centred, plain = x[~is_held] - mean, x[is_held] - mean, x[is_held]
    best = []
    for held in (centred, plain):
        errors = {}
        for ridge in RIDGES:
            gram = fitted[:, kept].T @ fitted[:, kept]
            gram += ridge * np.mean(np.diag(gram)) * np.eye(len(kept))
            change = np.linalg.solve(gram, fitted[:, kept].T @ fitted[:, cut] @ weight[cut])
            errors[ridge] = np.linalg.norm(held[:, kept] @ change - held[:, cut] @ weight[cut])
        best.append(min(errors, key=errors.get))
    assert best[0] != best[1]
    chosen, given = (repaired_weights(teacher, plan, ROWS, ridge=ridge) for ridge in (None, best[0]))
    for name, values in given.items():
        torch.testing.assert_close(chosen[name], values, rtol=1e-9, atol=1e-12)


def test_norms_of_offloaded_teachers_run_where_the_inputs_are():
    """Offloaded weights are on the CPU, and the inputs elsewhere; the device without values stands for it."""
    teacher = pocket_model("llama")
    cuts = cut_inputs(teacher, planned(teacher, hidden_size=0.5, repair="least_squares_all"))
    states = torch.empty(5, teacher.config.hidden_size, dtype=torch.float64, device="meta")
    for cut in cuts:
        assert cut.norm is not None
        assert cut.observed(states, states).device.type == "meta"


def test_refitted_weights_beyond_float16_are_refused_by_name():
    """All neurons of a layer are alike, so that those that stay would have to write twice as much."""
    teacher = pocket_model("llama", dtype=torch.float16)
    mlp = teacher.model.layers[1].mlp
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.copy_(projection.weight[:1] * 1e-2)
        mlp.down_proj.weight.fill_(6e4)
    plan = planned(teacher, intermediate_size=0.5)
    words = r"layers\.1\.mlp\.down_proj\.weight: a value of .* exceeds the range of float16, 65,504\. Save the"
    with pytest.raises(UnsupportedModelError, match=words):
        repaired_weights(teacher, plan, ROWS)


def test_trained_weights_beyond_float16_are_stored_in_float32(caplog):
    student = pocket_model("llama", dtype=torch.float32)
    assert in_stored_dtype(copy.deepcopy(student), torch.float16).dtype == torch.float16
    student.model.layers[1].mlp.down_proj.weight.data[0, 0] = 7e4
    assert in_stored_dtype(copy.deepcopy(student), torch.bfloat16).dtype == torch.bfloat16
    assert in_stored_dtype(student, torch.float16).dtype == torch.float32
    assert "layers.1.mlp.down_proj.weight and 0 other weights exceed the range of float16" in caplog.text
