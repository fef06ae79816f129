"""The model card: a pure function of the run folder, with metadata that the Hub accepts and numbers that are right."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hub_server import card_metadata, check_card
from minitron_hf.errors import MismatchError, OutputError
from minitron_hf.publishing.card import END_OF_CARD, render_model_card, write_model_card
from minitron_hf.publishing.quantized_card import render_quantized_card
from minitron_hf.quantization import quantize_checkpoint
from minitron_hf.saving import save_model
from pocket import pocket_model, pocket_tokenizer
from pocket_images import images, pocket_image_model, pocket_processor
from run_folder import KEPT, RECIPE, SAMPLES, TEACHER, evaluation, plan, training_record, write_json, write_run
from test_wrappers import CONFIGS


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    for name in ("training", "importance", "layers", "search", "speed"):
        (folder / "plots" / f"{name}.png").write_bytes(b"\x89PNG")
    return folder


def sections(content: str) -> dict[str, str]:
    """Title → text of every second-level section."""
    body = re.sub(r"^---\n.*?\n---\n", "", content, flags=re.S)
    parts = re.split(r"^## (.+)$", body, flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def table(text: str) -> dict[str, list[str]]:
    """First cell → the other cells, of the first table in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in rows if set(row[0]) != {"-"}}


def test_metadata_is_what_the_hub_accepts(run_dir):
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    card = ModelCard(content)
    assert str(card) == content, "parsing and writing it again changes nothing"
    data = card.data
    assert data.base_model == "story-lab/stories-10M"
    assert data.get("base_model_relation") == "finetune"
    assert (data.license, data.license_name, data.license_link) == ("mit", None, None)
    assert data.language == ["en"]
    assert data.datasets == ["roneneldan/TinyStories"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["minitron", "pruned", "knowledge-distillation", "trl"]
    results = {result.metric_type: result for result in data.eval_results}
    metrics = evaluation()["models"]["student"]["metrics"]
    assert set(results) == set(metrics)
    for key, measured in metrics.items():
        assert results[key].metric_value == pytest.approx(measured["value"], rel=1e-5)
        assert results[key].dataset_type == "story-lab/stories-valid"
        assert results[key].task_type == "text-generation"


def test_numbers_stand_beside_the_teacher(run_dir):
    found = sections(render_model_card(run_dir))
    architecture = table(found["Architecture"])
    assert architecture["Hidden size"] == ["96", "64", "66.7 %"]
    assert architecture["Vocabulary"] == ["1,000", "1,000", "100.0 %"]
    assert architecture["Parameters"] == ["1,000,000", "420,000", "42.0 %"]
    assert architecture["Parameters without embeddings"] == ["904,000", "356,000", "39.4 %"]
    measured = table(found["Measurements"])
    assert measured[""] == ["Teacher", "Student", "Pruned"]
    assert measured["Loss, nats per token"] == ["2.500 ± 0.012", "2.750 ± 0.012", "5.500 ± 0.012"]
    assert measured["Perplexity, per token"][1] == f"{math.exp(2.75):.2f} ± {math.exp(2.75) * 0.0123:.2f}"
    assert measured["Top-1 agreement with the teacher"][1] == "71.20 ± 0.42 %"
    assert measured["Checkpoint size"][:2] == ["2.0 MB", "843.5 kB (0.42×)"]
    assert measured["KV cache per token"] == ["2.0 kB", "1.5 kB (0.75×)", "–"]
    assert measured["Decode, tokens/s: median [quartiles]"] == ["200 [199–201]", "310 [307–311] (1.55×)", "–"]
    assert "± is the standard error over rows: documents, or parts of long ones." in found["Measurements"]
    assert "0.250 nats per token above" in found["Limitations"]
    assert "dropped and 0–3, 6, 7 kept" in found["Kept units and layers"]


def test_shapes_that_were_compared_are_listed_best_first(run_dir):
    lines = sections(render_model_card(run_dir))["Kept units and layers"].split("These shapes were compared")[1]
    rows = table(lines)
    assert list(rows) == ["shape", *(f"intermediate_size={n}" for n in (160, 96, 128, 64))]
    assert rows["intermediate_size=160"] == ["420,000", "5.500 ± 0.100", "0.610 ± 0.020", "2,000", "–"]
    assert rows["intermediate_size=64"] == ["250,000", "8.000 ± 0.100", "–", "–", "–"], "not retrained"
    (run_dir / "search.json").unlink()
    assert "These shapes were compared" not in render_model_card(run_dir)
    chosen = {"name": "hidden_size=8", "num_parameters": 9, "proxy": {"value": 1.0, "stderr": 0.1}, "behind": None}
    write_json(run_dir / "pruning_plan.json", plan() | {"candidates": [chosen]})
    rows = table(render_model_card(run_dir).split("These shapes were compared")[1])
    assert rows["hidden_size=8"] == ["9", "1.000 ± 0.100", "–"]


def test_free_text_cannot_break_the_card(run_dir):
    content = render_model_card(run_dir)
    assert f"````text\n{SAMPLES[0]['completions']['teacher']}\n````" in content
    assert f"```yaml\n{RECIPE.rstrip()}\n```" in content
    changed = plan()
    changed["notes"] = ["a | pipe\n## and a heading"]
    write_json(run_dir / "pruning_plan.json", changed)
    assert "## and a heading" not in re.findall(r"^##.*$", render_model_card(run_dir), flags=re.M)


@pytest.mark.parametrize("name", ["training", "importance", "layers", "search", "speed"])
def test_pictures_are_linked_when_they_are_there(run_dir, name):
    assert f"](plots/{name}.png)" in render_model_card(run_dir)
    (run_dir / "plots" / f"{name}.png").unlink()
    assert f"](plots/{name}.png)" not in render_model_card(run_dir)


def test_pure_function_of_the_files(run_dir, tmp_path, monkeypatch):
    content = render_model_card(run_dir)
    elsewhere = shutil.copytree(run_dir, tmp_path / "some" / "other name")
    for path in elsewhere.rglob("*"):
        os.utime(path, (1, 1))
    (elsewhere / "README.md").write_text("an older card")
    (elsewhere / "checkpoint-1").mkdir()

    def forbidden(*_, **__):
        raise AssertionError("the card must not ask for this")

    for owner, name in ((socket, "socket"), (time, "time"), (time, "localtime"), (socket, "gethostname")):
        monkeypatch.setattr(owner, name, forbidden)
    monkeypatch.setattr(datetime, "datetime", forbidden)
    monkeypatch.setattr("minitron_hf.files.versions", forbidden)
    monkeypatch.chdir(tmp_path)
    for variable in ("USER", "HOME", "LANG", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, "changed")
    assert render_model_card(elsewhere) == content


@pytest.mark.parametrize(
    "missing", ["teacher", "distillation", "evaluation", "samples", "recipe", "config", "LICENSE", "pruning_plan"]
)
def test_any_optional_file_may_be_missing(run_dir, missing):
    (path,) = run_dir.glob(f"{missing}*" if missing == "LICENSE" else f"{missing}.[jy]*")
    path.unlink()
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    assert str(ModelCard(content)) == content
    found = sections(content)
    data = card_metadata(content)
    if missing == "distillation":
        assert "Distillation" not in found
        assert "No retraining is recorded" in found["Limitations"]
        assert "knowledge-distillation" not in data["tags"]
    if missing == "evaluation":
        assert "not measured" in found["Measurements"]
        assert "was not measured" in found["Limitations"]
        assert "model-index" not in data
    if missing == "pruning_plan":
        assert "Architecture" not in found
        assert "pruned" not in data["tags"]
    if missing == "samples":
        assert "Samples" not in found
    if missing == "teacher":
        assert "license" not in data
        assert data["base_model"] == "story-lab/stories-10M", "the plan names it too"


def test_minimal_folder(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "distillation.json", training_record() | {"data": None})
    content = render_model_card(tmp_path)
    assert check_card(content) == ([], [])
    assert card_metadata(content) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minitron", "knowledge-distillation", "trl"],
    }
    assert "None" not in content
    made = ["Measurements", "Distillation", "How to use", "How it was made", "Limitations", "Licence", "Citation"]
    assert list(sections(content)) == ["", *made]


