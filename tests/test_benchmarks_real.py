"""The harness for real teachers, at pocket size: stopped runs, paired intervals, verdicts, the report."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import before, corpora, report, stages_report, tasks, tasks_report
from benchmarks.real.arms import SCREEN_TOKENS, load_experiments
from benchmarks.real.intervals import Difference, paired_difference, t_quantile, verdict
from benchmarks.real.measure import unpacked
from benchmarks.real.optimizers import MuonWithAdamW, split_parameters
from benchmarks.real.run import RESULTS, Bench, claimed
from benchmarks.real.starts import Starts
from benchmarks.real.stopping import Stop, Stopped

from minitron_hf import DistillationTrainer, evaluate_models
from minitron_hf.files import digest
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
        pytest.param(7, {"train": "layers"}, marks=pytest.mark.slow),
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


def test_frozen_embeddings_stay_as_they_were(bench_files, tmp_path):
    bench(bench_files, tmp_path).run(arm_of(bench_files, train="layers"))
    [start] = (tmp_path / "work" / "shared").glob("start-*/model.safetensors")
    [student] = (tmp_path / "work" / "arms").glob("*/student/model.safetensors")
    before, after = load_file(start), load_file(student)
    assert before.keys() == after.keys()
    tables = {name for name in before if "embed" in name or "lm_head" in name}
    assert tables
    assert {name for name in before if torch.equal(before[name], after[name])} == tables


@pytest.mark.slow
def test_cached_states_of_the_teacher_change_nothing(bench_files, tmp_path, monkeypatch):
    """Another arm with the same batches reads them all; its result is that of a run without them, to the last bit."""
    kept = bench(bench_files, tmp_path, keep_states=True)
    kept.run(arm_of(bench_files))
    files = list((tmp_path / "work" / "shared" / "teacher-states").iterdir())
    other = arm_of(bench_files, learning_rate=1e-3)
    assert len(files) == other.steps
    expected = bench(bench_files, tmp_path / "without").run(other)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "_teacher_signal", None)
        assert without_time(kept.run(other)) == without_time(expected)
    several = arm_of(bench_files, learning_rate=1e-3, loss="kl+states")
    several = replace(several, loss={"hidden_loss": "cosine", "hidden_layers": [[-1, -1]]})
    bench(bench_files, tmp_path / "more", keep_states=True).run(several)
    assert not (tmp_path / "more" / "work" / "shared" / "teacher-states").exists()


@pytest.mark.slow
def test_an_arm_that_another_run_has_begun_is_left_to_it(tmp_path):
    """Until that run has ended, however it ended."""
    script = """
import sys, time
from benchmarks.real.run import claimed
with claimed(sys.argv[1]) as is_ours:
    print(is_ours, flush=True)
    time.sleep(60)
