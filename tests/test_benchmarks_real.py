"""The harness for real teachers, at pocket size: stopped runs, paired intervals, verdicts, the report."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import corpora, report, tasks
from benchmarks.real.arms import load_experiments
from benchmarks.real.intervals import Difference, paired_difference, t_quantile, verdict
from benchmarks.real.measure import unpacked
from benchmarks.real.optimizers import MuonWithAdamW, split_parameters
from benchmarks.real.run import Bench
from benchmarks.real.stopping import Stop, Stopped

from minitron_hf import evaluate_models
from pocket import pocket_model, pocket_tokenizer

WORDS = ["the", "old", "house", "by", "a", "river", "was", "full", "of", "small", "green", "birds", "and", "a", "cat"]


def texts(count: int, seed: int) -> list[str]:
    order = random.Random(seed)
    return [" ".join(order.choices(WORDS, k=order.randint(5, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def bench_files(tmp_path_factory):
    """A pocket teacher, three held-out domains, two corpora and a small table of arms."""
    folder = tmp_path_factory.mktemp("bench")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer().save_pretrained(folder / "teacher")
    found = {"train": {}, "held_out": {}}
    for kind, name, count in (
        ("train", "mixed", 120),
        ("train", "stories", 60),
        ("held_out", "wikitext2", 6),
        ("held_out", "stories", 6),
        ("held_out", "peps", 6),
    ):
        path = folder / f"{kind}-{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count, len(found[kind]))))
        found[kind][name] = corpora.given_file(str(path))
    table = yaml.safe_load((Path(corpora.__file__).parent / "experiments.yaml").read_text())
    table["shapes"] = {"24-layers-ffn-1080": {"num_hidden_layers": 2, "intermediate_size": 0.5}}
    table["base"] |= {"calibration_rows": 8, "calibration_length": 16, "length": 16, "tokens_per_step": 64}
    table["base"] |= {"tokens": 384}
    table["experiments"] = {"controls": table["experiments"]["controls"]}
    (folder / "table.yaml").write_text(yaml.safe_dump(table))
    return folder, found


def bench(bench_files, tmp_path, stop: Stop | None = None, **kwargs) -> Bench:
    folder, found = bench_files
    settings = {"rows": 6, "row_length": 32, **kwargs}
    return Bench(str(folder / "teacher"), found, tmp_path / "work", tmp_path / "results", stop=stop, **settings)


def arm_of(bench_files, **changes):
    experiments = load_experiments(bench_files[0] / "table.yaml")
    return experiments["controls"].arms[0].at(**changes)


class StopsSoon(Stop):
    """Wants to stop after having been asked so often."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience = patience

    @property
    def wanted(self) -> bool:
        self.patience -= 1
        return self.patience < 0


