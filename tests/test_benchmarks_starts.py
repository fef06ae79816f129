"""Starts in the benchmarks, at pocket size: other pruners and optional fields of arms, from the start to the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import corpora, peer_starts, peers, report, run
from benchmarks.real.arms import OPTIONAL_FIELDS, load_experiments
from benchmarks.real.run import Bench

from minitron_hf import PrunerConfig, count_parameters, load_model
from minitron_hf.sizes.student import student_config
from pocket import pocket_model, pocket_tokenizer
from test_benchmarks_peers import SIZES
from test_benchmarks_real import texts

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)

#: Marks of the generated part of a page.
BEGIN, END = "<!-- results of benchmarks.real.peers: begin -->", "<!-- results of benchmarks.real.peers: end -->"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher, texts, and the table of arms at its sizes."""
    folder = tmp_path_factory.mktemp("peers")
    pocket_model("llama", dtype=torch.float32, **SIZES).save_pretrained(folder / "teacher")
    pocket_tokenizer().save_pretrained(folder / "teacher")
    for name, count in (("mixed", 80), ("written", 40), ("wikitext2", 6)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts(count, count)))
    table = yaml.safe_load(peers.TABLE.read_text())
    table["shapes"] = {
        "24-layers-ffn-1083": {"num_hidden_layers": 4, "intermediate_size": 30},
        "at-most-94.5M": {"target_parameters": 0.75},
    }
    table["base"] |= {"calibration_rows": 6, "calibration_length": 16, "length": 16, "tokens_per_step": 64}
    table["base"] |= {"tokens": 256}
    arms = [{}, {"shape": "at-most-94.5M", "method": "shortgpt"}, {"shape": "at-most-94.5M", "method": "flap"}]
    arms += [{"shape": "at-most-94.5M", "method": name} for name in ("slicegpt", "optipfair")]
    table["experiments"] = {"share": {"title": "At most so many", "arms": arms}}
    (folder / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    return folder


def bench_of(files, tmp_path, results=""):
    given = [{name: corpora.given_file(str(files / f"{name}.jsonl"))} for name in ("mixed", "written", "wikitext2")]
    found = {"train": given[0] | given[1], "held_out": given[2]}
    folder = tmp_path / "results" / results
    return Bench(str(files / "teacher"), found, tmp_path / "work", folder, rows=6, row_length=32)


def command(files, tmp_path, monkeypatch, *given):
    results = ["--results", tmp_path / "results", "--experiments", files / "table.yaml"]
    monkeypatch.setattr(sys, "argv", ["peers", *map(str, [*results, *given])])
    peers.main()


@pytest.mark.slow
def test_starts_are_measured_once_and_distilled_like_all_others(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer_starts, "find_spec", lambda name: None)
    given = ["--teacher", files / "teacher", "--work", tmp_path / "work"]
    given += ["--corpus", f"written={files / 'written.jsonl'}"]
    given += ["--held-out", f"wikitext2={files / 'wikitext2.jsonl'}", "--held-out-rows", 6, "--row-length", 32]
    command(files, tmp_path, monkeypatch, *given)
    first = {path: path.read_bytes() for path in (tmp_path / "results").glob("*.json")}
    assert len(first) == 4  # all but optipfair
    assert "method optipfair is left out: method='optipfair' needs the package optipfair" in capsys.readouterr().out
    command(files, tmp_path, monkeypatch, *given)
    assert first == {path: path.read_bytes() for path in (tmp_path / "results").glob("*.json")}

    bench = bench_of(files, tmp_path, peers.DISTILLED)
    _, shortgpt, flap, sliced, _ = load_experiments(files / "table.yaml")["share"].runs()
    starts = set((tmp_path / "work" / "shared").glob("start-*"))
    for arm in (shortgpt, flap):
        result = bench.run(arm)
        [path] = [path for path in first if f"method={arm['method']}" in path.name]
        before = json.loads(path.read_text())
        for name, value in before["result"].items():
            assert result["summary"]["before"]["wikitext2"][name] == value
    assert {path for path in (tmp_path / "work" / "shared").glob("start-*") if "measured" not in path.name} == starts
    with pytest.raises(ValueError, match="measured before retraining alone"):
        bench.run(sliced)

    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{BEGIN}\n{END}\n\nEnd.\n")
    command(files, tmp_path, monkeypatch, "--page", page)
    lines = page.read_text().splitlines()
    assert lines[-1] == "End."
    [shortgpt, flap, sliced, optipfair] = lines[lines.index("### At most so many") + 5 :][:4]
    assert "(0k tokens, 1 seed)" in shortgpt
    assert "| yes |" in shortgpt
    assert "| no |" in flap
    assert sliced.endswith("not measured (no stock checkpoint) |")
    assert optipfair.endswith("the authors' package |  |  | not measured | not measured |")
    again = page.read_bytes()
    command(files, tmp_path, monkeypatch, "--page", page)
    assert page.read_bytes() == again


@pytest.mark.slow
def test_a_second_round_cuts_the_student_of_the_first(files, tmp_path, monkeypatch):
    table = yaml.safe_load((files / "table.yaml").read_text())
    table["shapes"]["half-way"] = {"num_hidden_layers": 5, "intermediate_size": 36}
    table["experiments"] = {"rounds": {"title": "Rounds", "arms": [{}, {"first_shape": "half-way"}]}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    one, two = load_experiments(tmp_path / "table.yaml")["rounds"].runs()
    assert one.rounds() == (one,)
    assert [each["tokens"] for each in two.rounds()] == [128, 128]
    assert [dict(each.shape)["intermediate_size"] for each in two.rounds()] == [36, 30]
    bench = bench_of(files, tmp_path)
    found = [bench.run(arm) for arm in (one, two)]
    assert found[0]["student"] == found[1]["student"]
    assert found[0]["training"]["steps"] == 2 * found[1]["training"]["steps"]
    assert found[0]["rows"]["after"] != found[1]["rows"]["after"]
    assert found[1]["arm"]["first_shape"] == "half-way"
    assert not list((tmp_path / "work" / "arms").rglob("first-round"))
    page = tmp_path / "page.md"
    marks = [
        f"<!-- results of {name}: {where} -->" for name in (report.REGION, "rounds") for where in ("begin", "end")
    ]
    page.write_text("\n".join(marks))
    given = ["--experiments", tmp_path / "table.yaml", "--results", tmp_path / "results", "--page", page]
    monkeypatch.setattr(sys, "argv", ["report", *map(str, given), "--region", "rounds"])
    report.main()
    untouched, _, region = page.read_text().partition(marks[2])
    assert untouched == "\n".join(marks[:2]) + "\n"
    assert "| rounds | first_shape half-way | 0k | 1 | " in region
    page.write_text("no lines")
    with pytest.raises(ValueError, match="results of rounds: begin"):
        report.main()


def test_units_are_refitted_with_and_without_the_layers_that_go(files, tmp_path):
    """Only the last projection before the gap differs, and all others are those of a student of full depth."""
    table = yaml.safe_load((files / "table.yaml").read_text())
    table["shapes"]["deep"] = {"intermediate_size": 30}
    repairs = ("least_squares", "least_squares_without_gaps", "none")
    arms = [{"repair": repair} for repair in repairs] + [{"shape": "deep", "repair": "least_squares"}]
    table["experiments"] = {"repairs": {"title": "Repairs", "arms": arms}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    starts = bench_of(files, tmp_path).starts
    folders = [starts.get(arm) for arm in load_experiments(tmp_path / "table.yaml")["repairs"].runs()]
    assert len(set(folders)) == 4
    both, alone, none, deep = ([one.mlp.down_proj.weight for one in load_model(at).model.layers] for at in folders)
    [dropped] = json.loads((folders[0] / "pruning_plan.json").read_text())["layers_dropped"]
    kept = [layer for layer in range(5) if layer != dropped]
    assert all(torch.equal(alone[place], deep[layer]) for place, layer in enumerate(kept))
    assert [torch.equal(one, other) for one, other in zip(both, alone)] == [layer != dropped - 1 for layer in kept]
    assert not any(torch.equal(one, other) for one, other in zip(none, alone))


def test_optional_fields_of_the_scores_change_the_start(files, tmp_path):
    """Scores are made with them, and found again by them; without them, names are those of arms that have none."""
    changes = [{}, {"sequence_reduction": "l2"}, {"batch_reduction": "var"}, {"depth_metric": "perplexity"}]
    table = yaml.safe_load((files / "table.yaml").read_text())
    table["shapes"]["turned"] = {"hidden_size": 18, "hidden_basis": "principal"}
    table["experiments"] = {"scores": {"title": "Scores", "arms": [*changes, {"shape": "turned"}]}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    starts = bench_of(files, tmp_path).starts
    plans = [
        json.loads((starts.get(arm) / "pruning_plan.json").read_text())
        for arm in load_experiments(tmp_path / "table.yaml")["scores"].runs()
    ]
    settings = [plan["scores"]["settings"] for plan in plans]
    assert [one["sequence_reduction"] for one in settings] == ["mean", "l2", "mean", "mean", "mean"]
    assert [one["batch_reduction"] for one in settings] == ["l2", "l2", "var", "l2", "l2"]
    assert [one.get("depth_metric") for one in settings] == [None, None, None, "perplexity", None]
    assert len(list((tmp_path / "work" / "shared").glob("scores-*"))) == 5
    table["experiments"]["scores"]["arms"] = [{"reduction": "l2"}]
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match="an arm has no field reduction"):
        load_experiments(tmp_path / "table.yaml")


@pytest.mark.parametrize("name", ["caches.yaml", "peers.yaml", "starts.yaml"])
def test_every_arm_of_the_tables_is_possible(name):
    """Steps use all tokens; optional fields stand in the names; methods and targets are known."""
    counted = {}
    for experiment in load_experiments(peers.TABLE.with_name(name)).values():
        for arm in experiment.runs():
            for each in arm.rounds():
                assert each.steps * each.rows_per_step * each["length"] == each["tokens"], arm.name
            assert "/" not in arm.name
            assert (arm["method"] == OPTIONAL_FIELDS["method"]) == ("target_parameters" not in arm.shape)
            assert arm["method"] in ("ours", *peer_starts.METHODS)
            if arm["method"] == "ours":
                half = "0.5" in experiment.name or "16-layers" in arm["shape"]
                limit = 0.5 * 134_515_008 if half else 94_500_000
                if arm["shape"] not in counted:
                    counted[arm["shape"]] = count_parameters(student_config(SMOLLM2, PrunerConfig(**arm.shape)))
                assert 0.97 * limit < counted[arm["shape"]] <= limit, arm.label


@pytest.mark.parametrize("starts", [False, True], ids=["peers", "starts"])
def test_the_page_has_the_table_of_the_committed_results(starts):
    page = (Path(__file__).parents[1] / "docs" / "explanation" / "real-teachers.md").read_text()
    name = "benchmarks.real.starts.before" if starts else "benchmarks.real.peers"
    region = page.partition(f"<!-- results of {name}: begin -->")[2].partition(f"<!-- results of {name}: end -->")[0]
    table, lines = (peers.STARTS_TABLE, peers.starts_table) if starts else (peers.TABLE, peers.table)
    folder = peers.BEFORE if starts else peers.RESULTS
    assert region.strip() == "\n".join(lines(folder, load_experiments(table))).strip()


def test_starts_are_listed_the_closest_first(tmp_path):
    arms = load_experiments(peers.STARTS_TABLE)["metrics"].arms
    for arm, kl in zip(arms, (1.1, 0.9, 1.3)):
        settings = {name: value for name, value in arm.settings.items() if name not in ("tokens", "seed")}
        result = {"kl_divergence": {"value": kl, "stderr": 0.01}}
        one = {"arm": settings, "num_parameters": 94_494_528, "result": result}
        (tmp_path / f"{arm['metric']}.json").write_text(json.dumps(one))
    lines = list(peers.starts_table(tmp_path, load_experiments(peers.STARTS_TABLE)))
    at = lines.index("### Importance metrics, before retraining")
    assert lines[at + 4 : at + 8] == [
        "| shape ffn-764, metric pre_activation | 94.5M | 0.900 ± 0.010 | not measured |",
        "| shape ffn-764 | 94.5M | 1.100 ± 0.010 | not measured |",
        "| shape ffn-764, metric contribution | 94.5M | 1.300 ± 0.010 | not measured |",
        "",
    ]


def test_an_arm_that_the_table_lacks_is_named(files, monkeypatch):
    given = ["--teacher", files / "teacher", "--work", files / "work", "--experiments", files / "table.yaml"]
    monkeypatch.setattr(sys, "argv", ["run", *map(str, given), "--arm", "loss ce, shape 3-layers"])
    with pytest.raises(SystemExit, match=r"No arm is called 'loss ce, shape 3-layers' in .*--list prints"):
        run.main()