def test_nothing_to_describe(tmp_path):
    with pytest.raises(OutputError, match="no student to describe"):
        render_model_card(tmp_path)
    with pytest.raises(OutputError, match="no student to describe"):
        write_model_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_run_has_made_keeps_its_card(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    (tmp_path / "README.md").write_text("My own model.\n")
    for describe in (render_model_card, write_model_card):
        with pytest.raises(OutputError, match="neither pruned nor distilled here"):
            describe(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["README.md", "config.json"]
    assert (tmp_path / "README.md").read_text() == "My own model.\n"


def test_the_owners_part_stays(run_dir):
    write_model_card(run_dir)
    path = run_dir / "README.md"
    fresh = path.read_text(encoding="utf-8")
    assert fresh.endswith(f"\n\n{END_OF_CARD}\n")
    own = "\n## Who made it\n\nÉcole, with *care*.\n\n\n"
    path.write_bytes((fresh.replace("# ", "# Changed ", 1) + own).encode())
    write_model_card(run_dir)
    assert path.read_text(encoding="utf-8") == fresh + own
    assert render_model_card(run_dir) == fresh + own
    path.write_bytes((fresh + own).replace("\n", "\r\n").encode())
    write_model_card(run_dir)
    assert path.read_text(encoding="utf-8") == fresh + own, "written on Windows"
    assert not list(run_dir.glob("README.before*"))


@pytest.mark.parametrize(
    "text",
    [pytest.param(b"# My notes\n", id="text", marks=pytest.mark.slow), pytest.param(b"# Gr\xf6\xdfe\n", id="latin-1")],
)
def test_a_card_of_somebody_else_is_put_aside(run_dir, text):
    (run_dir / "README.md").write_bytes(text)
    write_model_card(run_dir)
    assert (run_dir / "README.before.md").read_bytes() == text
    (run_dir / "README.md").write_bytes(b"again")
    write_model_card(run_dir)
    assert (run_dir / "README.before.md").read_bytes() == text
    assert (run_dir / "README.before-2.md").read_bytes() == b"again"
    assert "My notes" not in render_model_card(run_dir)


def test_files_of_another_version(run_dir):
    changed = plan()
    del changed["student"]["num_parameters"]
    write_json(run_dir / "pruning_plan.json", changed)
    with pytest.raises(MismatchError, match="num_parameters"):
        render_model_card(run_dir)


def licence(run_dir: Path, **fields: object) -> tuple[dict, str]:
    write_json(run_dir / "teacher.json", TEACHER | fields)
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    return card_metadata(content), sections(content)["Licence"]


def test_licence_is_inherited_and_never_invented(run_dir):
    data, text = licence(run_dir)
    assert data["license"] == "mit"
    assert "`mit`, inherited from the teacher." in text
    assert "[LICENSE](LICENSE)" in text

    link = "https://example.org/LICENSE"
    data, text = licence(run_dir, license="other", license_name="gemma-terms", license_link=link)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "gemma-terms", link)
    assert f"`other` (gemma-terms), inherited from the teacher: <{link}>." in text
    assert "Gemma terms ask" in text

    data, text = licence(run_dir, license="llama3.1")
    assert "Built with Llama" in text

    (run_dir / "LICENSE").unlink()
    data, text = licence(run_dir, license=None)
    assert not {"license", "license_name", "license_link"} & set(data)
    assert "not known" in text
    assert "find it out" in text


def test_a_local_teacher_is_not_named_as_a_model_of_the_hub(run_dir):
    write_json(run_dir / "teacher.json", TEACHER | {"name_or_path": "models/stories", "hub_id": None})
    content = render_model_card(run_dir)
    data = card_metadata(content)
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "`stories` pruned from" in content
    for name in ("/home/me/models/stories", r"C:\models\stories"):
        write_json(run_dir / "teacher.json", {"name_or_path": name})
        content = render_model_card(run_dir)
        assert "base_model" not in card_metadata(content)
        assert "me/models" not in content
        assert "`stories` pruned from" in content


def test_paths_of_this_machine_do_not_reach_the_card(run_dir):
    changed = evaluation()
    changed["data"]["name"] = "/home/me/data/valid stories.jsonl"
    write_json(run_dir / "evaluation.json", changed)
    settings = plan()
    settings["scores"]["settings"]["model"] = "/home/me/teacher"
    write_json(run_dir / "pruning_plan.json", settings)
    content = render_model_card(run_dir)
    assert "/home/me" not in content
    assert check_card(content) == ([], [])
    (result, *_) = card_metadata(content)["model-index"][0]["results"]
    assert result["dataset"]["type"] == "valid-stories.jsonl"
    assert result["dataset"]["name"] == "valid stories.jsonl"


def test_norwegian(run_dir):
    write_json(run_dir / "teacher.json", TEACHER | {"language": ["no", "en"]})
    content = render_model_card(run_dir)
    assert card_metadata(content)["language"] == ["no", "en"]
    assert check_card(content) == ([], [])


def test_values_that_are_no_numbers_stay_out_of_the_model_index(run_dir):
    changed = evaluation()
    changed["models"]["student"]["metrics"]["perplexity"]["value"] = math.inf
    changed["models"]["pruned"]["metrics"]["loss"]["value"] = None
    changed["models"]["student"]["metrics"]["kl_divergence"] = None
    write_json(run_dir / "evaluation.json", changed)
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    types = {result.metric_type for result in ModelCard(content).data.eval_results}
    assert types == {"loss", "bits_per_byte", "top1_agreement"}
    measured = table(sections(content)["Measurements"])
    assert measured["Perplexity, per token"][1] == "–"
    assert measured["KL(teacher ‖ model), nats per token"][1] == "–"


def test_a_single_row_has_no_errors_to_show(run_dir):
    changed = evaluation()
    changed["data"]["num_rows"] = 1
    for model in changed["models"].values():
        for measured in filter(None, model["metrics"].values()):
            measured["stderr"] = None
    write_json(run_dir / "evaluation.json", changed)
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    assert {result.metric_type for result in ModelCard(content).data.eval_results} == set(
        evaluation()["models"]["student"]["metrics"]
    )
    text = sections(content)["Measurements"]
    assert table(text)["Loss, nats per token"] == ["2.5", "2.75", "5.5"]
    assert table(text)["Top-1 agreement with the teacher"][1] == "71.2 %"
    assert "±" not in text
    assert ": 1 row, " in text


FLAT = {"piqa": {"acc,none": {"value": 0.61, "stderr": 0.012}, "acc_norm,none": {"value": 0.62, "stderr": None}}}


def test_benchmarks(run_dir):
    write_json(run_dir / "benchmarks.json", FLAT)
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    shown = sections(content)["Measurements"].split("### Benchmarks")[1]
    assert "| piqa | acc | – | – | 0.610 ± 0.012 |" in shown
    assert "| piqa | acc_norm | – | – | 0.62 |" in shown
    assert "lm-evaluation-harness" not in shown
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(content).data.eval_results}
    assert results["piqa", "acc"] == 0.61
    assert results["piqa", "acc_norm"] == 0.62

    teacher = {"piqa": {"acc,none": {"value": 0.7, "stderr": 0.011}}}
    write_json(run_dir / "benchmarks.json", {"student": FLAT, "teacher": teacher})
    content = render_model_card(run_dir)
    assert "| piqa | acc | – | – | 0.700 ± 0.011 | 0.610 ± 0.012 |" in content
    assert "| piqa | acc_norm | – | – | – | 0.62 |" in content
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(content).data.eval_results}
    assert results["piqa", "acc"] == 0.61, "the model-index speaks of the student"


