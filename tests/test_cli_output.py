"""How commands print: JSON for machines, one progress bar, little noise, 80 columns; and the machine's state."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig
from typer.main import get_command

from minitron_hf.cli import doctor, output, printing, wording
from minitron_hf.cli.app import app
from minitron_hf.progress import one_progress_bar
from minitron_hf.recipe.runner import _time_left
from minitron_hf.recipe.usage import COSTS_NAME, read_costs
from pocket import pocket_model, pocket_tokenizer
from run_folder import write_json, write_run
from test_cli import TEXTS, minitron


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "recipe.yaml").write_text(
        f"{{teacher: {folder / 'teacher'}, output_dir: {folder / 'run'}, prune: {{intermediate_size: 0.5}}, "
        f"data: {{train: {folder / 'text.jsonl'}, eval: {folder / 'text.jsonl'}}}, "
        "scores: {num_rows: 8, max_length: 16}, evaluate: {num_rows: 4, speed: false}, "
        "distill: {max_steps: 2, max_length: 16, per_device_train_batch_size: 2}}"
    )
    return folder


def document(*arguments):
    done = minitron(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_command_has_the_same_three_options():
    for name, command in get_command(app).commands.items():
        if not command.hidden:
            assert {"--json", "--quiet", "--verbose"} <= {one for each in command.params for one in each.opts}, name


def test_a_run_and_its_parts_are_json_documents(workshop, tmp_path):
    """Nothing but the document is on the standard output."""
    dry = document("run", workshop / "recipe.yaml", "--dry-run")
    assert dry["command"] == "run"
    assert dry["shapes"]["sizes"]["ffn"]["student"] == 24
    assert [one["stage"] for one in dry["estimate"]["stages"]][:2] == ["score", "plan"]
    done = document("run", workshop / "recipe.yaml")
    assert done["folder"] == str(workshop / "run")
    assert done["evaluation"]["models"]["student"]["metrics"]["kl_divergence"]["value"] > 0
    assert [one["stage"] for one in done["costs"]["stages"]][:4] == ["score", "plan", "prune", "distill"]
    scored = document(
        "score", workshop / "teacher", "--data", workshop / "text.jsonl", "-o", tmp_path, "--set", "num_rows=4"
    )
    assert scored["written"] == [str(tmp_path / "scores.safetensors")]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("fit", "{teacher}", "--device", "24GB", "--intermediate-size", "0.5"), "capacity"),
        (("plan", "{teacher}", "--intermediate-size", "0.5"), "shapes"),
        (("recommend", "{teacher}", "--target", "0.5", "--tokens", "1M"), "decisions"),
        (("families",), "matrix"),
        (("families", "llama"), "families"),
        (("accelerate_config",), "configurations"),
    ],
)
def test_other_results_are_json_documents(workshop, arguments, key):
    names = {one.replace("-", "_"): one for one in get_command(app).commands}
    command, *rest = (one.format(teacher=workshop / "teacher") for one in arguments)
    assert document(names.get(command, command), *rest)[key]


def test_an_error_is_a_json_document_too(workshop):
    done = minitron("plan", workshop / "nowhere", "--json")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (2, 2)
    assert json.loads(done.stdout)["error"] in done.stderr


@pytest.mark.parametrize("arguments", [("plan",), ("score", "x"), ("plan", "x", "--nonsense"), ("nonsense",)])
def test_wrong_usage_is_a_json_document_too(arguments):
    done = minitron(*arguments, "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["exit_code"]) == (2, 2)
    assert answer["error"] in done.stderr
    assert minitron(*arguments).stdout == ""


def test_benchmarks_and_samples_are_in_the_document_and_may_hold_brackets(tmp_path, capsys):
    """A prompt in the format of Llama 2 looks like markup of Rich."""
    folder = write_run(tmp_path / "run")
    prompt = "[INST] Tell me a [bold]story[/bold] [/INST]"
    samples = [{"prompt": prompt, "completions": {"[/a]": "x"}}]
    write_json(folder / "samples.json", {"format": 1, "samples": samples})
    tasks = {"piqa": {"acc,none": {"value": 0.7, "stderr": 0.01}}}
    write_json(folder / "benchmarks.json", {"teacher": tasks, "student": tasks})
    printing._print_results(folder)
    assert f"[/a] | {prompt!r} →" in capsys.readouterr().out
    with output.printing("run", output.Output(json=True)):
        printing._print_results(folder)
    found = json.loads(capsys.readouterr().out)
    assert found["benchmarks"]["models"]["student"]["piqa"]["acc,none"]["value"] == 0.7
    assert found["samples"][0]["prompt"] == prompt


def test_quiet_prints_results_alone(workshop):
    arguments = ("run", workshop / "recipe.yaml", "--set", f"output_dir={workshop / 'quiet'}", "--until", "prune")
    quiet = minitron(*arguments, "-q")
    assert "[score]" not in quiet.stdout
    assert "Estimate on this machine" not in quiet.stdout + quiet.stderr
    assert read_costs(workshop / "quiet")["estimate"] is not None
    assert "[score]" in minitron(*arguments).stdout
    done = minitron("families", "-q", "-v")
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("show", "terminal"), [(True, True), (True, False), (False, True)])
def test_one_bar_at_a_time_is_shown_on_a_terminal_and_removed(monkeypatch, show, terminal):
    shown = show and terminal
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    with one_progress_bar(show):
        with tqdm(range(2), desc="outer", disable=None) as outer:
            with tqdm(range(2), desc="inner") as inner:
                assert inner.disable
            assert outer.disable != shown
            assert not outer.leave
        with tqdm(range(2)) as later:  # once the first has ended
            assert later.disable != shown
    with tqdm(range(2), file=io.StringIO()) as outside:
        assert not outside.disable
        assert outside.leave


#: Long commands, and how their bar begins.
LONG = {
    "score": ("score {teacher} --data {text} -o {out} --set num_rows=4 --set max_length=16", "Scoring"),
    "prune": ("prune {teacher} --plan {plan} --data {text} -o {out} --set max_length=16", "Repairing"),
    "in memory": ("prune {teacher} --plan {plan} --data {text} -o {out} --set max_length=16 --in-memory", "Repairing"),
    "cache": ("cache {teacher} --data {text} -o {out} --set max_length=16 --top-k 4", "Caching"),
    "distill": (
        "distill {student} --teacher {teacher} --train-data {text} -o {out} --set max_length=16 --set max_steps=2 "
        "--set save_strategy=no",
        "2/2",
    ),
    "generate": ("generate {teacher} --prompts {text} -o {out} --set max_new_tokens=2", "Generating"),
    "evaluate": ("evaluate teacher={teacher} --data {text} -o {out} --set num_rows=4 --set speed=false", "Evaluating"),
    "search": (
        "search {teacher} --scores {scores} --space intermediate_size=[0.5,0.75] --max-parameters 83k --data {text} "
        "--train-data {text} -o {out} --set num_tokens=64 --set num_rounds=1 --set num_rows=4 --set max_length=16",
        "Distilling, round 1",
    ),
}


@pytest.fixture(scope="module")
def parts(workshop):
    """Scores, a plan with a repair, and its student."""
    folder = workshop / "parts"
    minitron("score", workshop / "teacher", "--data", workshop / "text.jsonl", "-o", folder)
    shape = ("--scores", folder, "--intermediate-size", "0.5", "--set", "repair=least_squares")
    minitron("plan", workshop / "teacher", *shape, "-o", folder)
    prune = ("--plan", folder, "--data", workshop / "text.jsonl", "-o", folder / "student")
    assert minitron("prune", workshop / "teacher", *prune).returncode == 0
    return {"scores": folder, "plan": folder, "student": folder / "student"}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, "") for name in LONG), ("search", "--quiet"), ("score", "--quiet"), ("score", "--json")],
)
def test_long_commands_show_a_bar_with_rate_and_time_left(name, options, workshop, parts, tmp_path, monkeypatch):
    """On a terminal, and neither with --quiet nor for machines."""
    line, begins = LONG[name]
    paths = {"teacher": workshop / "teacher", "text": workshop / "text.jsonl", "out": tmp_path / "out", **parts}
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    get_command(app)(f"{line} {options}".format(**paths).split(), standalone_mode=False)
    shown = terminal.getvalue()
    assert (begins in shown) == (not options)
    assert bool(re.search(r"[\d.?]+ ?\w+/s|[\d.]+s/\w+", shown)) == (not options)
    assert bool(re.search(r"\d:\d\d", shown)) == (not options)


@pytest.mark.parametrize("option", ["--verbose", "--quiet", "--json"])
def test_a_dry_run_says_what_it_does(option, workshop, monkeypatch):
    """On a terminal, and neither with --quiet nor for machines."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    get_command(app)(["run", str(workshop / "recipe.yaml"), "--dry-run", option], standalone_mode=False)
    for words in ("Checking the recipe", "Timing this machine"):
        assert (words in terminal.getvalue()) == (option == "--verbose")


