"""Iterated importance: the student of its scores is the student of a student, and one round is no round at all."""

from __future__ import annotations

import pytest
import torch

from minitron_hf.errors import PlanError
from minitron_hf.families import named_tensors
from minitron_hf.pruning.iterations import iterate_importance
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model
from test_importance import ROWS

CASES = {
    "neurons and channels": (
        "llama",
        {"intermediate_size": 20, "hidden_size": 12},
        {"intermediate_size": 36 / 52, "hidden_size": 24 / 36},
    ),
    "groups and heads": (
        "qwen3",
        {"num_key_value_heads": 1, "num_attention_heads": 2},
        {"num_key_value_heads": 2 / 3, "num_attention_heads": 7 / 12},
    ),
    "heads, by way of a number that only other classes hold": (
        "llama",
        {"num_key_value_heads": 1, "num_attention_heads": 4},
        {"num_key_value_heads": 2 / 3, "num_attention_heads": 8 / 12, "model_type": "mistral"},
    ),
    "a block of layers": ("llama", {"num_hidden_layers": 3}, {"num_hidden_layers": 4}),
    "single layers": (
        "llama",
        {"num_hidden_layers": 3, "contiguous": False},
        {"num_hidden_layers": 4, "contiguous": False},
    ),
    "single layers and neurons": (
        "llama",
        {"num_hidden_layers": 3, "contiguous": False, "intermediate_size": 20},
        {"num_hidden_layers": 4, "contiguous": False, "intermediate_size": 36 / 52},
    ),
    "single layers and experts": (
        "mixtral",
        {"num_hidden_layers": 3, "contiguous": False, "num_experts": 2, "moe_intermediate_size": 6},
        {"num_hidden_layers": 4, "contiguous": False, "num_experts": 4 / 6, "moe_intermediate_size": 29 / 52},
    ),
    "experts and their neurons": (
        "mixtral",
        {"num_experts": 2, "moe_intermediate_size": 6},
        {"num_experts": 4 / 6, "moe_intermediate_size": 29 / 52},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_rounds_are_a_student_of_a_student(case: str):
    name, final, half = CASES[case]
    model = pocket_model(name, dtype=torch.float32)
    request = PrunerConfig(**final, multiple_of=1)
    between = PrunerConfig(**half, multiple_of=1)
    one = apply_plan(model, make_plan(model, between, estimate_importance(model, ROWS, show_progress=False)))
    two = apply_plan(one, make_plan(one, request, estimate_importance(one, ROWS, show_progress=False)))
    scores = iterate_importance(model, request, ROWS, iterations=2, show_progress=False)
    plan = make_plan(model, request, scores)
    student = apply_plan(model, plan)
    assert scores.settings["iterations"] == 2
    expected = named_tensors(two)
    if case == "a block of layers":
        # In one piece: what goes in the second round lies beside what went in the first.
        dropped = plan.layers_dropped
        assert dropped[1] == dropped[0] + 1
        assert set(
            make_plan(model, between, estimate_importance(model, ROWS, show_progress=False)).layers_dropped
        ) < set(dropped)
        return
    for path, tensor in named_tensors(student).items():
        # Compensated in one step or in two, which differ in the last digit.
        torch.testing.assert_close(tensor, expected[path], rtol=1e-6, atol=0, msg=path)
    once = prune_model(model, request, calibration_data=ROWS, show_progress=False)
    twice = prune_model(model, request, calibration_data=ROWS, iterations=2, show_progress=False)
    assert (
        once.pruning_plan.digest
        == make_plan(model, request, estimate_importance(model, ROWS, show_progress=False)).digest
    )
    assert twice.pruning_plan.digest == plan.digest


def test_one_round_is_one_shot():
    model = pocket_model("llama", dtype=torch.float32)
    found = iterate_importance(model, PrunerConfig(intermediate_size=20), ROWS, show_progress=False)
    expected = estimate_importance(model, ROWS, show_progress=False)
    assert (found.digest, found.settings, found.digests) == (expected.digest, expected.settings, expected.digests)


def test_rounds_that_cannot_be_followed_are_refused():
    model = pocket_model("llama", dtype=torch.float32)
    with pytest.raises(PlanError, match="expected a number of rounds"):
        iterate_importance(model, PrunerConfig(hidden_size=24), ROWS, iterations=0)
    with pytest.raises(PlanError, match="nonuniform_sizes or layers_to_drop"):
        iterate_importance(model, PrunerConfig(layers_to_drop=[1]), ROWS, iterations=2)
    request = PrunerConfig(num_hidden_layers=3, contiguous=False)
    with pytest.raises(PlanError, match="one after another already"):
        iterate_importance(model, request, ROWS, iterations=2, depth_metric="perplexity")


def test_a_way_that_no_stock_classes_can_go_is_refused_before_anything_is_scored():
    model = pocket_model("arcee", dtype=torch.float32)
    request = PrunerConfig(num_key_value_heads=1, num_attention_heads=4, multiple_of=1)
    with pytest.raises(PlanError, match=r"iterations=2: the student of round 1 .* Give other sizes to end with"):
        iterate_importance(model, request, ROWS, iterations=2)


@pytest.mark.parametrize(("drop", "iterations"), [(1, 3), (1, 4), (2, 2), (2, 3), (2, 4)])
def test_layers_that_are_gone_stay_gone_where_rounds_drop_none(drop: int, iterations: int):
    """Few layers in many rounds: some rounds drop none, and the layers that add next to nothing go all the same."""
    model = pocket_model("llama", dtype=torch.float32, num_hidden_layers=7)
    useless = (3, 4)[:drop]
    with torch.no_grad():
        for layer in useless:
            block = model.model.layers[layer]
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.mul_(1e-4)
    request = PrunerConfig(num_hidden_layers=7 - drop, intermediate_size=20, multiple_of=1)
    scores = iterate_importance(model, request, ROWS, iterations=iterations, show_progress=False)
    assert make_plan(model, request, scores).layers_dropped == useless


def test_no_round_cuts_more_than_the_last():
    """Sizes of rounds are rounded to multiples, which are below a final size that is none."""
    model = pocket_model("llama", dtype=torch.float32, intermediate_size=100)
    request = PrunerConfig(intermediate_size=97)
    scores = iterate_importance(model, request, ROWS, iterations=2, show_progress=False)
    for layer, kept in enumerate(make_plan(model, request, scores).kept["ffn"]):
        assert scores.axes["ffn"][layer][kept].isfinite().all()


def test_units_that_an_earlier_round_cut_cannot_be_kept():
    model = pocket_model("llama", dtype=torch.float32)
    scores = iterate_importance(
        model, PrunerConfig(intermediate_size=16, num_hidden_layers=3), ROWS, iterations=2, show_progress=False
    )
    with pytest.raises(PlanError, match=r"cut in an earlier round of scoring\. Score again"):
        make_plan(model, PrunerConfig(intermediate_size=48), scores)