def measured_on(count: int, whole: int = 1838, **more: object) -> dict:
    how = {"num_documents": count, "num_documents_in_task": whole, "num_fewshot": 5, "harness_version": "0.4.13"}
    return {"value": 0.61, "stderr": 0.012, **how, "task_version": 1.0, **more}


def test_benchmarks_say_how_they_were_measured(run_dir):
    tasks = {"piqa": {"acc": measured_on(1838)}, "arc": {"acc": measured_on(100, chat_template=True)}}
    write_json(run_dir / "benchmarks.json", {"student": tasks, "teacher": tasks})
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    assert str(ModelCard(content)) == content
    shown = sections(content)["Measurements"].split("### Benchmarks")[1]
    assert "| Task | Metric | Shots | Documents | Teacher | Student |" in shown
    assert "| piqa | acc | 5 | 1,838 | 0.610 ± 0.012 | 0.610 ± 0.012 |" in shown
    assert "| arc | acc | 5 | 100 of 1,838 |" in shown
    assert "Measured with lm-evaluation-harness 0.4.13. The chat template was applied. A value that" in shown
    found = {result.dataset_name: result for result in ModelCard(content).data.eval_results}
    assert "arc" not in found, "a value on a part of the documents cannot be compared"
    how = {"num_fewshot": 5, "num_documents": 1838, "task_version": 1.0, "harness_version": "0.4.13"}
    assert found["piqa"].dataset_args == how
    assert "local folder" not in shown
    write_json(run_dir / "benchmarks.json", {"format": 1, "models": {"student": tasks}, "local_documents": True})
    assert "Documents were read from a local folder and may be others than the Hub's." in render_model_card(run_dir)


