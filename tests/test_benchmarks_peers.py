"""Other pruners in the benchmarks, at pocket size: each criterion against a naive loop, each student against a law."""

from __future__ import annotations

import copy
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import peer_criteria, peer_starts, peers, slicegpt
from benchmarks.real.arms import load_experiments

from minitron_hf import count_parameters, estimate_importance, token_rows
from minitron_hf.families import named_tensors
from pocket import VOCAB, pocket_model

#: Pairwise distinct sizes, tied, three groups of two heads.
SIZES = {
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 24,
    "head_dim": 4,
    "intermediate_size": 40,
    "tie_word_embeddings": True,
}
PER_GROUP, HEAD_DIM = 2, 4


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama", **SIZES).double()


@pytest.fixture(scope="module")
def rows():
    order = torch.Generator().manual_seed(0)
    return token_rows([torch.randint(VOCAB, (13,), generator=order).tolist() for _ in range(6)], max_length=13)


def states(model, row):
    """Residual stream before every layer and after the last, [L + 1, T, H]."""
    found = []
    hook = lambda _, args, out: found.append((args[0], out))  # noqa: E731
    handles = [layer.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return torch.stack([found[0][0][0], *(out[0] for _, out in found)])


def logits(model, rows):
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(row) for row in rows.rows])).logits


# ---- Criteria ----


def test_block_influence_is_one_minus_the_mean_cosine(teacher, rows):
    naive = [[] for _ in range(5)]
    for row in rows.rows:
        x = states(teacher, row)
        for layer in range(5):
            for a, b in zip(x[layer], x[layer + 1]):
                naive[layer].append(1 - float(a @ b / math.sqrt(float(a @ a) * float(b @ b))))
    expected = torch.tensor([sum(one) / len(one) for one in naive])
    torch.testing.assert_close(peer_criteria.block_influence(teacher, rows).float(), expected, rtol=1e-5, atol=1e-6)
    ours = estimate_importance(teacher, rows, show_progress=False).layers
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_angular_distances_are_those_of_the_last_token(teacher, rows, count):
    naive = torch.zeros(5 - count + 1, dtype=torch.float64)
    for row in rows.rows:
        x = states(teacher, row)[:, -1]
        x[-1] = teacher.model.norm(x[-1]).detach()
        for first in range(len(naive)):
            cosine = x[first] @ x[first + count] / (x[first].norm() * x[first + count].norm())
            naive[first] += math.acos(float(cosine)) / math.pi / len(rows)
    torch.testing.assert_close(peer_criteria.angular_distances(teacher, rows, count), naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_element", [True, False])
def test_taylor_is_the_first_order_change_of_coupled_structures(teacher, rows, by_element):
    model = copy.deepcopy(teacher)
    tokens = torch.tensor([list(row) for row in rows.rows])
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = peer_criteria.group_taylor(teacher, rows, by_element=by_element)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())

    def size(weight, gradient):
        terms = (weight * gradient).detach()
        return float(terms.abs().sum() if by_element else terms.sum().abs())

    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for unit in range(40):
            expected = sum(size(one.weight[unit], one.weight.grad[unit]) for one in (mlp.gate_proj, mlp.up_proj))
            expected += size(mlp.down_proj.weight[:, unit], mlp.down_proj.weight.grad[:, unit])
            assert float(found["ffn"][index, unit]) == pytest.approx(expected, rel=1e-4)
        for group in range(3):
            expected = 0.0
            for place in range(group * PER_GROUP * HEAD_DIM, (group + 1) * PER_GROUP * HEAD_DIM):
                expected += size(attention.q_proj.weight[place], attention.q_proj.weight.grad[place])
                expected += size(attention.o_proj.weight[:, place], attention.o_proj.weight.grad[:, place])
            for place in range(group * HEAD_DIM, (group + 1) * HEAD_DIM):
                for one in (attention.k_proj, attention.v_proj):
                    expected += size(one.weight[place], one.weight.grad[place])
            assert float(found["kv"][index, group]) == pytest.approx(expected, rel=1e-4)


def test_fluctuation_is_the_variance_row_after_row():
    """Against the update of the authors' code, step by step; for rows of one mean it is the sum of their variances."""
    x_NTD = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for seen, x_TD in enumerate(x_NTD):
        mean = mean * seen / (seen + 1) + x_TD.mean(0) / (seen + 1)
        if seen:
            variance = variance * (seen - 1) / seen + (x_TD - mean).square().sum(0) / (seen + 1)
    sums = peer_criteria.Fluctuation()
    for part in x_NTD.split(3):
        sums.add(part)
    torch.testing.assert_close(sums.variance_D, variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.mean, x_NTD.mean((0, 1)), rtol=1e-6, atol=1e-9)