def test_columns_name_the_reference_and_none_is_named_without_one(workshop, tmp_path):
    model, text = (
        workshop / "teacher",
        ("--data", workshop / "text.jsonl", "--set", "speed=false", "--set", "num_rows=4"),
    )
    alone = minitron("evaluate", f"a={model}", *text, "-o", tmp_path / "alone").stdout
    assert "bits per byte" in alone
    assert "KL" not in alone
    both = minitron("evaluate", f"a={model}", f"b={model}", *text, "-o", tmp_path / "both").stdout
    assert "KL to a" in both
    assert "teacher" not in both


def test_a_plan_is_also_its_file_and_a_verification_is_in_the_document(workshop, parts, tmp_path):
    plan = parts["plan"] / "pruning_plan.json"
    data = ("--data", workshop / "text.jsonl", "--set", "max_length=16")
    found = document("prune", workshop / "teacher", "--plan", plan, *data, "-o", tmp_path / "student", "--verify")
    assert found["written"] == [str(tmp_path / "student")]
    assert any("the logits are within" in note for note in found["notes"])


def test_a_cache_of_another_teacher_is_told_apart_and_the_same_command_resumes(workshop, tmp_path):
    teacher, other = workshop / "teacher", tmp_path / "other"
    pocket_model("llama", dtype=torch.float32, seed=1).save_pretrained(other)
    pocket_tokenizer().save_pretrained(other)
    options = ("--data", workshop / "text.jsonl", "--top-k", "2", "--set", "max_length=16", "-o", tmp_path / "cache")
    for _ in range(2):
        assert minitron("cache", teacher, *options).returncode == 0
    done = minitron("cache", other, *options)
    assert done.returncode == 2
    assert "another teacher, or other weights of this one" in done.stderr
    assert "sha256" not in done.stderr