def test_workloads_become_rows(run_dir):
    changed = evaluation()
    changed["settings"] |= {"rounds": 3, "decode_tokens": 8}
    for factor, name in ((1, "teacher"), (2, "student")):
        changed["models"][name]["speeds"] = [
            {
                "batch_size": size,
                "prompt_tokens": 64,
                "prefill_tokens_per_second": {"median": 1000.0 * factor, "quartiles": [900.0, 1100.0]},
                "decode_tokens_per_second": {"median": 100.0 * factor * size, "quartiles": [90.0, 110.0]},
                "kv_cache_bytes": 2048 * size // factor,
                "peak_memory_bytes": None,
            }
            for size in (1, 4)
        ]
    write_json(run_dir / "evaluation.json", changed)
    content = render_model_card(run_dir)
    assert check_card(content) == ([], [])
    shown = content.split("### Speed and memory")[1]
    assert "| Prompts | Tokens of each |  | Teacher | Student |" in shown
    assert "| 4 | 64 | decode, tokens/s | 400 [90–110] | 800 [90–110] (2.00×) |" in shown
    assert "| 4 | 64 | KV cache | 8.2 kB | 4.1 kB (0.50×) |" in shown
    assert "peak memory |" not in shown
    assert "Medians over 3 rounds" in shown