def test_wanda_scores_layers_behind_pruned_ones(teacher, rows):
    """Against pruning by hand: the second layer is scored on what the first gives without its cut units."""
    sizes = {"kv": 2, "ffn": 30}
    found = peer_starts.wanda_scores(teacher, rows, sizes)
    model = copy.deepcopy(teacher)
    for index in range(2):
        layer, inputs = model.model.layers[index], {}
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, axis=axis, to=inputs: to.update({axis: args[0].flatten(0, 1)})
            )
            for axis, module in (("kv", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj))
        ]
        logits(model, rows)
        for handle in handles:
            handle.remove()
        for axis, module, each in (("kv", layer.self_attn.o_proj, 8), ("ffn", layer.mlp.down_proj, 1)):
            score = (module.weight.abs() * inputs[axis].norm(dim=0)).mean(0).reshape(-1, each).sum(1)
            torch.testing.assert_close(found[axis][index], score.detach(), rtol=1e-5, atol=0)
            dropped = score.argsort()[: len(score) - sizes[axis]]
            module.weight.data.reshape(24, -1, each)[:, dropped] = 0


# ---- Students ----


def test_units_at_zero_are_the_same_as_their_outputs_cut(teacher, rows):
    neurons = [torch.arange(40) % (index + 2) > 0 for index in range(5)]
    kept = {"kv": [torch.tensor([True, False, True])] * 5, "ffn": neurons}
    start = peer_starts.zeroed(copy.deepcopy(teacher), kept)
    expected = copy.deepcopy(teacher)
    for layer, ffn in zip(expected.model.layers, kept["ffn"]):
        layer.self_attn.o_proj.weight.data[:, 8:16] = 0
        layer.mlp.down_proj.weight.data[:, ~ffn] = 0
    torch.testing.assert_close(logits(start.student, rows), logits(expected, rows), rtol=0, atol=1e-12)
    zeros = sum(int((one == 0).sum()) for _, one in named_tensors(start.student).items())
    assert start.num_parameters == count_parameters(teacher) - zeros
    assert not start.is_stock


