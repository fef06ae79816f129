"""The command line: every stage by hand, and every mistake as one message with exit code 2."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import minitron_hf
from minitron_hf import PrunerConfig, count_parameters, student_config
from minitron_hf.cli.app import main
from minitron_hf.models import load_config
from pocket import pocket_model, pocket_tokenizer

TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_model("llama", dtype=torch.float32, seed=1).save_pretrained(folder / "other")
    for name in ("teacher", "other"):
        pocket_tokenizer().save_pretrained(folder / name)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "short.jsonl").write_text(json.dumps({"text": "a b"}))
    (folder / "empty.jsonl").write_text(json.dumps({"text": ""}))
    (folder / "recipe.yaml").write_text(
        f"""
teacher: {folder / "teacher"}
data: {{train: {folder / "text.jsonl"}, eval: {folder / "text.jsonl"}}}
output_dir: {folder / "run"}
prune: {{intermediate_size: 0.5}}
scores: {{num_rows: 8, max_length: 16}}
distill: {{max_steps: 2, max_length: 16, per_device_train_batch_size: 2}}
evaluate: {{num_rows: 4, speed: false}}
"""
    )
    return folder


def minitron(*arguments):
    """Run the command line in this process, as the installed script would."""
    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["minitron-hf", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    else:
        code = 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def refused(result, *words):
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.rindex("minitron-hf:") :]
    for word in words:
        assert word in message, message


def test_help_is_lazy():
    code = (
        "import sys; from minitron_hf.cli.app import app; app(['--help'], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in [
        "run",
        "score",
        "search",
        "plan",
        "prune",
        "cache",
        "generate",
        "distill",
        "evaluate",
        "card",
        "publish",
        "families",
    ]:
        assert command in result.stdout


def test_shapes_are_searched_and_targets_met(workshop, tmp_path):
    teacher, text, scores = workshop / "teacher", workshop / "text.jsonl", tmp_path / "scores"
    done = minitron("score", teacher, "--data", text, "-o", scores, "--set", "max_length=16", "--set", "num_rows=8")
    assert done.returncode == 0, done.stderr
    common = ("--scores", scores, "--data", text, "-o", tmp_path / "found")
    settings = ("--set", "tolerance=1.0", "--set", "num_rows=4", "--set", "max_length=16")
    space = ("--space", "intermediate_size=[0.25,0.5]", "--space", "num_hidden_layers=[4]")
    done = minitron("search", teacher, *common, *space, "--max-parameters", "1M", *settings)
    assert done.returncode == 0, done.stderr
    assert "behind the best" in done.stdout
    best = json.loads((tmp_path / "found" / "search.json").read_text())["candidates"][0]
    assert f"Best: {best['name']}" in done.stdout
    assert (tmp_path / "found" / "plots" / "search.png").is_file()
    chosen = json.loads((tmp_path / "found" / "pruner_config.json").read_text())
    assert chosen["intermediate_size"] == best["request"]["intermediate_size"]
    refused(minitron("search", teacher, *common, *space), "needs a budget")
    refused(minitron("search", teacher, *common, "--space", "depth=[1]", "--max-parameters", "1M"), "has no depth")

    plan = ("plan", teacher, "--scores", scores, "-o", tmp_path / "plan")
    done = minitron(*plan, "--target", "0.5", "--data", text)
    assert done.returncode == 0, done.stderr
    assert "Sizes for --target 0.5: " in " ".join(done.stdout.split())
    refused(minitron(*plan, "--target", "0.5"), "--data")


@pytest.mark.slow
def test_no_command_replaces_files_unasked(workshop, tmp_path):
    teacher, text, out = workshop / "teacher", workshop / "text.jsonl", tmp_path / "out"
    settings = ("--set", "max_length=16", "--set", "num_rows=4")
    corpora = ("--train-data", text, "--eval-data", text)
    commands = {
        out / "scores.safetensors": ("score", teacher, "--data", text, "-o", out, *settings),
        out / "pruning_plan.json": ("plan", teacher, "--scores", out, "--intermediate-size", "0.5", "-o", out),
        out / "recipe.yaml": ("recommend", teacher, "--target", "0.5", *corpora, "-o", out / "recipe.yaml"),
        out / "draft.py": ("families", "draft", "llama", "-o", out / "draft.py"),
    }
    for path, command in commands.items():
        done = minitron(*command)
        assert done.returncode == 0, done.stderr
        path.write_bytes(before := path.read_bytes() + b"")
        refused(minitron(*command), path.name, "exists already", "--overwrite")
        assert path.read_bytes() == before
        done = minitron(*command, "--overwrite")
        assert done.returncode == 0, done.stderr
    (out / "evaluation.json").touch()
    refused(minitron("evaluate", f"a={teacher}", "--data", text, "-o", out), "evaluation.json exists already")
    wrong = minitron("evaluate", f"a={out / 'nosuch'}", "--data", text, "-o", out, "--overwrite")
    refused(wrong, "does not exist")
    assert (out / "evaluation.json").is_file()  # until there is another
    (tmp_path / "run" / "stages").mkdir(parents=True)
    for path, command in list(commands.items())[:2]:
        moved = [tmp_path / "run" if part == out and before == "-o" else part for before, part in pairwise(command)]
        refused(minitron(command[0], *moved), "is the folder of a run")
        assert not (tmp_path / "run" / path.name).exists()


def test_no_command_writes_beside_files_of_others(workshop, tmp_path):
    """Neither with --overwrite, which replaces files of the command; beside its own files it writes."""
    teacher, text, out = workshop / "teacher", workshop / "text.jsonl", tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    settings = ("--set", "max_length=16", "--set", "num_rows=4")
    search = ("--space", "intermediate_size=[0.5]", "--max-parameters", "1M", "--data", text)
    score = ("score", teacher, "--data", text, *settings)
    commands = (
        (*score, "-o", out), (*score, "-o", out, "--overwrite"),
        ("plan", teacher, "--set", "layers_to_drop=[2]", "-o", out),
        ("search", teacher, "--scores", tmp_path, *search, "-o", out),
        ("evaluate", f"a={teacher}", "--data", text, "-o", out),
        ("distill", teacher, "--teacher", teacher, "--train-data", text, "-o", out),
        ("cache", teacher, "--data", text, "-o", out),
    )  # fmt: skip
    for command in commands:
        refused(minitron(*command), f"{out} already holds files")
        assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "pruning_plan.json").touch()
    assert minitron(*score, "-o", out).returncode == 0
    (out / "adapter_model.safetensors").touch()  # a student that is an adapter alone
    quick = ("--set", "speed=false", *settings)
    (out / "benchmarks.json").touch()  # of an evaluation that was stopped
    assert minitron("evaluate", f"a={teacher}", "--data", text, "-o", out, *quick).returncode == 0
    assert not (out / "benchmarks.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_scores_and_plans_are_written_by_one_command_at_a_time(workshop, tmp_path):
    import fcntl

    teacher, text = workshop / "teacher", workshop / "text.jsonl"
    with (tmp_path / ".minitron_hf.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(minitron("score", teacher, "--data", text, "-o", tmp_path), "in use")
        refused(
            minitron(
                "plan",
                teacher,
                "--set",
                "layers_to_drop=[2]",
                "-o",
                tmp_path,
            ),
            "in use",
        )
    assert {path.name for path in tmp_path.iterdir()} <= {".minitron_hf.lock"}


def test_a_card_needs_weights(workshop, tmp_path):
    shutil.copyfile(workshop / "teacher" / "config.json", tmp_path / "config.json")
    (tmp_path / "distillation.json").write_text('{"format": 1}')
    refused(minitron("card", tmp_path), "no model.safetensors", "finished run")
    assert not (tmp_path / "README.md").exists()


def test_every_stage_by_hand(workshop, tmp_path):
    teacher, text = workshop / "teacher", workshop / "text.jsonl"

    def ok(*arguments):
        result = minitron(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    ok("score", teacher, "--data", text, "-o", tmp_path / "scores", "--set", "max_length=16")
    shapes = ok(
        "plan", teacher, "--scores", tmp_path / "scores", "--intermediate-size", "0.5", "--num-hidden-layers", "4",
        "-o", tmp_path / "plan",
    )  # fmt: skip
    assert "intermediate_size" in shapes
    ok("prune", teacher, "--plan", tmp_path / "plan", "-o", tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert pruned.config.num_hidden_layers == 4
    refused(minitron("prune", teacher, "--plan", tmp_path / "plan", "-o", tmp_path / "pruned"), "already holds files")
    ok(
        "distill", tmp_path / "pruned", "--teacher", teacher, "--train-data", text, "-o", tmp_path / "out",
        "--set", "max_steps=2", "--set", "max_length=16", "--set", "report_to=none",
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(not a.equal(b) for a, b in zip(student.parameters(), pruned.parameters()))
    assert json.loads((tmp_path / "out" / "pruning_plan.json").read_text())["model_type"] == "llama"
    settings = ("--set", "max_steps=2", "--set", "max_length=16", "--set", "report_to=none")
    ok("cache", teacher, "--data", text, "--top-k", 9, "-o", tmp_path / "cache", *settings)
    ok("distill", tmp_path / "pruned", "--train-data", tmp_path / "cache", "-o", tmp_path / "cached", *settings)
    assert json.loads((tmp_path / "cached" / "distillation.json").read_text())["teacher_cache"][0]["top_k"] == 9
    nobody = minitron("distill", tmp_path / "pruned", "--train-data", text, "-o", tmp_path / "none", *settings)
    refused(nobody, "There is no teacher: --teacher is missing, and --train-data is not a teacher cache")
    table = ok(
        "evaluate", f"teacher={teacher}", f"student={tmp_path / 'out'}", "--data", text, "-o", tmp_path / "out",
        "--set", "speed=false",
    )  # fmt: skip
    assert "student" in table
    ok("card", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")


def test_a_plan_with_repair_is_carried_out_on_data(workshop, tmp_path):
    teacher, text, plan = workshop / "teacher", workshop / "text.jsonl", tmp_path / "plan"
    rows = ["--data", text, "--set", "max_length=16"]
    assert minitron("score", teacher, *rows, "-o", tmp_path / "scores").returncode == 0
    request = ["--scores", tmp_path / "scores", "--intermediate-size", "0.5"]
    assert minitron("plan", teacher, *request, "-o", plan, "--set", "repair=least_squares").returncode == 0
    prune = ["prune", teacher, "--plan", plan, "-o", tmp_path / "pruned"]
    refused(minitron(*prune), "the repair 'least_squares'", "--data")
    refused(minitron(*prune, *rows, "--set", "rows=3"), "repaired_weights", "rows")
    result = minitron(*prune, *rows)
    assert result.returncode == 0, result.stderr
    assert minitron(*prune[:-1], tmp_path / "in-memory", *rows, "--in-memory").returncode == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "pruning_plan.json"):
        assert (tmp_path / "in-memory" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes(), name
    assert minitron("plan", teacher, *request, "-o", tmp_path / "bare").returncode == 0
    bare = ["prune", teacher, "--plan", tmp_path / "bare", "-o", tmp_path / "cut"]
    refused(minitron(*bare, *rows), "no repair")
    assert minitron(*bare).returncode == 0
    repaired, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "cut"))
    changed = {name for name, values in cut.items() if not values.equal(repaired[name])}
    assert changed == {name for name in cut if name.endswith("down_proj.weight")}
    assert json.loads((tmp_path / "pruned" / "pruning_plan.json").read_text())["repair"] == "least_squares"


def test_a_plan_in_another_basis_is_carried_out_by_commands_and_by_a_recipe(workshop, tmp_path):
    teacher, plan = workshop / "teacher", tmp_path / "plan"
    score = ["score", teacher, "--data", workshop / "text.jsonl", "--set", "max_length=16", "--set", "num_rows=8"]
    request = ["--hidden-size", "24", "--set", "hidden_basis=principal"]
    assert minitron(*score, "-o", tmp_path / "bare").returncode == 0
    refused(minitron("plan", teacher, "--scores", tmp_path / "bare", *request, "-o", plan), "hidden_covariance=true")
    assert minitron(*score, "--set", "hidden_covariance=true", "-o", tmp_path / "scores").returncode == 0
    assert minitron("plan", teacher, "--scores", tmp_path / "scores", *request, "-o", plan).returncode == 0
    result = minitron("prune", teacher, "--plan", plan, "-o", tmp_path / "pruned", "--verify")
    assert "Verified: the logits are within" in result.stdout, result.stderr
    recipe = ["run", workshop / "recipe.yaml", "--until", "prune", "--set", f"output_dir={tmp_path / 'run'}"]
    changed = {"prune.intermediate_size": "null", "prune.hidden_size": 24, "prune.hidden_basis": "principal"}
    made = minitron(*recipe, *(part for name, value in changed.items() for part in ("--set", f"{name}={value}")))
    assert made.returncode == 0, made.stderr
    by_command, by_recipe = (load_file(path) for path in (tmp_path / "pruned/model.safetensors",
                                                          tmp_path / "run/pruned/model.safetensors"))  # fmt: skip
    assert all(values.equal(by_recipe[name]) for name, values in by_command.items())


def test_recommendations_are_printed_and_written_as_a_recipe(workshop, tmp_path):
    recipe, text = tmp_path / "recipe.yaml", workshop / "text.jsonl"
    wish = ["recommend", workshop / "teacher", "--target", "0.8", "--tokens", "10k"]
    corpora = ["--train-data", text, "--eval-data", text]
    result = minitron(*wish, *corpora, "-o", recipe, "--set", f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    for words in ("layers and neurons", "Muralidharan et al. 2024", "arXiv 2408.11796"):
        assert words in result.stdout
    assert "\n- measured here: the benchmarks of minitron-hf, in the files that are named\n" in result.stdout
    assert "Estimate on this machine" in result.stdout
    measured = minitron(*wish, "--train-data", text, "--measure")
    assert measured.returncode == 0, measured.stderr
    assert ("±" in measured.stdout, "±" in result.stdout) == (True, False)  # measured divergences
    refused(minitron(*wish, "--measure"), "--train-data")
    dry = minitron("run", recipe, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "num_hidden_layers" in dry.stdout
    refused(minitron(*wish, "-o", recipe), "--train-data")
    refused(minitron(*wish, *corpora), "--output")
    refused(minitron("recommend", workshop / "teacher", "--target", "half"), "--target half")
    before = minitron("plan", "--recommend", *wish[1:])  # for one release
    assert (before.returncode, before.stdout) == (0, minitron(*wish).stdout)
    assert "plan --recommend is deprecated" in before.stderr
    refused(minitron("plan", "--recommend", *wish[1:], "--hidden-size", "24"), "takes no sizes")


def test_shapes_are_printed_without_writing(workshop):
    before = sorted(workshop.rglob("*"))
    result = minitron("plan", workshop / "teacher", "--hidden-size", "24")
    assert result.returncode == 0, result.stderr
    config = student_config(load_config(workshop / "teacher"), PrunerConfig(hidden_size=24))
    assert f"{count_parameters(config):,}" in result.stdout
    assert sorted(workshop.rglob("*")) == before


def test_families_are_shown_together_and_alone():
    together = minitron("families")
    assert together.returncode == 0, together.stderr
    assert "qwen2_moe" in together.stdout
    assert "only together, so that `hidden_size` = `num_attention_heads` × head_dim" in together.stdout
    alone = minitron("families", "falcon")
    assert alone.returncode == 0, alone.stderr
    assert "one key and value head for all queries" in alone.stdout
    assert "ffn_hidden_size" in alone.stdout
    assert minitron("families", "--markdown").stdout.startswith("| families | layers |")
    refused(minitron("families", "nothing"), "No family table for 'nothing'", "llama")
    for extra in (("-o", "table.md"), ("llama", "-o", "table.md"), ("llama", "gemma")):
        refused(minitron("families", *extra), "families draft MODEL")
    refused(minitron("families", "llama", "--markdown"), "--markdown", "Leave out the model type")


def test_pickled_checkpoints_are_pruned_in_memory_and_it_says_so(workshop, tmp_path):
    pickled = shutil.copytree(workshop / "teacher", tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    made = minitron("plan", workshop / "teacher", "--set", "layers_to_drop=[1]", "-o", tmp_path / "plan")
    assert made.returncode == 0, made.stderr
    for teacher, output in ((workshop / "teacher", "streamed"), (pickled, "loaded")):
        result = minitron("prune", teacher, "--plan", tmp_path / "plan", "-o", tmp_path / output)
        assert result.returncode == 0, result.stderr
        assert ("loaded into memory" in result.stdout) == (output == "loaded")
    streamed, loaded = (tmp_path / name / "model.safetensors" for name in ("streamed", "loaded"))
    assert streamed.read_bytes() == loaded.read_bytes()


def test_a_family_is_drafted_from_a_folder_or_a_model_type(workshop, tmp_path):
    result = minitron("families", "draft", workshop / "teacher", "-o", tmp_path / "draft.py")
    assert result.returncode == 0, result.stderr
    printed = minitron("families", "draft", "llama")
    assert printed.stdout == (tmp_path / "draft.py").read_text()
    assert 'model_type="llama"' in printed.stdout
    refused(minitron("families", "draft"), "name a model type")


def test_verifying_leaves_a_note(workshop, tmp_path):
    made = minitron("plan", workshop / "teacher", "--set", "layers_to_drop=[1]", "-o", tmp_path / "plan")
    assert made.returncode == 0, made.stderr
    result = minitron("prune", workshop / "teacher", "--plan", tmp_path / "plan", "-o", tmp_path / "out", "--verify")
    assert result.returncode == 0, result.stderr
    assert "Verified: the logits are within" in result.stdout
    recipe = ["run", workshop / "recipe.yaml", "--until", "prune", "--set", f"output_dir={tmp_path / 'run'}"]
    assert minitron(*recipe, "--set", "verify=true").returncode == 0
    for folder in ("out", "run"):
        assert "Verified" in json.loads((tmp_path / folder / "pruning_plan.json").read_text())["notes"][-1]


def test_dry_run_prints_shapes_and_writes_nothing(workshop):
    result = minitron("run", workshop / "recipe.yaml", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "intermediate_size" in result.stdout
    teacher = AutoModelForCausalLM.from_pretrained(workshop / "teacher")
    assert f"{sum(p.numel() for p in teacher.parameters()):,}" in result.stdout
    assert not (workshop / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prune.hidden_size=35"], ["hidden_size=35", "24 or 36"]),
        (["prune.num_attention_heads=5"], ["num_attention_heads=5", "num_key_value_heads=3"]),
        (["prune.intermediate_size=99999"], ["99999", "larger than the teacher's"]),
        (["teacher.model=./nowhere"], ["nowhere"]),
        (["data.train=./nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]),
        (["scores.batch_reduction=max", "scores.max_len=3"], ["max_len"]),
        (["colour=blue"], ["colour"]),
        (["output_dir=/proc/run"], ["/proc"]),
    ],
)
def test_bad_recipes_are_one_message(workshop, overrides, words):
    arguments = [part for override in overrides for part in ("--set", override)]
    refused(minitron("run", workshop / "recipe.yaml", "--dry-run", *arguments), *words)
    assert not (workshop / "run").exists()


def test_an_unknown_architecture_names_the_known_ones(workshop, tmp_path):
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97).save_pretrained(tmp_path)
    pocket_tokenizer().save_pretrained(tmp_path)
    refused(minitron("run", workshop / "recipe.yaml", "--set", f"teacher={tmp_path}"), "bert", "llama", "qwen3")


@pytest.mark.parametrize(("name", "words"), [("short", "only"), ("empty", "no documents")])
def test_too_little_calibration_text(workshop, tmp_path, name, words):
    refused(
        minitron("score", workshop / "teacher", "--data", workshop / f"{name}.jsonl", "-o", tmp_path / "scores"), words
    )
    assert not (tmp_path / "scores").exists()


def test_scores_of_another_model_are_refused(workshop, tmp_path):
    scores = tmp_path / "scores"
    minitron("score", workshop / "other", "--data", workshop / "text.jsonl", "-o", scores, "--set", "max_length=16")
    minitron(
        "plan", workshop / "teacher", "--scores", scores, "--intermediate-size", "8", "-o", tmp_path / "plan"
    )  # same architecture: a config alone cannot tell
    refused(
        minitron("prune", workshop / "teacher", "--plan", tmp_path / "plan", "-o", tmp_path / "pruned"),
        "other weights",
    )
    assert not (tmp_path / "pruned").exists()


def test_a_tokenizer_without_end_of_text_is_refused(workshop, tmp_path):
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    pocket_tokenizer(eos_token=None, pad_token=None).save_pretrained(tmp_path / "teacher")
    refused(
        minitron("run", workshop / "recipe.yaml", "--dry-run", "--set", f"teacher={tmp_path / 'teacher'}"),
        "end-of-text",
        "tokenizer.eos_token",
    )


def test_messages_advise_commands(workshop, tmp_path):
    teacher, text = workshop / "teacher", workshop / "text.jsonl"
    refused(
        minitron("plan", teacher, "--hidden-size", 24, "-o", tmp_path / "plan"),
        "`minitron-hf score",
        "--scores FOLDER",
    )
    refused(
        minitron("distill", teacher, "--train-data", text, "-o", tmp_path / "out"), "--teacher MODEL", "--train-data"
    )
    refused(minitron("plan", teacher), "names no size", "fractions of them such as 0.75, or layers_to_drop")
    refused(minitron("prune", teacher, "--plan", tmp_path, "-o", tmp_path / "out"), "`minitron-hf plan`")


def test_a_misspelt_option_brings_one_suggestion(workshop):
    message = minitron("plan", workshop / "teacher", "--hiden-size", 24).stderr
    assert "--hidden-size" in message
    assert "--batch-size" not in message  # moved to another command, and hidden
    assert "--device" not in message


def test_a_missing_tokenizer_is_named_plainly(workshop, tmp_path):
    shutil.copytree(workshop / "teacher", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    result = minitron("score", tmp_path / "bare", "--data", workshop / "text.jsonl", "-o", tmp_path / "out")
    refused(result, "there are no tokenizer files", "tokenizer.json")
    assert "backend" not in result.stderr


def test_the_package_runs_as_a_module():
    made = subprocess.run(
        [sys.executable, "-m", "minitron_hf", "--version"], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == f"minitron-hf {minitron_hf.__version__}"


def test_a_full_disk_leaves_nothing_half_written(workshop, tmp_path):
    """Files limited to 20 kB stand for a full disk: the write fails in the middle."""
    import resource

    run = ["run", workshop / "recipe.yaml", "--until", "prune", "--set", f"output_dir={tmp_path / 'run'}"]

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    assert minitron(*run[:2], "--until", "plan", *run[4:]).returncode == 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        result = minitron(*run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    refused(result, "Free space")
    assert not (tmp_path / "run" / "pruned").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".pruned")]
    assert minitron(*run).returncode == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "pruned")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on(number, workshop, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "minitron_hf", "run", str(workshop / "recipe.yaml"),
         "--set", f"output_dir={tmp_path / 'run'}", "--set", "distill.max_steps=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell has put behind
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "[distill]" in line:
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "resumes" in output
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "config.json").exists()