def test_controls_become_columns(run_dir):
    changed = evaluation()
    changed["models"]["random_init"] = changed["models"].pop("pruned")
    write_json(run_dir / "evaluation.json", changed)
    measured = table(sections(render_model_card(run_dir))["Measurements"])
    assert measured[""] == ["Teacher", "Student", "Random init"]


def test_only_datasets_of_the_hub_are_named(run_dir):
    for name, expected in (("json", []), ("lab/corpus", ["lab/corpus"])):
        record = training_record()
        record["data"]["train"]["name"] = name
        write_json(run_dir / "distillation.json", record)
        assert card_metadata(render_model_card(run_dir))["datasets"] == [*expected, "roneneldan/TinyStories"]


def test_paragraphs_are_separated(run_dir, tmp_path):
    minimal = tmp_path / "minimal"
    minimal.mkdir()
    write_json(minimal / "config.json", {})
    write_json(minimal / "distillation.json", training_record())
    for folder in (run_dir, minimal):
        content = render_model_card(folder)
        assert "\n\n\n" not in content
        assert content.endswith(f"```\n\n{END_OF_CARD}\n")
        lines = content.splitlines()
        for before, line, after in zip(lines, lines[1:], lines[2:]):
            if line.startswith(("#", "![", "<details>")):
                assert (before, after) == ("", "")


def test_repository_name(run_dir):
    assert 'name = "path/to/this/folder"' in render_model_card(run_dir)
    write_json(run_dir / "hub.json", {"repo_id": "lab/tiny-stories"})
    content = render_model_card(run_dir)
    assert 'name = "lab/tiny-stories"' in content
    assert "\n# tiny-stories\n" in content
    assert card_metadata(content)["model-index"][0]["name"] == "tiny-stories"


def test_write_model_card_draws_first(tmp_path):
    folder = write_run(tmp_path / "run")
    path = write_model_card(folder)
    content = path.read_text(encoding="utf-8")
    assert path == folder / "README.md"
    assert content == render_model_card(folder)
    for link in re.findall(r"\]\((plots/[^)]+)\)", content):
        assert (folder / link).read_bytes().startswith(b"\x89PNG")
    assert content.count("](plots/") == 5