def without_time(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize(
    ("patience", "changes"),
    [
        (3, {}),
        pytest.param(7, {"optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param(7, {"train": "lora-2"}, marks=pytest.mark.slow),
        pytest.param(7, {"teacher": "cached-16"}, marks=pytest.mark.slow),
        pytest.param(7, {"teacher": "corrected-meanwhile"}, marks=pytest.mark.slow),
        pytest.param(7, {"teacher": "corrected"}, marks=pytest.mark.slow),
        pytest.param(7, {"loss": "kl+states+embeddings"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_again_and_again_gives_the_same_result(bench_files, tmp_path, patience, changes):
    arm = arm_of(bench_files, **changes)
    whole = bench(bench_files, tmp_path / "whole").run(arm)
    result, attempts = None, 0
    while result is None:
        attempts += 1
        assert attempts < 40
        try:
            result = bench(bench_files, tmp_path / "stopped", StopsSoon(patience)).run(arm)
        except Stopped:
            continue
    assert attempts > 2
    assert without_time(result) == without_time(whole)
    assert not list((tmp_path / "stopped").rglob("checkpoint-*"))
    [path] = (tmp_path / "stopped" / "results").glob("*.json")
    assert json.loads(path.read_text()) == result


def test_values_are_those_of_evaluate_models(bench_files, tmp_path):
    run = bench(bench_files, tmp_path)
    result = run.run(arm_of(bench_files))
    [student] = (tmp_path / "work").glob("arms/*/student")
    found = evaluate_models(
        {"teacher": run.teacher, "student": str(student)},
        [{"text": text} for text in corpora.read_texts(bench_files[1]["held_out"]["wikitext2"]["file"])],
        processing_class=run.tokenizer,
        max_length=32,
        num_rows=6,
        speed=False,
        show_progress=False,
    )["models"]
    for name, measured in result["summary"]["after"]["wikitext2"].items():
        assert measured == pytest.approx(found["student"]["metrics"][name], abs=2e-6), name
    assert result["summary"]["teacher"]["wikitext2"]["loss"] == pytest.approx(
        found["teacher"]["metrics"]["loss"], abs=2e-6
    )
    rows = result["rows"]["after"]["wikitext2"]["kl"]
    counts = unpacked(result["held_out"]["wikitext2"]["tokens"])
    assert sum(unpacked(rows)) / sum(counts) == pytest.approx(
        found["student"]["metrics"]["kl_divergence"]["value"], rel=1e-4
    )


def test_controls_start_from_students_of_the_same_shape(bench_files, tmp_path):
    run = bench(bench_files, tmp_path)
    base = run.run(arm_of(bench_files))
    for changes in ({"metric": "random"}, {"metric": "none", "repair": "none"}, {"corpus": "stories"}):
        other = run.run(arm_of(bench_files, **changes))
        assert other["student"] == base["student"]
        assert (other["rows"]["before"] == base["rows"]["before"]) == ("corpus" in changes)
        assert other["rows"]["after"] != base["rows"]["after"]


def test_every_arm_of_the_table_is_known_and_divides_its_tokens_alike():
    experiments = load_experiments()
    for experiment in experiments.values():
        for tokens in (None, [131072]):
            for arm in experiment.runs(tokens):
                assert arm.steps * arm.rows_per_step * arm["length"] == arm["tokens"], arm.name
                assert "/" not in arm.name


# ---- Intervals and verdicts ----


def test_the_paired_interval_of_equal_rows_is_the_textbook_one():
    """Against a naive oracle: mean and t·s/√n of the differences of the rows' means."""
    order = random.Random(0)
    one = [order.gauss(500, 50) for _ in range(12)]
    other = [value + order.gauss(20, 5) for value in one]
    found = paired_difference([other], [one], [511] * 12)
    differences = [(a - b) / 511 for a, b in zip(other, one)]
    half = 2.20098516 * statistics.stdev(differences) / math.sqrt(12)  # t table, 11 degrees of freedom
    assert found.value == pytest.approx(statistics.mean(differences))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_the_paired_interval_covers_the_truth_as_often_as_it_says():
    """Rows and seeds both vary; the interval errs on the safe side."""
    order, hits, trials = random.Random(1), 0, 200
    for _ in range(trials):
        rows = [order.gauss(0, 1) for _ in range(30)]
        seeds = [order.gauss(0, 0.2) for _ in range(3)]
        zeros = [[0.0] * 30] * 3
        other = [[10 * (0.5 + row + seed + order.gauss(0, 0.3)) for row in rows] for seed in seeds]
        found = paired_difference(other, zeros, [10] * 30)
        hits += found.low <= 0.5 <= found.high
    assert 0.93 * trials <= hits <= trials


@pytest.mark.parametrize(
    ("low", "high", "lower", "same"),
    [
        (-0.30, -0.10, "confirmed", "refuted"),
        (-0.015, -0.005, "confirmed", "confirmed"),
        (-0.01, 0.01, "refuted", "confirmed"),
        (-0.03, 0.01, "undecided", "undecided"),
        (0.05, 0.09, "refuted", "refuted"),
    ],
)
def test_verdicts(low, high, lower, same):
    difference = Difference((low + high) / 2, low, high, 1.0, 1)
    assert (verdict(difference, "lower"), verdict(difference, "same")) == (lower, same)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (5.5, 2.50186), (47, 2.01174)])
def test_quantiles_of_student_t(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=1e-5)


# ---- Report ----


def result_of(arm, kl: list[float]) -> dict:
    """A result with the given KL of each of its rows."""
    rows = {"loss": "1000 1100 1200", "kl": " ".join(map(str, kl)), "agree": "60 50 40"}
    domain = {"digest": "d", "num_rows": 3, "num_tokens": 300, "num_bytes": 1200, "tokens": "100 100 100"}
    return {
        "arm": dict(arm.settings),
        "teacher": {"name": "t", "digest": "x", "computed_in": "float32", "num_parameters": 9, "weights": "made up"},
        "student": {"num_parameters": 5},
        "held_out": {"wikitext2": domain},
        "rows": {
            "teacher": {"wikitext2": {"loss": "900 900 900"}},
            "before": {"wikitext2": rows},
            "after": {"wikitext2": rows},
        },
        "device": {"name": "a processor"},
    }


def test_a_report_is_the_same_every_time_and_says_what_the_rows_say(tmp_path):
    experiments = load_experiments()
    base, _, cross_entropy, _ = experiments["controls"].runs([1000], [0])
    folder = tmp_path / "results"
    folder.mkdir()
    for name, arm, kl in (("b", base, [50, 60, 70]), ("a", cross_entropy, [60, 71, 79])):
        (folder / f"{name}.json").write_text(json.dumps(result_of(arm, kl)))
    made = []
    for attempt in range(2):
        [results] = report.Results.read(folder)
        found = list(report.findings(results, experiments))
        report.draw(found, tmp_path / f"{attempt}.png")
        report.write_page(tmp_path / "page.md", report.text([results], experiments, "figure.png"))
        made.append(((tmp_path / "page.md").read_text(), (tmp_path / f"{attempt}.png").read_bytes()))
    assert made[0] == made[1]
    page = made[0][0]
    # -30/210 of 0.7 nats; s of the differences 10, 11, 9 is 1, so the interval is ± 4.303·(1/√3)/70.
    assert "| KL | -14.3 % [-17.8, -10.7] | **confirmed** |" in page.replace("wikitext2, ", "")
    assert "bits per byte | +0.0 % [+0.0, +0.0] | **refuted** |" in page
    assert "| controls | loss ce | 1k | 1 | 0.700 ± 0.055 |" in page
    assert page.startswith("# Real teachers")
    edited = page.replace("# Real teachers", "# Another title")
    (tmp_path / "page.md").write_text(edited)
    report.write_page(tmp_path / "page.md", report.text([results], experiments, "figure.png"))
    assert (tmp_path / "page.md").read_text() == edited


# ---- Parts ----


def test_the_two_optimizers_act_as_one():
    """A scheduler's rate reaches both; states survive saving; every parameter belongs to exactly one."""
    model = pocket_model("llama", dtype=torch.float32)
    matrices, others = split_parameters(model)
    assert {*map(id, matrices), *map(id, others)} == set(map(id, model.parameters()))
    assert len(matrices) + len(others) == len(list(model.parameters()))
    assert all(one is not model.get_input_embeddings().weight for one in matrices)
    optimizer = MuonWithAdamW(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def step():
        model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [5e-4, 5e-4]
    saved = [{name: value.clone() for name, value in model.state_dict().items()}, optimizer.state_dict()]
    saved[1] = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, saved[1])
    step()
    expected = model.lm_head.weight.clone(), model.model.layers[0].mlp.up_proj.weight.clone()
    model.load_state_dict(saved[0])
    optimizer = MuonWithAdamW(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.load_state_dict(saved[1])
    step()
    torch.testing.assert_close(model.lm_head.weight, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, expected[1], rtol=0, atol=0)


def test_a_mix_is_drawn_with_its_seed_and_leaves_the_rest(tmp_path):
    paths = []
    for name in ("a", "b"):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        Path(paths[-1]).write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(10)))
    sources = [(paths[0], 4), (paths[1], 6)]
    documents, left = corpora.mixed(sources, seed=3)
    assert corpora.mixed(sources, seed=3) == (documents, left)
    assert corpora.mixed(sources, seed=4)[0] != documents
    everything = {f"{name}{i}" for name in "ab" for i in range(10)}
    assert {*documents, *left[paths[0]], *left[paths[1]]} == everything
    assert len(documents) == 10


def test_students_are_compared_with_the_teacher_document_by_document(tmp_path):
    """Against counting: 2 of 8 documents are lost and 1 is gained."""
    teacher = {"piqa": {"correct": "11110000"}}
    found = tasks.with_differences({"piqa": {"correct": "00111000"}}, teacher)
    difference = found["piqa"]["difference_to_teacher"]
    assert difference["value"] == -1 / 8
    error = statistics.stdev([-1, -1, 0, 0, 1, 0, 0, 0]) / math.sqrt(8)
    assert difference["high"] == pytest.approx(-1 / 8 + 2.36462425 * error)  # t table, 7 degrees of freedom


def test_a_limit_takes_some_of_every_file(tmp_path):
    files = []
    for name in "abc":
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(f"{name}{index}\n" for index in range(10)))
    [some] = tasks.evenly(files, 6, tmp_path)
    assert some.read_text().split() == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert tasks.evenly(files, None, tmp_path) == files
