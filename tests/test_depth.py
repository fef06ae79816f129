"""Depth by what it costs: the reused prefixes against real students without the layers, one row at a time."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch

from minitron_hf.errors import DataError, PlanError, UnsupportedModelError
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.publishing.card import render_model_card
from minitron_hf.publishing.importance_plots import plot_layers
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from minitron_hf.sizes.request import PrunerConfig
from pocket import POCKETS, float64_throughout, logits, pocket_model
from test_importance import ROWS, assert_equal_scores, loader, scores_of

#: One that returns tuples, side-by-side residuals, sliding windows by layer, experts in some layers, norms after.
NAMES = [name for name in ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "qwen2_moe", "falcon") if name in POCKETS]
#: Scores are kept in float32.
ROUNDING = 2**-23


def without(model, layers: list[int]):
    """A student of its own, by the code that cuts."""
    return apply_plan(model, make_plan(model, PrunerConfig(layers_to_drop=layers))) if layers else model


def naive(model, layers: list[int], metric: str) -> float:
    student = without(model, layers)
    loss = tokens = change = size = 0.0
    for row in ROWS.rows:
        ids = torch.tensor([row])
        found, expected = logits(student, ids)[0], logits(model, ids)[0]
        log_probabilities = found[:-1].log_softmax(-1)
        loss -= float(sum(log_probabilities[position, token] for position, token in enumerate(row[1:])))
        tokens += len(row) - 1
        change += float(((found - expected) ** 2).sum())
        size += float((expected**2).sum())
    return math.exp(loss / tokens) if metric == "perplexity" else change / size


def possible(name: str, layers: list[int]) -> bool:
    try:
        make_plan(POCKETS[name].config, PrunerConfig(layers_to_drop=layers))
    except PlanError:
        return False
    return True


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "metric"), [("llama", "logit_nmse"), *((name, "perplexity") for name in NAMES)])
def test_every_block_equals_the_student_without_it(name: str, metric: str):
    model = pocket_model(name)
    depth = model.config.num_hidden_layers
    scores = scores_of(model, metric="random", depth_metric=metric, block_length=2, batch_size=2)
    for first, last in itertools.combinations_with_replacement(range(depth), 2):
        layers = list(range(first, last + 1))
        found = float(scores.blocks[first, last])
        if len(layers) > 2:
            assert math.isnan(found)
        elif possible(name, layers):
            assert math.isclose(found, naive(model, layers, metric), rel_tol=ROUNDING), layers
    baseline = naive(model, [], metric)
    assert math.isclose(scores.settings["depth_baseline"], baseline, rel_tol=1e-9, abs_tol=1e-15)
    assert len(set(scores.layers.tolist())) == depth


@pytest.mark.parametrize(("name", "metric"), [("llama", "logit_nmse"), ("gpt2", "perplexity")])
def test_one_after_another_equals_a_greedy_search_over_students(name: str, metric: str):
    model = pocket_model(name)
    depth = model.config.num_hidden_layers
    kwargs = {"keep_first_layers": 0, "keep_last_layers": 1}
    scores = scores_of(model, metric="random", depth_metric=metric, block_length=3, one_by_one=True, **kwargs)
    dropped: list[int] = []
    for step in range(3):
        values = {
            layer: naive(model, sorted([*dropped, layer]), metric)
            for layer in range(depth - 1)
            if layer not in dropped
        }
        for layer in range(depth):
            found = float(scores.removals[step, layer])
            if layer in values:
                assert math.isclose(found, values[layer], rel_tol=ROUNDING)
            else:
                assert math.isnan(found)
        dropped.append(min(values, key=lambda layer: values[layer]))
    assert scores.removed_layers == dropped
    with float64_throughout():
        plan = make_plan(model, PrunerConfig(num_hidden_layers=depth - 2, contiguous=False, **kwargs), scores)
        assert plan.layers_dropped == tuple(sorted(dropped[:2]))
        with pytest.raises(PlanError, match="hold all blocks of 2 layers"):
            make_plan(model, PrunerConfig(num_hidden_layers=depth - 2), scores)
        request = PrunerConfig(
            num_hidden_layers=depth - 1, contiguous=False, keep_first_layers=depth - 1, keep_last_layers=0
        )
        with pytest.raises(PlanError, match=r"one after another, and 1 of the layers \[\d\] are to go"):
            make_plan(model, request, scores)


def test_a_function_is_given_stock_models_that_share_the_weights():
    model = pocket_model("llama")
    seen = []

    def weight(student) -> float:
        seen.append(student)
        return float(student.model.layers[0].mlp.up_proj.weight.detach().norm())

    scores = scores_of(model, metric="magnitude", depth_metric=weight, block_length=2)
    first, second, third = (float(layer.mlp.up_proj.weight.detach().norm()) for layer in model.model.layers[:3])
    expected = torch.tensor([second, first, first, first, first], dtype=torch.float32)
    torch.testing.assert_close(scores.layers.float(), expected)
    assert math.isclose(float(scores.blocks[0, 1]), third, rel_tol=1e-6)
    assert math.isclose(float(scores.blocks[1, 2]), first, rel_tol=1e-6)
    assert (scores.settings["depth_metric"], scores.settings["depth_baseline"]) == ("weight", first)
    assert {type(student) for student in seen} == {type(model)}
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    for student in seen:
        assert {parameter.data_ptr() for parameter in student.parameters()} <= addresses
    ids = torch.tensor([ROWS.rows[2]])
    with float64_throughout():
        expected = without(model, [2])
        generated = [student.generate(ids, max_new_tokens=4, do_sample=False) for student in (seen[3], expected)]
    assert torch.equal(logits(seen[3], ids), logits(expected, ids))
    assert torch.equal(*generated)
    with pytest.raises(DataError, match="'<lambda>' gave NaN"):
        scores_of(model, metric="random", depth_metric=lambda student: math.nan)


class Width:
    def __call__(self, student, factor: float = 1.0) -> float:
        return factor * student.config.num_hidden_layers


def width(student, factor: float) -> float:
    return factor * student.config.num_hidden_layers


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (functools.partial(width, factor=2.0), "width"),
        (Width(), "Width"),
        (functools.partial(functools.partial(Width()), factor=2.0), "Width"),
    ],
    ids=["partial", "object", "partial of a partial"],
)
def test_any_callable_has_a_name_in_files(metric, name: str, tmp_path):
    scores = scores_of(pocket_model("llama"), metric="random", depth_metric=metric, block_length=1)
    scores.save_pretrained(tmp_path)
    assert ImportanceScores.from_pretrained(tmp_path).settings["depth_metric"] == name


def test_removing_a_layer_costs_only_those_after_it():
    model = pocket_model("llama")
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    scores_of(model, metric="random", depth_metric="perplexity", block_length=1, batch_size=5)
    assert len(calls) == 5 + (4 + 3 + 2 + 1)  # the whole model once, then what follows each layer
    assert [calls.count(layer) for layer in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("metric", ["perplexity", "logit_nmse"])
def test_neither_batches_nor_padding_matter(metric: str):
    model = pocket_model("qwen3")
    kwargs = {"metric": "random", "depth_metric": metric}
    expected = scores_of(model, loader(ROWS.rows, 1), **kwargs)
    assert not expected.blocks[:, :-1].triu().isnan().any()
    assert_equal_scores(scores_of(model, loader(ROWS.rows, 5, "left", 3), **kwargs), expected, 1e-9)
    assert_equal_scores(scores_of(model, loader(ROWS.rows, 2, "right"), **kwargs), expected, 1e-9)


def test_model_is_left_as_it_was():
    model = pocket_model("gpt2").train()
    before = [dict(module.__dict__) for module in model.modules()]
    scores_of(model, depth_metric="perplexity", block_length=2, one_by_one=True)
    assert [module.__dict__.keys() for module in model.modules()] == [values.keys() for values in before]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.transformer.h[3].forward = lambda *_, **__: 1 / 0
    own = model.transformer.h[3].forward
    with pytest.raises(ZeroDivisionError):
        scores_of(model, depth_metric="perplexity", metric="random")
    assert model.transformer.h[3].forward is own
    assert model.training


def test_scores_and_plans_know_how_layers_were_chosen(tmp_path: Path):
    model = pocket_model("llama", dtype=torch.float32)
    rows = [list(row) for row in ROWS.rows]
    kwargs = {"max_length": 8, "show_progress": False}
    scores = estimate_importance(model, rows, depth_metric="perplexity", block_length=2, one_by_one=True, **kwargs)
    reread = ImportanceScores.from_pretrained(scores.save_pretrained(tmp_path))
    torch.testing.assert_close(reread.removals, scores.removals, rtol=0, atol=0, equal_nan=True)
    assert reread.digest == scores.digest
    assert reread.removed_layers == scores.removed_layers
    assert reread.digest != estimate_importance(model, rows, **kwargs).digest
    assert reread.settings["depth_metric"] == "perplexity"
    assert reread.settings["metric"] == "activation"
    for request in (
        PrunerConfig(num_hidden_layers=3, hidden_size=24),
        PrunerConfig(num_hidden_layers=3, contiguous=False),
        PrunerConfig(hidden_size=24),
    ):
        student = prune_model(model, request, calibration_data=rows, depth_metric="perplexity", **kwargs)
        settings = student.pruning_plan.scores["settings"]
        assert settings.get("block_length") == (2 if request.num_hidden_layers else None)
        assert settings.get("one_by_one") == (None if request.num_hidden_layers is None else not request.contiguous)
    blocks = estimate_importance(model, rows, depth_metric="perplexity", block_length=2, **kwargs).blocks
    best = min((1, 2), key=lambda first: float(blocks[first, first + 1]))
    student = prune_model(
        model, PrunerConfig(num_hidden_layers=3), calibration_data=rows, depth_metric="perplexity", **kwargs
    )
    assert student.pruning_plan.layers_dropped == (best, best + 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth_metric": "loss"}, "depth_metric='loss' is unknown. Expected perplexity, logit_nmse, or a function"),
        ({"block_length": 2}, "say what depth_metric measures"),
        ({"depth_metric": "perplexity", "block_length": 5}, "expected 1 to 4 of the 5 layers"),
        ({"depth_metric": "perplexity", "one_by_one": True}, "Pass block_length"),
        (
            {"depth_metric": "perplexity", "one_by_one": True, "block_length": 3, "keep_last_layers": 2},
            "only 2 of 5 layers can be removed",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_requests_are_refused(kwargs: dict, message: str):
    with pytest.raises(DataError) as caught:
        estimate_importance(pocket_model("llama"), ROWS, show_progress=False, **kwargs)
    assert message in str(caught.value)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("metric", ["perplexity", "logit_nmse"])
def test_a_model_that_computes_nan_is_refused(metric: str, one_by_one: bool):
    model = pocket_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UnsupportedModelError, match=f"depth_metric='{metric}' is not finite"):
        estimate_importance(
            model, ROWS, show_progress=False, depth_metric=metric, one_by_one=one_by_one, block_length=2
        )


def test_depth_needs_data():
    with pytest.raises(DataError, match="needs calibration data"):
        estimate_importance(pocket_model("llama"), metric="random", depth_metric="perplexity")


def test_the_candidates_are_in_the_plan_and_on_the_card(tmp_path: Path):
    model = pocket_model("llama", dtype=torch.float32)
    rows = [list(row) for row in ROWS.rows]
    for contiguous in (True, False):
        folder = tmp_path / str(contiguous)
        request = PrunerConfig(num_hidden_layers=3, contiguous=contiguous)
        kwargs = {"max_length": 8, "show_progress": False, "block_length": 2, "one_by_one": not contiguous}
        scores = estimate_importance(model, rows, depth_metric="perplexity", **kwargs)
        plan = make_plan(model, request, scores)
        plan.save_pretrained(folder)
        scores.save_pretrained(folder)
        tried = plan.to_dict()["scores"]["layers"]
        rivals = [candidate for candidate in tried if len(candidate["dropped"]) == 2]
        movable = [candidate for candidate in rivals if set(candidate["dropped"]) <= {1, 2, 3}]
        assert movable[0]["dropped"] == list(plan.layers_dropped)
        for candidate in movable:
            layers = candidate["dropped"]
            value = scores.blocks[layers[0], layers[1]] if contiguous else None
            assert value is None or candidate["score"] == float(value)
        assert plot_layers(folder).axes[0].get_ylabel() == "perplexity without"
        card = render_model_card(folder)
        chosen = ", ".join(map(str, plan.layers_dropped))
        assert f"| **{chosen}** | {movable[0]['score']:.4g} |" in card
        assert f"| none | {scores.settings['depth_baseline']:.4g} |" in card