def test_warnings_of_libraries_are_hidden_and_those_of_this_package_shown():
    def warn(module):
        scope = {"__name__": module, "warnings": warnings}
        exec(f"warnings.warn('from {module}', UserWarning)", scope)

    for verbose, expected in (
        (False, ["from minitron_hf.data"]),
        (True, ["from transformers.x", "from minitron_hf.data"]),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with output._library_messages(verbose=verbose):
                warn("transformers.x")
                warn("minitron_hf.data")
        assert [str(one.message) for one in seen] == expected


@pytest.mark.parametrize("verbose", [False, True])
def test_warnings_of_this_package_are_in_the_words_of_the_command(verbose, capsys):
    wording.begin({"top_k": "--top-k"})
    wording.takes(["max_length"])
    with output._library_messages(verbose=verbose):
        logging.getLogger("minitron_hf.scoring.calibration").warning("max_length=%d exceeds, top_k=3", 4096)
        logging.getLogger("minitron_hf.models").info("told with --verbose")
    logging.getLogger("minitron_hf.models").setLevel(logging.NOTSET)
    wording.begin({})
    said = capsys.readouterr().err
    assert "--set max_length=4096 exceeds, --top-k 3" in said
    assert ("told with --verbose" in said) == verbose


def test_notes_are_in_the_words_of_the_command(workshop, tmp_path):
    """Of a plan, with and without --json, of an estimate and of `fit`; the plan's file keeps those of Python."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128, vocab_size=97
    )
    config.save_pretrained(tmp_path / "qwen2")
    given = ["plan", tmp_path / "qwen2", "--num-attention-heads", "0.7"]
    [note, other] = document(*given)["shapes"]["notes"]
    assert note.startswith("--num-attention-heads 0.7 of 8 becomes 4, that is 0.5: ")
    assert "It takes --hidden-size 32 with --num-attention-heads 4; --portable allows only such sizes" in other
    text = " ".join(minitron(*given).stdout.split())
    assert note in text
    changes = ("--set", "distill.max_length=null", "--set", f"output_dir={tmp_path / 'run'}")
    dry = document("run", workshop / "recipe.yaml", "--dry-run", *changes)["estimate"]
    assert any(one.startswith("distill.max_length=null: rows have at most 64") for one in dry["notes"])
    sizes = ("--intermediate-size", "0.5", "--device", "80GB")
    found = document("fit", workshop / "teacher", *sizes)["capacity"]["assumptions"]
    assert "rows have at most 64 tokens, the shorter context of the two models" in found


def test_libraries_say_nothing_while_they_are_imported(workshop):
    """Libraries warn there: torchao of kernels for other processors, torch of names in torchao that it replaces."""
    code = "import sys; sys.argv[0] = 'minitron-hf'; from minitron_hf.cli.entry import main; main()"
    given = [sys.executable, "-c", code, "run", str(workshop / "recipe.yaml"), "--dry-run"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torchao" not in done.stderr
    assert "_pytree" not in done.stderr


@pytest.mark.parametrize(("command", "words"), [("run", "resumes"), ("plan", "Run it again")])
def test_an_interrupt_ends_every_command_with_130(monkeypatch, workshop, command, words):
    monkeypatch.setattr("minitron_hf.models.load_config", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(
        "minitron_hf.recipe.run.load_config", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    given = [workshop / "recipe.yaml"] if command == "run" else [workshop / "teacher", "--intermediate-size", "0.5"]
    done = minitron(command, *given)
    assert done.returncode == 130
    assert words in done.stdout
    done = minitron(command, *given, "--json")
    assert done.returncode == 130
    assert words in (found := json.loads(done.stdout))["error"]
    assert found["exit_code"] == 130


@pytest.mark.parametrize("module", ["typer", "torch"])
@pytest.mark.parametrize("swallows", [False, True])
def test_an_interrupt_while_modules_are_imported_is_no_traceback(module, swallows, tmp_path, workshop):
    """The signal comes in the middle of an import, which may turn it into an error of its own."""
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    caught = f"try:\n    {kill}\nexcept KeyboardInterrupt:\n    raise ImportError('half of it') from None\n"
    (tmp_path / f"{module}.py").write_text(caught if swallows else kill)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = [sys.executable, "-m", "minitron_hf", "plan", str(workshop / "teacher"), "--hidden-size", "24", "--json"]
    done = subprocess.run(
        given, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell has put behind
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "Interrupted. Run it again."
    assert json.loads(done.stdout) == {"error": "Interrupted. Run it again.", "exit_code": 130}


@pytest.mark.slow
def test_eighty_columns_and_no_colour(workshop, monkeypatch):
    """No line is longer, no cell is cut, and NO_COLOR wins over a terminal that takes colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    folder = workshop / "eighty"
    minitron("run", workshop / "recipe.yaml", "--set", f"output_dir={folder}")
    text = "".join(
        minitron(*arguments).stdout
        for arguments in (
            ("run", workshop / "recipe.yaml", "--set", f"output_dir={folder}"),
            ("plan", workshop / "teacher", "--intermediate-size", "0.5"),
            ("recommend", workshop / "teacher", "--target", "0.5", "--tokens", "1M"),
            ("fit", workshop / "teacher", "--device", "24GB", "--intermediate-size", "0.5"),
            ("families",),
        )
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    long = [line for line in plain.splitlines() if len(line) > 80 and str(folder) not in line]
    assert not long
    assert not re.findall(r"\x1b\[[0-9;]*3[0-9]", text)
    assert "…" not in text


def test_what_is_left_follows_from_the_estimate(tmp_path):
    stages = [
        {"stage": name, "seconds": seconds} for name, seconds in (("score", 60.0), ("plan", None), ("distill", 7200))
    ]
    (tmp_path / COSTS_NAME).write_text(json.dumps({"format": 1, "estimate": {"stages": stages}, "stages": []}))
    digests = {"score": "of scores", "plan": "of the plan", "distill": "of the student"}
    assert _time_left(tmp_path, ["score", "plan", "distill"], digests) == " (about 60 s; 2.0 h left in all)"
    assert _time_left(tmp_path, ["plan", "distill"], digests) == ""
    assert _time_left(tmp_path / "nowhere", ["score"], digests) == ""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "distill.json").write_text(json.dumps({"format": 1, "digest": "of the student"}))
    assert _time_left(tmp_path, ["distill"], digests) == " (goes on; about 2.0 h from its beginning)"
    digests["distill"] = "of another student"
    assert _time_left(tmp_path, ["distill"], digests) == " (about 2.0 h; 2.0 h left in all)"


def test_the_doctor_never_shows_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    done = minitron("doctor")
    assert "a token is there" in done.stdout
    assert "secret" not in done.stdout + done.stderr + json.dumps(document("doctor"))
    assert f"torch {torch.__version__}" in done.stdout


def test_the_doctor_names_what_is_wrong(monkeypatch):
    needed = ["torch>=99", "nosuchpackage>=1", "x; extra == 'y'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needed)
    cache = {"folder": "x", "exists": True, "writable": False, "free_bytes": 1e9}
    monkeypatch.setattr(doctor, "_cache", lambda: cache)
    done = minitron("doctor", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)["doctor"]
    problems = found["problems"]
    assert re.match(r"torch .* is installed, expected >=99", problems[0])
    assert problems[1].startswith("nosuchpackage is not installed. Run pip install 'nosuchpackage>=1'")
    assert problems[2] == "The Hub's cache x cannot be written. Set HF_HOME to a folder that can."
    assert len(problems) == 3
    assert len(found["warnings"]) == 1
    assert "has 1.0 GB left" in found["warnings"][0]


def test_little_space_is_a_warning(monkeypatch):
    cache = {"folder": "x", "exists": True, "writable": True, "free_bytes": 17.1e9}
    monkeypatch.setattr(doctor, "_cache", lambda: cache)
    monkeypatch.setattr(doctor, "_versions", lambda: ({}, []))
    done = minitron("doctor")
    assert done.returncode == 0
    assert "17.1 GB left" in " ".join(done.stdout.split())
    assert "No problems found" in done.stdout


def test_shells_complete_commands():
    environment = {
        **os.environ,
        "_MINITRON_HF_COMPLETE": "complete_bash",
        "COMP_WORDS": "minitron-hf re",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['minitron-hf']; from minitron_hf.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["recommend"]


def test_numbers_that_are_not_finite_are_null():
    assert output.plain({"a": float("nan"), "b": [float("inf"), 1.5]}) == {"a": None, "b": [None, 1.5]}
