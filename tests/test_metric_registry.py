"""Registered importance metrics: the guide's examples against naive computations, and everywhere that takes a name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from minitron_hf import PrunerConfig, prune_model, register_metric
from minitron_hf.cli.app import app
from minitron_hf.errors import DataError
from minitron_hf.recipe.settings import scoring_hints
from minitron_hf.scoring import metrics
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from pocket import POCKETS, float64_throughout, pocket_model, pocket_tokenizer, residual_norms
from test_importance import ROWS, assert_close, assert_equal_scores, scores_of
from test_metrics import MAKERS, caught_by_row, reduced

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "add-a-metric.md"
BUILT_IN = {"activation", "activation_range", "pre_activation", "contribution", "taylor", "magnitude", "random"}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))


@pytest.fixture
def guide() -> dict:
    """Everything that the guide's code defines, run in order at pocket size."""
    texts = [f"the old {a}{b} of {c} is new" for a in "ab" for b in "xyz" for c in "abcd"]
    names = {
        "teacher": pocket_model("llama", dtype=torch.float32),
        "tokenizer": pocket_tokenizer(),
        "texts": texts,
        "estimate_importance": estimate_importance,
    }
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in code:
        exec(compile(block.replace("tokenizer, metric", "tokenizer, max_length=16, metric"), "guide", "exec"), names)
    return names


def test_built_in_metrics_register_the_same_way():
    assert set(metrics.metric_names()) == BUILT_IN
    assert all(metric.function.__module__ == metrics.__name__ for metric in metrics.METRICS.values())


def test_activations_of_the_guide(guide: dict):
    """The largest value of every head, neuron and channel, row by row."""
    assert guide["scores"].settings["metric"] == "largest"
    scores, pocket = scores_of(pocket_model("llama"), metric="largest", batch_size=2), POCKETS["llama"]
    for axis, module in (("heads", pocket.attention_out), ("ffn", pocket.mlp_out), ("kv", pocket.attention_out)):
        count = scores.axes[axis].shape[1]
        path = f"{pocket.layers}.1.{module}"
        rows = caught_by_row("llama", [path], lambda _, args, __: args[0][0])[path]
        largest = [row.detach().unflatten(-1, (count, -1)).abs().amax(-1) for row in rows]
        assert_close(scores.axes[axis][1], reduced(largest), axis, rtol=1e-10)
    paths = residual_norms("llama", pocket_model("llama"))
    caught = caught_by_row("llama", paths, lambda _, __, output: output[0])
    total = sum(reduced([row.detach().abs() for row in caught[path]]) for path in paths)
    assert_close(scores.axes["hidden"], total, "hidden", rtol=1e-10)


def test_pre_activations_are_read_before_the_nonlinearity():
    @register_metric("cubed", reads="pre_activations")
    def cubed(units):
        return units.values[..., 0] ** 3 if units.is_scalar else units.norm

    found = scores_of(pocket_model("llama"), metric=["cubed", "activation"])
    path = f"{POCKETS['llama'].layers}.2."
    total = 0
    for maker, _ in MAKERS["llama"]:
        rows = caught_by_row("llama", [path + maker], lambda _, __, output: output[0])[path + maker]
        total = total + reduced([row.detach() ** 3 for row in rows])
    assert_close(found["cubed"].axes["ffn"][2], total, "ffn", rtol=1e-10)
    assert_close(found["cubed"].axes["heads"], found["activation"].axes["heads"], "heads", rtol=1e-12)


def test_gradients_of_the_guide(guide: dict):
    """Squares of x · ∂L/∂x by autograd, a row at a time."""
    scores, pocket = scores_of(pocket_model("llama"), metric="fisher", batch_reduction="mean"), POCKETS["llama"]
    model, rows = pocket_model("llama"), []
    read = model.get_submodule(f"{pocket.layers}.3.{pocket.mlp_out}")
    for row in ROWS.rows:
        caught: list[torch.Tensor] = []

        def watch(_: nn.Module, args: tuple, caught: list[torch.Tensor] = caught) -> None:
            args[0].retain_grad()
            caught.append(args[0])

        hook = read.register_forward_pre_hook(watch)
        with float64_throughout():
            model(torch.tensor([row]), labels=torch.tensor([row])).loss.backward()
        hook.remove()
        rows.append((caught[0] * caught[0].grad).detach()[0].square().sum(0))
    assert_close(scores.axes["ffn"][3], torch.stack(rows).mean(0), "ffn", rtol=1e-8, atol=1e-16)