def test_shown_settings_are_the_recorded_ones(run_dir):
    found = sections(render_model_card(run_dir))["How it was made"]
    arguments = training_record()["arguments"]
    del arguments["num_train_epochs"]  # max_steps rules
    assert table(found) == {"Argument": ["Value"], **{key: [str(value)] for key, value in arguments.items()}}
    (settings,) = re.findall(r"```json\n(.*?)\n```", found, flags=re.S)
    assert json.loads(settings) == plan()["pruner_config"]
    (recipe,) = re.findall(r"```yaml\n(.*?)\n```", found, flags=re.S)
    assert yaml.safe_load(recipe)["prune"]["hidden_size"] == KEPT["hidden"]
    for digest in ("a", "b", "c", "d"):
        assert f"`sha256:{digest * 64}`" in found


def test_descriptions_of_models_are_listed(run_dir):
    path = run_dir / "evaluation.json"
    evaluation = json.loads(path.read_text())
    name = next(name for name in evaluation["models"] if name not in ("teacher", "student"))
    assert "kept at random" not in render_model_card(run_dir)
    evaluation["models"][name]["description"] = "control: units kept at random"
    path.write_text(json.dumps(evaluation))
    assert ":** control: units kept at random.\n" in render_model_card(run_dir)


def test_arguments_that_another_overrules_are_not_shown(run_dir):
    """`max_steps` rules over `num_train_epochs`; -1 is no number of steps."""
    card = render_model_card(run_dir)
    assert "| max_steps | 400 |" in card
    assert "num_train_epochs" not in card
    record = training_record()
    record["arguments"]["max_steps"] = -1
    write_json(run_dir / "distillation.json", record)
    card = render_model_card(run_dir)
    assert "| num_train_epochs | 3.0 |" in card
    assert "| max_steps |" not in card


def with_evaluation(folder, **changes):
    """Add entries to the models of a run's evaluation: name → entries."""
    found = evaluation()
    for name, entries in changes.pop("models").items():
        found["models"][name] |= entries
    write_json(folder / "evaluation.json", {**found, **changes})


def test_chat_and_positions_are_shown_beside_the_teacher(tmp_path):
    folder = write_run(tmp_path)
    assert "### Chat" not in render_model_card(folder)
    assert "### By position" not in render_model_card(folder)
    number = {"value": 0.75, "stderr": 0.0625}
    chat = dict.fromkeys(("perplexity", "top1_agreement", "stopping", "format", "answer_tokens"), number)
    part = {"begin": 0, "end": 128, "num_tokens": 1000, "loss": {"value": 2.5, "stderr": 0.5}}
    parts = [part, {**part, "begin": 128, "end": 256, "num_tokens": 400}]
    kl = {"kl_divergence": number}
    with_evaluation(
        folder,
        chat={"num_prompts": 8, "max_new_tokens": 64, "digest": "sha256:0"},
        models={
            "teacher": {"chat": {**chat, "kl_divergence": None}, "positions": parts},
            "student": {"chat": {**chat, **kl}, "positions": [{**one, **kl} for one in parts]},
        },
    )
    card = render_model_card(folder)
    assert "| Own answers that end within the limit | 75.0 ± 6.2 % | 75.0 ± 6.2 % |" in card
    assert "| KL(teacher ‖ model) on the teacher's answers, nats per token | – | 0.750 ± 0.062 |" in card
    assert "answered 8 prompts greedily under the chat template, with at most 64 tokens" in card
    assert "| 128–255 | 400 | 2.50 ± 0.50 | 2.50 ± 0.50 | 0.750 ± 0.062 |" in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize(("context", "warns"), [(8192, True), (512, False), (513, True)])
def test_rows_far_shorter_than_the_context_are_told(tmp_path, context, warns):
    folder = write_run(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "max_position_embeddings": context})
    card = render_model_card(folder)
    text = f"**Training rows have at most 256 tokens of a context of {context:,}: positions from 256"
    assert (f"{text} on are not trained.**" in card) == warns
    assert "\n\n\n" not in card


