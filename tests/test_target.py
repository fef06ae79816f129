"""A target of parameters: shapes that meet it, and the choice among them against naive measurements."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest
import torch
from transformers import GPT2Config

from minitron_hf.data import TokenRows
from minitron_hf.errors import PlanError
from minitron_hf.models import count_parameters
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import plan_for_target, prune_model, prune_with_plan
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from minitron_hf.sizes.targets import shapes_near_target
from pocket import pocket_config, pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(pocket_tokens(n, seed=n).tolist()) for n in (16, 9, 14, 12)), None)


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def scores(teacher):
    return estimate_importance(teacher, ROWS, max_length=16, show_progress=False)


@torch.no_grad()
def naive_kl(teacher, student, rows=ROWS):
    """Mean over all predicted tokens, from whole logits, one row at a time."""
    found = []
    for row in rows.rows:
        log_p, log_q = (
            model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for model in (teacher, student)
        )
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found).mean().item()


def test_a_comparison_that_was_stopped_goes_on(teacher, scores, tmp_path):
    """Nothing is measured twice, the plan is that of an uninterrupted call, and other inputs begin again."""
    request, calls, stops = PrunerConfig(target_parameters=0.6, multiple_of=1), [], []

    def neurons(model):
        calls.append(model.config.intermediate_size)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return float(model.config.intermediate_size)

    given = {"num_shapes": 6, "max_length": 16, "show_progress": False}
    whole = plan_for_target(teacher, request, scores, ROWS, score_func=neurons, **given)
    every = len(calls)
    assert every > 4
    calls.clear()
    stops.append(4)
    with pytest.raises(KeyboardInterrupt):
        plan_for_target(teacher, request, scores, ROWS, score_func=neurons, output_dir=tmp_path, **given)
    stops.clear()
    kept = json.loads((tmp_path / "shapes.unfinished.json").read_text())
    assert len(kept["candidates"]) == 3
    calls.clear()
    found = plan_for_target(teacher, request, scores, ROWS, score_func=neurons, output_dir=tmp_path, **given)
    assert len(calls) == every - 3
    assert found.candidates == whole.candidates
    assert found.digest == whole.digest
    assert not list(tmp_path.glob("shapes*"))
    (tmp_path / "shapes.unfinished.json").write_text(json.dumps({**kept, "inputs": "sha256:0"}))
    calls.clear()
    plan_for_target(teacher, request, scores, ROWS, score_func=neurons, output_dir=tmp_path, **given)
    assert len(calls) == every


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe", "mamba2"])
def test_shapes_meet_the_target_and_no_larger_ones_do(name):
    config = pocket_config(name)
    limit = 0.7 * count_parameters(config)
    request = PrunerConfig(target_parameters=0.7, multiple_of=1)
    shapes = shapes_near_target(config, request, tolerance=0.1)
    assert shapes
    assert len({tuple(shape.sizes.values()) for shape in shapes}) == len(shapes)
    for shape in shapes:
        assert shape.request.target_parameters is None
        assert 0.9 * limit <= shape.num_parameters <= limit
        assert shape.num_parameters == count_parameters(student_config(config, shape.request))


def llama_parameters(config, hidden, heads, ffn):
    """Written out: embeddings and head, projections, gated MLP, norms."""
    attention = 2 * hidden * config.head_dim * (heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * ffn + 2 * hidden
    return 2 * config.vocab_size * hidden + config.num_hidden_layers * layer + hidden


def test_every_largest_number_of_neurons_is_found():
    """All of them counted, for every choice of the other sizes."""
    config = pocket_config("llama")
    limit = 0.6 * count_parameters(config)
    shapes = shapes_near_target(config, PrunerConfig(target_parameters=0.6, multiple_of=1), tolerance=0.1)
    assert shapes == shapes_near_target(
        config, PrunerConfig(target_parameters=int(limit), multiple_of=1), tolerance=0.1
    )
    assert len({(shape.sizes["hidden"], shape.sizes["heads"]) for shape in shapes}) == len(shapes) > 2
    for shape in shapes:
        counts = {n: llama_parameters(config, shape.sizes["hidden"], shape.sizes["heads"], n) for n in range(1, 999)}
        largest = max(n for n, count in counts.items() if count <= limit)
        assert shape.sizes["ffn"] == min(largest, config.intermediate_size)
        assert shape.num_parameters == counts[shape.sizes["ffn"]]


def test_portable_shapes_are_found_between_those_that_are_refused():
    """All widths tried one by one: with `portable`, GPT-2 has four neurons per channel, and whole heads."""
    config = GPT2Config(n_embd=96, n_layer=2, n_head=6, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0)
    counts = {}
    for hidden in range(1, 96):
        with contextlib.suppress(PlanError):
            request = PrunerConfig(hidden_size=hidden, portable=True)
            counts[hidden] = count_parameters(student_config(config, request))
    assert len(counts) == 5
    for hidden, count in counts.items():
        for target in (count, count + 1):
            shapes = shapes_near_target(config, PrunerConfig(target_parameters=target, portable=True))
            assert max(shape.num_parameters for shape in shapes) == count
            assert shapes[0].sizes["hidden"] == hidden


def test_given_sizes_are_kept_and_layers_go_only_where_nothing_else_can():
    config = pocket_config("llama")
    free = shapes_near_target(config, PrunerConfig(target_parameters=0.6, multiple_of=1))
    assert {shape.sizes["layers"] for shape in free} == {config.num_hidden_layers}
    request = PrunerConfig(
        target_parameters=0.6, num_hidden_layers=4, hidden_size=1.0, multiple_of=1, contiguous=False
    )
    for shape in (shapes := shapes_near_target(config, request)):
        assert (shape.sizes["layers"], shape.sizes["hidden"]) == (4, config.hidden_size)
        assert shape.request.contiguous is False
    assert shapes
    widths = {"hidden_size": 1.0, "intermediate_size": 1.0, "num_attention_heads": 1.0}
    [shape] = shapes_near_target(config, PrunerConfig(target_parameters=0.6, **widths), tolerance=0.3)
    counts = [count_parameters(student_config(config, PrunerConfig(num_hidden_layers=n))) for n in range(2, 6)]
    limit = 0.6 * count_parameters(config)
    assert shape.num_parameters == max(count for count in counts if count <= limit)


def test_the_shape_of_the_lowest_divergence_is_chosen_and_all_are_noted(teacher, scores, tmp_path):
    request = PrunerConfig(target_parameters=0.6, multiple_of=1, norm_compensation=False)
    plan = plan_for_target(teacher, request, scores, ROWS, max_length=16, tolerance=0.1)
    naive = {}
    for shape in shapes_near_target(teacher.config, request, tolerance=0.1):
        naive[shape.name] = naive_kl(teacher, apply_plan(teacher, make_plan(teacher, shape.request, scores)))
    assert [one["name"] for one in plan.candidates] == sorted(naive, key=naive.__getitem__)
    assert len(naive) > 2
    for one in plan.candidates:
        assert one["proxy"]["value"] == pytest.approx(naive[one["name"]], rel=1e-4)
        assert one["proxy"]["stderr"] > 0
    best, second, *_ = plan.candidates
    assert best["behind"] is None
    assert second["behind"]["value"] == pytest.approx(naive[second["name"]] - naive[best["name"]], rel=1e-2)
    assert best["name"] in plan.notes[-1]
    chosen = PrunerConfig.from_dict(plan.pruner_config)
    assert chosen.target_parameters is None
    assert chosen.norm_compensation is False
    assert make_plan(teacher, chosen, scores).digest == plan.digest
    plan.save_pretrained(tmp_path)
    assert PruningPlan.from_pretrained(tmp_path).candidates == plan.candidates
    assert json.loads((tmp_path / "pruning_plan.json").read_text())["candidates"][0]["name"] == best["name"]


def test_shapes_are_compared_as_they_will_be_repaired(teacher, scores):
    """Repaired on every other row, measured on the rest."""
    request = PrunerConfig(target_parameters=0.6, multiple_of=1, repair="least_squares")
    plan = plan_for_target(teacher, request, scores, ROWS, max_length=16, tolerance=0.1)
    measured, seen = ROWS.select([0, 2]), ROWS.select([1, 3])
    for one in plan.candidates:
        own = make_plan(teacher, PrunerConfig.from_dict(one["request"]), scores)
        assert own.repair == "least_squares"
        naive = naive_kl(teacher, prune_with_plan(teacher, own, seen), measured)
        assert one["proxy"]["value"] == pytest.approx(naive, rel=1e-4)
    with pytest.raises(PlanError, match="there is one row"):
        plan_for_target(teacher, request, scores, ROWS.select([0]), max_length=16, tolerance=0.1)


def test_prune_model_takes_a_target(teacher, caplog):
    limit = count_parameters(teacher) // 2
    request = PrunerConfig(target_parameters=limit, multiple_of=1)
    with caplog.at_level(logging.WARNING):
        student = prune_model(teacher, request, calibration_data=ROWS, max_length=16, show_progress=False)
    assert 0.95 * limit <= count_parameters(student) <= limit
    assert f"Sizes for target_parameters={limit:,}" in caplog.text
    assert len(student.pruning_plan.candidates) > 1


def test_unresolved_targets_are_refused_with_what_to_do(teacher, scores):
    request = PrunerConfig(target_parameters=0.5)
    for call in (lambda: make_plan(teacher, request, scores), lambda: student_config(teacher.config, request)):
        with pytest.raises(PlanError, match="plan_for_target"):
            call()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"target_parameters": 10**9}, {}, "Pruning only removes"),
        ({"target_parameters": 50}, {}, "no shape has between 48 and 50 parameters"),
        ({}, {"iterations": 2}, "iterations=2 cannot be combined with target_parameters"),
        ({}, {"depth_metric": "perplexity"}, "has to know the number of dropped layers"),
        ({}, {"calibration_data": None}, "needs calibration_data"),
        ({"nonuniform_sizes": ["intermediate_size"]}, {}, "nonuniform_sizes names intermediate_size"),
        (
            {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 6, "num_hidden_layers": 4},
            {},
            "no size is left to choose",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(teacher, changes, arguments, message):
    request = PrunerConfig(**{"target_parameters": 0.5, "multiple_of": 1, **changes})
    with pytest.raises(PlanError, match=message):
        prune_model(teacher, request, **{"calibration_data": ROWS, "show_progress": False, **arguments})


@pytest.mark.parametrize("value", [0, -3, True, "half"])
def test_a_target_is_a_positive_number(value):
    with pytest.raises(PlanError, match="target_parameters="):
        PrunerConfig(target_parameters=value)