def test_weights_of_the_guide(guide: dict):
    model = pocket_model("llama")
    scores = scores_of(model, None, metric="absolute")
    mlp = model.model.layers[4].mlp
    expected = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1) + mlp.down_proj.weight.abs().sum(0)
    assert_close(scores.axes["ffn"][4], expected.detach().to(scores.axes["ffn"]), "ffn", rtol=1e-6)
    layer = sum(tensor.detach().abs().sum() for tensor in model.model.layers[4].parameters())
    assert_close(scores.blocks[4, 4], layer.to(scores.blocks), "layer", rtol=1e-6)


def test_every_way_to_name_a_metric_takes_a_registered_one(tmp_path: Path):
    @register_metric("as_activation")
    def as_activation(units):
        return units.contribution if units.is_group else units.norm

    model = pocket_model("llama", dtype=torch.float32)
    assert_equal_scores(scores_of(model, metric="as_activation"), scores_of(model))
    request = PrunerConfig(intermediate_size=0.5, hidden_size=24)
    students = [
        prune_model(model, request, calibration_data=ROWS, metric=metric, show_progress=False)
        for metric in ("activation", "as_activation")
    ]
    one, other = (student.pruning_plan.kept for student in students)
    assert all(np.array_equal(one[axis], other[axis]) for axis in one)
    teacher, text = tmp_path / "teacher", tmp_path / "text.jsonl"
    model.save_pretrained(teacher)
    pocket_tokenizer().save_pretrained(teacher)
    text.write_text('{"text": "the old a of b is new"}\n' * 32)
    folder = tmp_path / "scores"
    score = ["score", str(teacher), "--data", str(text), "-o", str(folder), "--set", "max_length=16", "--set"]
    done = CliRunner().invoke(app, [*score, "metric=as_activation"])
    assert done.exit_code == 0, done.output
    assert ImportanceScores.from_pretrained(folder).settings["metric"] == "as_activation"
    assert "as_activation" in str(scoring_hints()["metric"])  # what a recipe's scores are checked against


def test_metrics_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "other_package.py").write_text(
        "from minitron_hf import register_metric\n\n"
        "@register_metric('theirs')\ndef theirs(units):\n    return units.norm\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def found(group: str) -> Iterator[EntryPoint]:
        assert group == "minitron_hf.metrics"
        yield EntryPoint("theirs", "other_package:theirs", group)

    monkeypatch.setattr(metrics, "entry_points", found)
    assert "theirs" in metrics.metric_names()


def test_unknown_metrics_are_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"metric='tailor' is unknown\. Did you mean 'taylor'") as refused:
        estimate_importance(pocket_model("llama"), ROWS, metric="tailor")
    assert all(name in str(refused.value) for name in BUILT_IN)
    with pytest.raises(DataError, match="names no metric"):
        estimate_importance(pocket_model("llama"), ROWS, metric=[])
    with pytest.raises(DataError, match="reads='weight'"):
        register_metric("mine", reads="weight")


def test_a_name_belongs_to_one_function():
    def mine(units):
        return units.norm

    register_metric("mine")(mine)
    register_metric("mine")(mine)  # a notebook cell that is run again
    with pytest.raises(DataError, match="an importance metric 'taylor' already"):
        register_metric("taylor")(mine)


@pytest.mark.parametrize(
    ("reads", "function", "words"),
    [
        ("activations", lambda units: units.norm.sum(-1), "one value per token and unit"),
        ("activations", lambda units: None, "NoneType"),
        ("gradients", lambda x, gradient: x.sum(), "one term per element"),
        ("weights", lambda spec, model: ({"ffn": torch.zeros(3)}, torch.zeros(5, 5)), "scores of 'ffn' of shape"),
    ],
)
def test_results_of_the_wrong_shape_are_refused(reads, function, words):
    register_metric("wrong", reads=reads)(function)
    with pytest.raises(DataError, match=f"metric 'wrong' returned .*{words}"):
        estimate_importance(pocket_model("llama"), ROWS, metric="wrong", show_progress=False)


def test_scores_that_are_not_finite_are_refused():
    register_metric("nothing")(lambda units: units.norm * float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        estimate_importance(pocket_model("llama"), ROWS, metric="nothing", show_progress=False)


def test_metrics_without_data_prune_without_data(guide: dict):
    model, request = pocket_model("llama"), PrunerConfig(intermediate_size=0.5)
    student = prune_model(model, request, metric="absolute")
    scores = estimate_importance(model, metric="absolute")
    for layer, kept in enumerate(student.pruning_plan.kept["ffn"]):
        assert set(kept) == set(scores.axes["ffn"][layer].topk(len(kept)).indices.tolist())
    with pytest.raises(ValueError, match="only used to score calibration_data"):
        prune_model(model, request, metric="fisher")