def test_a_cut_vocabulary_is_said_beside_the_measurements(run_dir):
    """The teacher looks worse than it is, and nothing follows from the difference of the losses."""
    sentence, difference = "All models read the text in the student's tokens", "The model's loss is"
    assert sentence not in render_model_card(run_dir)
    assert difference in render_model_card(run_dir)
    plan = json.loads((run_dir / "pruning_plan.json").read_text())
    write_json(run_dir / "pruning_plan.json", {**plan, "vocabulary": {"coverage": 0.9}})
    assert sentence in render_model_card(run_dir)
    assert difference not in render_model_card(run_dir)


# ---- "How to use", run as it stands ----


def snippet_of(content, repository):
    """The code of a card, for the folder in which it is run."""
    (code,) = re.findall(r"```python\n(.*?)\n```", sections(content)["How to use"], flags=re.S)
    assert f'name = "{repository}"' in code
    return code.replace(f'name = "{repository}"', 'name = "."')


@pytest.fixture
def image_student(tmp_path):
    """A folder as a student of images is published, with a picture."""
    folder = tmp_path / "student"
    save_model(pocket_image_model(torch.float32), folder, pocket_processor())
    write_json(folder / "distillation.json", training_record())
    images(1)[0].save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_code_of_a_student_of_images_runs(image_student, monkeypatch, capsys, has_processor):
    if not has_processor:
        (image_student / "processor_config.json").unlink()
    content = render_model_card(image_student)
    assert check_card(content) == ([], [])
    assert card_metadata(content)["pipeline_tag"] == "image-text-to-text"
    assert "\n\n\n" not in content
    monkeypatch.chdir(image_student)
    found = {}
    exec(snippet_of(content, "path/to/this/folder"), found)
    assert type(found["model"]).__name__ == "Gemma3ForConditionalGeneration"
    assert capsys.readouterr().out.strip(), "it answers"
    assert ("processor" in found, "pixel_values" in found["inputs"]) == (has_processor, has_processor)


def test_without_a_chat_template_the_code_loads_a_student_of_images_alone(image_student, monkeypatch):
    (image_student / "chat_template.jinja").unlink()
    monkeypatch.chdir(image_student)
    found = {}
    exec(snippet_of(render_model_card(image_student), "path/to/this/folder"), found)
    assert type(found["processor"]).__name__ == "Gemma3Processor"
    assert "inputs" not in found


def test_the_code_of_a_student_of_text_runs(tmp_path, monkeypatch, capsys):
    save_model(pocket_model("llama", dtype=torch.float32), tmp_path, pocket_tokenizer())
    write_json(tmp_path / "distillation.json", training_record())
    write_json(tmp_path / "hub.json", {"repo_id": "lab/tiny"})
    content = render_model_card(tmp_path)
    assert card_metadata(content)["pipeline_tag"] == "text-generation"
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(snippet_of(content, "lab/tiny"), found)
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
    assert capsys.readouterr().out.strip()


def test_the_code_of_a_quantised_copy_runs(image_student, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    copy = quantize_checkpoint(image_student, tmp_path / "int8", "int8", device="cpu")
    write_json(copy / "hub.json", {"repo_id": "lab/tiny-int8", "student": "lab/tiny", "method": "int8"})
    write_json(copy / "teacher.json", TEACHER)
    content = render_quantized_card(copy)
    assert check_card(content) == ([], [])
    assert card_metadata(content)["pipeline_tag"] == "image-text-to-text"
    monkeypatch.chdir(copy)
    found = {}
    exec(snippet_of(content, "lab/tiny-int8"), found)
    assert type(found["model"]).__name__ == "Gemma3ForConditionalGeneration"
    assert type(found["processor"]).__name__ == "Gemma3Processor"


def test_models_of_sound_are_loaded_by_the_class_that_has_them(tmp_path):
    CONFIGS["voxtral"].save_pretrained(tmp_path)
    write_json(tmp_path / "distillation.json", training_record())
    content = render_model_card(tmp_path)
    assert check_card(content) == ([], [])
    assert card_metadata(content)["pipeline_tag"] == "audio-text-to-text"
    assert "model = AutoModelForMultimodalLM.from_pretrained(name)" in content