def test_training_leaves_units_at_zero(teacher, rows):
    """With biases too: AdamW, weight decay included, moves everything else."""
    model = peer_starts.with_biases(teacher)
    torch.testing.assert_close(logits(model, rows), logits(teacher, rows), rtol=0, atol=1e-12)
    kept = {"kv": [torch.tensor([True, False, True])] * 5, "ffn": [torch.arange(40) > 9] * 5}
    student = peer_starts.zeroed(model, kept).student
    before = {name: one.clone() for name, one in named_tensors(student).items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.tensor([list(row) for row in rows.rows])
    for _ in range(3):
        student(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = student.model.layers
    for layer in layers:
        for one in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            cut = slice(8, 16) if one is layer.self_attn.q_proj else slice(0, 10)
            assert not one.weight[cut].any()
            assert not one.bias[cut].any()
        assert not layer.self_attn.o_proj.weight[:, 8:16].any()
        assert not layer.mlp.down_proj.weight[:, :10].any()
    assert all((one != before[name]).any() for name, one in named_tensors(student).items())


def test_means_make_up_for_constant_inputs(teacher, rows):
    """Where an input is constant, its mean as a bias is exact: nothing changes."""
    model = peer_starts.with_biases(teacher)
    for layer in model.model.layers:  # neuron 0 gives the same at every token
        layer.mlp.gate_proj.weight.data[0] = layer.mlp.up_proj.weight.data[0] = 0
        layer.mlp.gate_proj.bias.data[0] = layer.mlp.up_proj.bias.data[0] = 1.5
    before = logits(model, rows)
    _, means = peer_starts.flap_scores(model, rows)
    kept = {"kv": [torch.ones(3, dtype=torch.bool)] * 5, "ffn": [torch.arange(40) > 0] * 5}
    peer_starts.add_means(model, kept, means)
    after = logits(peer_starts.zeroed(model, kept).student, rows)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_one_threshold_cuts_the_lowest_until_enough_is_gone():
    scores = {"kv": torch.tensor([[0.0, 5.0], [1.0, 6.0]]), "ffn": torch.tensor([[0.5, 2.0], [3.0, 4.0]])}
    kept = peer_starts.flap_choice(scores, {"kv": 10, "ffn": 1}, 12)
    assert [one.tolist() for one in kept["kv"]] == [[False, True], [False, True]]
    assert [one.tolist() for one in kept["ffn"]] == [[False, True], [True, True]]
    everything = peer_starts.flap_choice(scores, {"kv": 10, "ffn": 1}, 0)
    assert all(one.all() for layers in everything.values() for one in layers)


METHODS = [
    pytest.param(
        name, marks=pytest.mark.skipif(find_spec(method.needs or "torch") is None, reason=f"needs {method.needs}")
    )
    for name, method in peer_starts.METHODS.items()
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [0.75, 0.5])
def test_no_student_has_more_parameters_than_were_asked_for(teacher, rows, method, target):
    start = peer_starts.build_start(method, teacher, rows, target)
    limit = target * count_parameters(teacher)
    assert 0.6 * limit < start.num_parameters <= limit
    if method == "flap":
        groups, neurons = map(sum, start.sizes.values())
        biases = groups * (PER_GROUP + 2) * HEAD_DIM + 2 * neurons + 5 * 2 * 24
        zeros = sum(int((one == 0).sum()) for name, one in start.student.named_parameters() if "weight" in name)
        weights = sum(one.numel() for name, one in start.student.named_parameters() if "weight" in name)
        assert start.num_parameters == weights - zeros + biases
    elif not start.is_stock:
        zeros = sum(int((one == 0).sum()) for one in start.student.parameters())
        assert start.num_parameters == sum(one.numel() for one in start.student.parameters()) - zeros
    else:
        assert start.num_parameters == count_parameters(start.student)
        assert type(start.student) is type(teacher)
    assert logits(start.student, rows).isfinite().all()
    json.dumps(start.to_dict())


def test_shortgpt_and_pruneme_drop_what_their_scores_say(teacher, rows):
    start = peer_starts.build_start("shortgpt", teacher, rows, 0.6)
    influence = peer_criteria.block_influence(teacher, rows)
    count = len(start.plan.layers_dropped)
    assert start.plan.layers_dropped == tuple(sorted(influence.argsort()[:count].tolist()))
    start = peer_starts.build_start("pruneme", teacher, rows, 0.6)
    first = 1 + int(peer_criteria.angular_distances(teacher, rows, count)[1:].argmin())
    assert start.plan.layers_dropped == tuple(range(first, first + count))


def test_llm_pruner_leaves_first_and_last_layers_whole(teacher, rows):
    sizes = peer_starts.build_start("llm-pruner", teacher, rows, 0.75).sizes
    assert sizes["ffn"][0] == 40
    assert sizes["kv"][0] == 3
    assert len(set(sizes["ffn"][1:])) == 1
    assert sizes["ffn"][1] < 40


def test_a_method_is_unknown_or_lacks_its_package_or_room(teacher, rows, monkeypatch):
    with pytest.raises(ValueError, match="method='flop' is unknown"):
        peer_starts.build_start("flop", teacher, rows, 0.5)
    monkeypatch.setattr(peer_starts, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install optipfair"):
        peer_starts.build_start("optipfair", teacher, rows, 0.5)
    for method in ("shortgpt", "wanda-sp", "slicegpt"):
        with pytest.raises(ValueError, match=r"No student|cannot be cut so far|no width"):
            peer_starts.build_start(method, teacher, rows, 100)


# ---- SliceGPT ----


def test_slicing_nothing_changes_nothing(teacher, rows):
    torch.testing.assert_close(
        logits(slicegpt.sliced(teacher, rows, 24), rows), logits(teacher, rows), rtol=0, atol=1e-5
    )  # the norms compute in float32


def test_a_sliced_model_is_the_teacher_with_a_projected_stream(teacher, rows):
    """The oracle projects the teacher's stream before every block to the axes found on what comes out, in order."""
    width = 16
    student = slicegpt.sliced(teacher, rows, width)
    assert sum(one.numel() for one in student.parameters()) == slicegpt.num_parameters(teacher.config, width)
    model = copy.deepcopy(teacher)

    def projector(module):
        """Onto the first axes of what comes to a module."""
        caught = []
        handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, 1)))
        logits(model, rows)
        handle.remove()
        vectors = torch.linalg.svd(caught[0], full_matrices=True).Vh[:width]
        return vectors.T @ vectors

    def project_between(layer):
        """The norm before the MLP reads the projected stream; what it lost is taken from the sum behind the MLP."""
        norm, lost = layer.post_attention_layernorm, []
        onto = projector(norm)

        def before(_, args):
            lost[:] = [args[0] - args[0] @ onto]
            return (args[0] @ onto,)

        norm.register_forward_pre_hook(before)
        layer.mlp.register_forward_hook(lambda _, args, out: out - lost[0])

    for layer in model.model.layers:
        onto = projector(layer)
        layer.register_forward_pre_hook(lambda _, args, onto=onto: (args[0] @ onto, *args[1:]))
        project_between(layer)
    torch.testing.assert_close(logits(student, rows), logits(model, rows), rtol=0, atol=1e-5)
    assert (logits(student, rows) - logits(teacher, rows)).abs().max() > 1e-3


def test_slicegpt_is_refused_where_it_is_not_written_for():
    with pytest.raises(ValueError, match="without biases"):
        slicegpt.sliced(pocket_model("llama-biases-tied"), None, 8)


def test_rows_of_the_table_are_told_apart_by_their_titles():
    experiments = load_experiments(Path(peers.__file__).parent / "peers.yaml")
    for experiment in experiments.values():
        titles = [peers.title(arm) for arm in experiment.arms]
        assert len(set(titles)) == len(titles)
