"""Pictures of a run: what is in them, that they are drawn when they can be, and that their bytes are reproducible."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from minitron_hf.errors import MismatchError, OutputError
from minitron_hf.pruning.candidates import Candidate
from minitron_hf.publishing.card import render_model_card
from minitron_hf.publishing.drawing import GREEN, GREY, RED, NothingToDrawError
from minitron_hf.publishing.importance_plots import plot_importance, plot_layers
from minitron_hf.publishing.plots import PLOTS, plot_training, write_plots
from minitron_hf.publishing.search_plot import plot_search
from minitron_hf.publishing.speed_plot import plot_speed
from minitron_hf.search.record import candidate_table
from run_folder import (
    DROPPED,
    FFN,
    HEADS,
    KEPT,
    LAYERS,
    evaluation,
    plan,
    save_scores,
    scores,
    search,
    training_record,
    write_json,
    write_run,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def curves(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_training_shows_what_was_logged(run_dir):
    figure = plot_training(run_dir)
    loss, agreement, rate = figure.axes
    history = training_record()["log_history"]
    drawn = curves(loss)["training loss"].get_xydata()
    assert drawn.tolist() == [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    drawn = curves(loss)["evaluation loss"].get_xydata()
    assert drawn.tolist() == [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    assert "evaluation KL to the teacher" not in curves(loss), "equal to the loss: one line, not two"
    drawn = curves(agreement)["evaluation"].get_xydata()
    np.testing.assert_allclose(
        drawn[:, 1], [100 * entry["eval_agreement"] for entry in history if "eval_agreement" in entry]
    )
    assert len(curves(rate)["learning rate"].get_xdata()) == 40


def test_kl_is_drawn_when_it_differs_from_the_loss(run_dir):
    record = training_record()
    for entry in record["log_history"]:
        if "eval_kl" in entry:
            entry["eval_kl"] *= 0.5
    write_json(run_dir / "distillation.json", record)
    assert "evaluation KL to the teacher" in curves(plot_training(run_dir).axes[0])


def test_several_evaluation_datasets(run_dir):
    record = training_record()
    for entry in record["log_history"]:
        if "eval_loss" in entry:
            entry["eval_stories_loss"] = entry.pop("eval_loss")
    write_json(run_dir / "distillation.json", record)
    assert set(curves(plot_training(run_dir).axes[0])) == {"training loss", "evaluation loss, stories"} | {
        "evaluation KL to the teacher"
    }


def test_panels_without_values_are_left_out(run_dir):
    record = training_record()
    record["log_history"] = [{"step": 5, "loss": 2.0}, {"step": 10, "loss": float("nan")}]
    write_json(run_dir / "distillation.json", record)
    figure = plot_training(run_dir)
    assert len(figure.axes) == 1
    assert curves(figure.axes[0])["training loss"].get_xydata().tolist() == [[5, 2.0]], "a NaN is not drawn"


def test_importance_marks_the_cut_and_the_dropped_units(run_dir):
    tensors, kept = scores()
    hidden, ffn, heads, kv = plot_importance(run_dir).axes[:4]
    assert "8 of 12 kept in each kept layer" in heads.get_title(loc="left")
    assert "all 4 kept" in kv.get_title(loc="left")
    curve, cut = hidden.get_lines()
    np.testing.assert_array_equal(curve.get_ydata(), np.sort(tensors["hidden"])[::-1])
    assert cut.get_xdata()[0] == KEPT["hidden"] + 0.5
    lines = ffn.get_lines()
    assert len(lines) == LAYERS + 1
    assert lines[-1].get_xdata()[0] == KEPT["ffn"] + 0.5
    assert len(lines[0].get_xdata()) == FFN
    assert [i for i, line in enumerate(lines[:-1]) if line.get_color() == GREY] == DROPPED
    crossed = {(int(layer), int(unit)) for unit, layer in heads.collections[-1].get_offsets()}
    rows = dict(zip(plan()["layers_kept"], kept["heads"].tolist(), strict=True))
    assert crossed == {(layer, unit) for layer, units in rows.items() for unit in range(HEADS) if unit not in units}
    (veil,) = heads.patches
    assert (veil.get_y() + 0.5, veil.get_y() + veil.get_height() - 0.5) == (DROPPED[0], DROPPED[-1])


def test_layers_without_units_are_left_out(run_dir):
    tensors, _ = scores()
    for name in ("ffn", "heads"):
        tensors[name][[0, 3]] = np.nan
    experts = np.random.default_rng(0).random((LAYERS, 3, 7)).astype(np.float32)
    experts[1] = np.nan
    save_scores(
        {**tensors, "moe_ffn": experts, "shared_ffn": np.full((LAYERS, 9), np.nan, np.float32)},
        run_dir / "scores.safetensors",
    )
    _, ffn, heads, _, moe_ffn = plot_importance(run_dir).axes[:5]
    assert len(ffn.get_lines()) == LAYERS - 2 + 1
    shown = np.ma.getmaskarray(heads.images[0].get_array())
    assert np.flatnonzero(shown.all(axis=1)).tolist() == [0, 3]
    assert np.flatnonzero(shown.any(axis=1)).tolist() == [0, 3]
    assert {0, 3}.isdisjoint({int(layer) for _, layer in heads.collections[-1].get_offsets()})
    assert "Neurons of an expert" in moe_ffn.get_title(loc="left")
    lines = moe_ffn.get_lines()
    assert len(lines) == LAYERS - 1
    by_hand = np.mean([sorted(expert, reverse=True) for expert in experts[0].tolist()], axis=0)
    np.testing.assert_allclose(lines[0].get_ydata(), by_hand, rtol=1e-6)
    titles = {panel.get_title(loc="left").split("\n")[0] for panel in plot_importance(run_dir).axes}
    assert not any("shared" in title for title in titles)


def test_wide_axes_are_drawn_with_few_points(run_dir):
    tensors, _ = scores()
    wide = np.random.default_rng(0).random(5000).astype(np.float32)
    save_scores({**tensors, "hidden": wide}, run_dir / "scores.safetensors")
    curve = plot_importance(run_dir).axes[0].get_lines()[0]
    ranks, values = curve.get_xdata(), curve.get_ydata()
    assert len(ranks) <= 600
    assert (ranks[0], ranks[-1]) == (1, 5000)
    np.testing.assert_array_equal(values, np.sort(wide)[::-1][ranks - 1])


def test_layers_shows_single_layers_and_the_dropped_block(run_dir):
    tensors, _ = scores()
    left, right, *_ = plot_layers(run_dir).axes
    bars = left.patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], np.diag(tensors["blocks"]))
    assert [i for i, bar in enumerate(bars) if to_hex(bar.get_facecolor()) == RED.lower()] == DROPPED
    (outline,) = right.patches
    assert (outline.get_y() + 0.5, outline.get_x() + 0.5) == (DROPPED[0], DROPPED[-1])
    shown = right.images[0].get_array()
    assert np.ma.getmaskarray(shown).sum() == LAYERS * (LAYERS - 1) // 2


def test_search_joins_and_names_the_shapes_that_none_beats(run_dir):
    size, time = plot_search(run_dir).axes
    for panel, costs in ((size, [300_000, 420_000]), (time, [1e3 / 400, 1e3 / 310])):
        [front] = [line for line in panel.get_lines() if line.get_color() == GREEN]
        np.testing.assert_allclose(front.get_xydata(), list(zip(costs, [1.20, 0.90], strict=True)))
        assert [text.get_text() for text in panel.texts] == ["intermediate_size=96", "intermediate_size=160"]
        [ring] = [line for line in panel.get_lines() if line.get_markeredgecolor() == RED]
        np.testing.assert_allclose(ring.get_xydata(), [(costs[1], 0.61)])
    drawn = {
        tuple(np.round(segment[:, 1], 3)) for bars in size.containers for segment in bars.lines[2][0].get_segments()
    }
    assert drawn == {
        (round(value - error, 3), round(value + error, 3))
        for one in search()["candidates"]
        for value, error in [(one["proxy"]["value"], 0.1), *((turn["kl"], 0.02) for turn in one["rounds"])]
    }


def test_a_search_without_distillation_compares_what_was_pruned(run_dir):
    record = search()
    for one in record["candidates"]:
        one |= {"rounds": [], "decode_tokens_per_second": None}
    write_json(run_dir / "search.json", record)
    [panel] = plot_search(run_dir).axes
    [front] = [line for line in panel.get_lines() if line.get_color() == GREEN]
    assert front.get_xydata().tolist() == [[250_000, 8.0], [300_000, 6.5], [420_000, 5.5]]


def test_shapes_that_were_compared_on_one_row_have_no_errors(run_dir):
    """Their standard errors are NaN, which JSON holds as null: picture, card and a search that goes on take that."""
    record = search()
    for one in record["candidates"]:
        for measured in (one["proxy"], *one["rounds"], *([one["behind"]] if one["behind"] else [])):
            measured["stderr"] = None
    write_json(run_dir / "search.json", record)
    bars = plot_search(run_dir).axes[0].containers
    heights = [np.ptp(segment[:, 1]) for one in bars for segment in one.lines[2][0].get_segments()]
    assert heights == [0] * 9
    assert "| intermediate_size=160 | 420,000 | 5.500 | 0.610 | 2,000 | – |" in render_model_card(run_dir)
    candidates = [Candidate.from_dict(one) for one in record["candidates"]]
    assert all(math.isnan(turn["stderr"]) for one in candidates for turn in one.rounds)
    assert [str(each) for each in candidate_table(candidates).columns[3].cells][:2] == ["0.610", "0.800"]


def test_plots_are_drawn_only_where_their_inputs_exist(run_dir):
    assert [path.name for path in write_plots(run_dir)] == list(PLOTS)
    (run_dir / "scores.safetensors").unlink()
    assert [path.name for path in write_plots(run_dir)] == ["training.png", "search.png", "speed.png"]
    write_json(run_dir / "distillation.json", training_record() | {"log_history": []})
    write_json(run_dir / "search.json", search() | {"candidates": []})
    (run_dir / "evaluation.json").unlink()
    assert write_plots(run_dir) == []


def test_quality_is_drawn_against_latency_and_speed_against_the_batch(run_dir):
    record = evaluation()
    [panel] = plot_speed(run_dir).axes
    points = [bars.lines[0].get_xydata()[0].tolist() for bars in panel.containers]
    timed = [record["models"][name] for name in ("teacher", "student")]
    assert points == [
        [1e3 / one["decode_tokens_per_second"]["median"], one["metrics"]["loss"]["value"]] for one in timed
    ]
    for one in timed:
        one["speeds"] = [
            {"batch_size": size, "prompt_tokens": length, "decode_tokens_per_second": {"median": 10.0 * size + length}}
            for size in (4, 1)
            for length in (32, 8)
        ]
    write_json(run_dir / "evaluation.json", record)
    _, second = plot_speed(run_dir).axes
    assert [line.get_xydata().tolist() for line in second.get_lines()] == [[[1, 18], [4, 48]]] * 2
    del record["models"]["student"]
    write_json(run_dir / "evaluation.json", record)
    with pytest.raises(NothingToDrawError, match="two models"):
        plot_speed(run_dir)


def test_a_picture_of_a_newer_format_is_refused_and_not_left_out(run_dir):
    write_json(run_dir / "search.json", search() | {"format": 2})
    with pytest.raises(MismatchError, match=r"search\.json has format 2"):
        write_plots(run_dir)


@pytest.mark.slow
def test_a_speed_that_was_not_measured_again_is_not_shown(run_dir):
    write_plots(run_dir)
    record = evaluation()
    for one in record["models"].values():
        one.pop("decode_tokens_per_second", None)
    write_json(run_dir / "evaluation.json", record)
    write_plots(run_dir)
    assert not (run_dir / "plots" / "speed.png").exists()


@pytest.mark.slow
def test_layers_only_scores_give_no_importance_plot(run_dir):
    tensors, _ = scores()
    write_plots(run_dir)
    assert (run_dir / "plots" / "importance.png").is_file()
    save_scores({"blocks": tensors["blocks"]}, run_dir / "scores.safetensors")
    with pytest.raises(MismatchError, match="no width axis"):
        plot_importance(run_dir)
    left = ["training.png", "layers.png", "search.png", "speed.png"]
    assert [path.name for path in write_plots(run_dir)] == left
    assert {path.name for path in (run_dir / "plots").iterdir()} == set(left), "the picture of other scores is gone"


def test_same_files_give_the_same_bytes_whatever_the_style(run_dir):
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = {path.name: path.read_bytes() for path in write_plots(run_dir)}
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.dpi": 33, "savefig.transparent": True}):
        after = {path.name: path.read_bytes() for path in write_plots(run_dir)}
        assert matplotlib.rcParams["figure.dpi"] == 33, "the user's own style is left alone"
    assert before == after
    assert sys.modules.get("matplotlib.pyplot") is pyplot, "pyplot and its global figures are not needed"
    assert pyplot is None or pyplot.get_fignums() == []
    assert all(content.startswith(b"\x89PNG") for content in before.values())


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(OutputError, match=r"distillation\.json does not exist"):
        plot_training(tmp_path)
    with pytest.raises(OutputError, match=r"scores\.safetensors does not exist"):
        plot_layers(tmp_path)
    (tmp_path / "distillation.json").write_text(
        json.dumps({"format": 1, "log_history": [{"step": 1, "learning_rate": 1.0}]})
    )
    with pytest.raises(MismatchError, match="logs no loss"):
        plot_training(tmp_path)