"""
    given = {"stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path / "arm"], **given)
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    with claimed(tmp_path / "arm") as is_ours:
        assert not is_ours
    with claimed(tmp_path / "another") as is_ours:
        assert is_ours
    other.kill()
    other.wait()
    with claimed(tmp_path / "arm") as is_ours:
        assert is_ours
    assert not (tmp_path / "arm").exists() or not list((tmp_path / "arm").iterdir())


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


@pytest.mark.slow
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
    assert found.error == pytest.approx(half / 2.20098516)


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
    difference = Difference((low + high) / 2, low, high, 1.0, 1, 0.1)
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
        report.write_page(tmp_path / "page.md", report.text([results], experiments, "figure.png", folder / "tasks"))
        made.append(((tmp_path / "page.md").read_text(), (tmp_path / f"{attempt}.png").read_bytes()))
    assert made[0] == made[1]
    page = made[0][0]
    # -30/210 of 0.7 nats; s of the differences 10, 11, 9 is 1, so the interval is ± 4.303·(1/√3)/70.
    assert "| base – loss ce | 1k | 1 | wikitext2, KL | -14.3 % [-17.8, -10.7] | for the claim |" in page
    assert "bits per byte | +0.0 % [+0.0, +0.0] | against it |" in page
    assert "27 claims: 0 with a verdict, 2 with a tendency, 25 not measured." in page
    assert "Verdicts" not in page
    assert "## Tasks" not in page
    assert "| controls | loss ce | 1k | 1 | 0.700 ± 0.055 |" in page
    assert page.startswith("# Real teachers")
    edited = page.replace("# Real teachers", "# Another title")
    (tmp_path / "page.md").write_text(edited)
    report.write_page(tmp_path / "page.md", report.text([results], experiments, "figure.png", folder / "tasks"))
    assert (tmp_path / "page.md").read_text() == edited


@pytest.mark.parametrize(
    ("tokens", "seeds", "is_final"), [(131072, 3, False), (262144, 2, False), (262144, 3, True), (1048576, 3, True)]
)
def test_a_verdict_needs_three_seeds_and_more_than_a_screening(tmp_path, tokens, seeds, is_final):
    """And a claim that has a verdict is not listed again with its tendency."""
    experiments = load_experiments()
    base, _, cross_entropy, _ = experiments["controls"].arms
    runs = [(tokens, seed) for seed in range(seeds)] + [(131072, 0)]
    for number, (budget, seed) in enumerate(dict.fromkeys(runs)):
        for arm, kl in ((base, [50, 60, 70]), (cross_entropy, [60, 71, 79])):
            result = result_of(arm.at(tokens=budget, seed=seed), [value + number / 10 for value in kl])
            (tmp_path / f"{arm['loss']}{number}.json").write_text(json.dumps(result))
    [results] = report.Results.read(tmp_path)
    page = report.text([results], experiments, None, tmp_path / "tasks")
    verdicts, _, tendencies = page.partition("### Tendencies")
    assert ("### Verdicts" in verdicts, "| **confirmed** |" in verdicts) == (is_final, is_final)
    assert ("| for the claim |" in tendencies) != is_final
    report.draw(list(report.findings(results, experiments)), tmp_path / "figure.png")


def test_committed_results_belong_to_the_arms_of_the_table():
    """Name, settings and key of every file follow from the table: a run would find it and do nothing."""
    results = {path: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert results
    seeds = {result["arm"]["seed"] for result in results.values()}
    arms = {
        run.name: run
        for experiment in load_experiments().values()
        for tokens in (None, [SCREEN_TOKENS])
        for run in experiment.runs(tokens, sorted(seeds))
    }
    [mixed] = {result["corpus"]["digest"] for result in results.values() if result["arm"]["corpus"] == "mixed"}
    for path, result in results.items():
        arm = arms[path.stem.rpartition(".")[0]]
        assert (dict(arm.settings), dict(arm.shape), dict(arm.loss)) == (
            result["arm"],
            result["shape"],
            result["loss"],
        )
        teacher = SimpleNamespace(dtype=getattr(torch, result["teacher"]["computed_in"]))
        train = {"mixed": {"digest": mixed}, arm["corpus"]: result["corpus"]}
        made_on = SimpleNamespace(
            digest=result["teacher"]["digest"],
            teacher=teacher,
            corpora={"train": train},
            domains=[SimpleNamespace(rows=SimpleNamespace(**domain)) for domain in result["held_out"].values()],
            starts=Starts(teacher, result["teacher"]["digest"], None, train, path),
        )
        assert path.stem == f"{arm.name}.{result['key']}" == f"{arm.name}.{Bench.key(made_on, arm)}"


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


# ---- Tasks ----


def scores_file(model: str, correct: str, documents: str = "d") -> dict:
    """A file of `tasks.py` on one task."""
    accuracy = {"value": correct.count("1") / len(correct), "stderr": 0.1}
    task = {"accuracy": accuracy, "chance": 0.5, "num_documents": len(correct), "correct": correct}
    digest = "x" if model == "teacher" else model
    return {
        "model": model,
        "digest": digest,
        "computed_in": "float32",
        "tasks": {"piqa": task | {"documents": documents}},
    }


def test_students_are_compared_with_the_teacher_document_by_document():
    """Against counting: with one seed 2 of 8 documents are lost and 1 is gained; with the other 1 and none."""
    files = [scores_file("teacher", "11110000"), scores_file("a", "00111000"), scores_file("b", "01110000")]
    scores = tasks_report.TaskScores(files, "x", "float32")
    lost = [[-1, -1, 0, 0, 1, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0]]
    errors = [statistics.stdev(lost[0]) / math.sqrt(8)]
    means = [statistics.mean(column) for column in zip(*lost)]
    by_seed = statistics.stdev(map(statistics.mean, lost)) / math.sqrt(2)
    errors.append(math.hypot(statistics.stdev(means) / math.sqrt(8), by_seed))
    for models, value, error in ((["a"], -0.125, errors[0]), (["a", "b"], -0.125, errors[1])):
        [(task, count, cells)] = scores.rows(models)
        assert (task, count) == ("piqa", len(models))
        assert cells[1:] == ["0.50", f"{value:+.3f} ± {error:.3f}", "8"]
    assert cells[0].startswith("0.375 ± ")
    assert scores.at_chance() == ["piqa"]
    lines = tasks_report.tasks_table(scores, [(["base", "1k"], ["a"])])
    assert lines[2].startswith("| teacher |  |  | piqa | 0.500 ± ")
    assert lines[3].startswith("| base | 1k | 1 | piqa | 0.375 ± ")


def test_only_the_same_documents_and_the_same_teacher_are_compared():
    files = [scores_file("teacher", "111"), scores_file("a", "1010", "others"), scores_file("a", "110")]
    for teacher, dtype, expected in (
        ("x", "float32", [["-0.333 ± 0.333", "3"]]),
        ("another", "float32", [["", "4"]]),
        ("x", "bfloat16", []),
    ):
        found = tasks_report.TaskScores(files, teacher, dtype).rows(["a"])
        assert [cells[2:] for _, _, cells in found] == expected


def test_a_limit_takes_some_of_every_file(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{name}{index}\n" for index in range(10)))
    task = tasks.Task("*.jsonl", 0.5)
    assert tasks.documents(task, tmp_path, 6) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert len(tasks.documents(task, tmp_path, None)) == 30
    with pytest.raises(FileNotFoundError, match=r"no file x\.jsonl"):
        tasks.documents(tasks.Task("x.jsonl", 0.5), tmp_path, None)


def test_no_task_is_measured_twice_and_a_stop_loses_one(bench_files, tmp_path, monkeypatch):
    """Tasks that a file has are skipped; other documents or weights are measured anew."""
    teacher, measured = str(bench_files[0] / "teacher"), []

    def score(model, tokenizer, name, lines):
        measured.append(name)
        if name == "broken":
            raise Stopped
        return scores_file("a", "10", digest(*lines))["tasks"]["piqa"]

    monkeypatch.setattr(tasks, "score", score)

    def run(lines, place=teacher, **described):
        measured.clear()
        scores = tasks.Scores(tmp_path / "a.json", place, {"model": "a", **described})
        scores.fill(lines, None, "float32")
        return list(measured)

    lines = {"piqa": ["1", "2"], "broken": ["3"], "blimp": ["4"]}
    with pytest.raises(Stopped):
        run(lines)
    assert measured == ["piqa", "broken"]
    del lines["broken"]
    assert run(lines) == ["blimp"]
    assert run(lines) == []
    assert run(lines | {"piqa": ["1"]}) == ["piqa"]
    assert run(lines, limit=3) == ["piqa", "blimp"]
    other = pocket_model("llama", seed=5, dtype=torch.float32)
    other.save_pretrained(tmp_path / "other")
    assert run(lines | {"piqa": ["9"]}, str(tmp_path / "other"), limit=3) == ["piqa", "blimp"]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")
def test_tasks_of_the_harness_on_local_files():
    """A naive oracle: the sum of the log-probabilities of both sentences."""
    model, tokenizer = pocket_model("llama", dtype=torch.float32), pocket_tokenizer()
    pairs = [(f"a {one} b", f"b {one} a") for one in ("cat", "river", "old house", "bird")]
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs]

    def log_likelihood(text: str) -> float:
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]  # as after a question
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        logits = model(torch.tensor([[start, *ids]])).logits[0, :-1].log_softmax(-1)
        return sum(logits[place, token].item() for place, token in enumerate(ids))

    found = tasks.score(model, tokenizer, "blimp", lines)
    assert found["correct"] == "".join(str(int(log_likelihood(a) > log_likelihood(b))) for a, b in pairs)
    assert found["num_documents"] == 4
    words = [json.dumps({"text": text}) for text in texts(3, 7)]
    assert set(tasks.score(model, tokenizer, "stories_lastword", words)["correct"]) <= {"0", "1"}


def test_students_are_measured_before_retraining_once(bench_files, tmp_path, monkeypatch, capsys):
    folder, found = bench_files
    page = tmp_path / "page.md"
    marks = [f"<!-- results of benchmarks.real.before: {where} -->" for where in ("begin", "end")]
    page.write_text(f"# Results\n\n{marks[0]}\n{marks[1]}\n\nEnd.\n")
    monkeypatch.setattr(before, "LENGTH", 16)
    command = [
        *("--teacher", folder / "teacher", "--work", tmp_path / "work", "--results", tmp_path / "results"),
        *("--text", f"mixed={found['train']['mixed']['file']}", "--rows", 8),
        *("--held-out", f"wikitext2={found['held_out']['wikitext2']['file']}", "--held-out-rows", 6),
        *("--request", "intermediate_size=0.5", "--request", "intermediate_size=0.5,metric=random,seed=3"),
        *("--request", "hidden_size=24,hidden_basis=principal,repair=least_squares_all"),
    ]
    monkeypatch.setattr(sys, "argv", ["before", *map(str, command)])
    before.main()
    results = {path: path.read_bytes() for path in (tmp_path / "results").glob("*.json")}
    assert len(results) == 3
    before.main()
    assert results == {path: path.read_bytes() for path in (tmp_path / "results").glob("*.json")}
    monkeypatch.setattr(sys, "argv", ["before", "--page", str(page), "--results", str(tmp_path / "results")])
    before.main()
    assert page.read_text().count("| mixed | 128 |") == 3
    assert page.read_text().endswith("End.\n")


def test_the_table_of_stages_has_a_column_per_dtype(tmp_path, monkeypatch):
    budget = {"rows": 16, "max_length": 256, "batch_size": 8, "steps": 4, "eval_rows": 8, "threads": 1}
    scored = {"seconds": 4.26, "bytes_peak": 1_234_567_890}
    files = [
        {"settings": {**budget, "dtype": "float32"}, "machine": "a CPU", "stages": {"score": scored, "plan": scored}},
        {"settings": {**budget, "dtype": "bfloat16"}, "machine": "a CPU", "stages": {"score": {"error": ["no"]}}},
    ]
    assert stages_report.table(files)[2:] == [
        "| score | 16 × 256 | 4.3 | 1,235 | failed |  |",
        "| plan |  | 4.3 | 1,235 | not measured |  |",
    ]
    page = tmp_path / "page.md"
    begin, end = (f"<!-- results of benchmarks/real/stages: {where} -->" for where in ("begin", "end"))
    page.write_text(f"A\n{begin}\nold\n{end}\nB\n")
    for number, one in enumerate(files):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    given = [str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["stages_report", *given])
    stages_report.main()
    assert "a CPU; one thread; one run." in page.read_text()
    assert "old" not in page.read_text()
    files[1]["settings"]["steps"] = 2
    with pytest.raises(ValueError, match="different budgets"):
        stages_report.table(files)
