"""Commands in several processes: the packaged configurations, what is refused, and a run that is split over two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from minitron_hf.cli import wording
from minitron_hf.cli.app import main
from minitron_hf.errors import DataError, DistributedError, MinitronError, MissingDependencyError
from minitron_hf.recipe import launching
from pocket import pocket_model, pocket_tokenizer

NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without accelerators")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_packaged_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = launching.accelerate_config(name)
    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert config.distributed_type == written["distributed_type"]
    known = {"zero_stage", "zero3_init_flag", "zero3_save_16bit_model"} | {
        f"offload_{what}_device" for what in ("optimizer", "param")
    }
    from accelerate.commands.launch import launch_command_parser

    arguments = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= {*arguments, *known}


def test_what_cannot_be_launched_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="ddp, fsdp2, zero2, zero3"):
        launching.require_launchable("fsdp3", 2)
    (tmp_path / "mine.yaml").write_text("a: [1, 2]")
    with pytest.raises(DataError, match="no distributed_type"):
        launching.require_launchable(tmp_path / "mine.yaml", 2)
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert launching.require_launchable(tmp_path / "mine.yaml", 2) == 2
    with pytest.raises(DataError, match="at least 1"):
        launching.require_launchable("ddp", 0)
    with pytest.raises(DataError, match="how many") as refusal:
        launching.require_launchable("ddp", None)
    wording.begin({"num_processes": "--num-processes"})
    assert wording.worded(str(refusal.value)).endswith("to start: --num-processes N.")
    wording.begin({})
    with pytest.raises(DistributedError, match="Use ddp"):
        launching.require_launchable("fsdp2", 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert launching.require_launchable("fsdp2", None) == 4
    with pytest.raises(DistributedError, match="has 4 accelerators"):
        launching.require_launchable("fsdp2", 8)
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"minitron-hf\[deepspeed\]"):
        launching.require_launchable("zero3", 2)


@NO_ACCELERATOR
def test_what_a_process_refuses_reaches_the_one_that_started_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(MinitronError, match="no Accelerate configuration 'nothing'") as refused:
        launching.launch(["accelerate-config", "nothing"], "ddp", 1)
    assert "exit code" not in str(refused.value)


def minitron(*arguments):
    """Run the command line in a process of its own, as the installed script would."""
    command = [sys.executable, "-m", "minitron_hf.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell has put behind
    )


def finish(process):
    output, errors = process.communicate(timeout=1800)
    return process.returncode, output, errors


def losses(folder):
    history = json.loads((folder / "distillation.json").read_text())["log_history"]
    return [{key: entry[key] for key in ("step", "kl", "ce")} for entry in history if "kl" in entry]


@pytest.mark.slow
@NO_ACCELERATOR
def test_a_run_in_two_processes_equals_a_run_in_one(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    texts = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pocket_model("llama", dtype=torch.float32, max_position_embeddings=512).save_pretrained(tmp_path / "teacher")
    pocket_tokenizer().save_pretrained(tmp_path / "teacher")
    values = {
        "teacher": str(tmp_path / "teacher"),
        "data": {name: str(tmp_path / "text.jsonl") for name in ("train", "eval")},
        "output_dir": str(tmp_path / "one"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 8, "max_length": 16},
        # Three steps on 6 rows: the last batch of an epoch is filled up, and one process has nothing new in it.
        "teacher_correction": {"original_learning_rate": 1e-3, "num_tokens": 3 * 4 * 512},
        "distill": {
            "max_steps": 6,
            "max_length": 16,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "bf16": False,
        },
        "lora": {"r": 2, "target_modules": "all-linear"},
        "controls": ["random_pruning", "cross_entropy"],
        "evaluate": {"num_rows": 4, "speed": False},
    }
    arguments = {"per_device_train_batch_size": 4, "max_length": 512, "bf16": False}
    values["teacher_correction"]["arguments"] = arguments
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    code, output, errors = finish(minitron("run", recipe, "--quiet"))
    assert code == 0, errors

    two = ["run", recipe, "--quiet", "--set", f"output_dir={tmp_path / 'two'}"]
    in_two = ["--accelerate", "ddp", "--num-processes", "2"]
    halves = [
        "--set=distill.per_device_train_batch_size=2",
        "--set=teacher_correction.arguments.per_device_train_batch_size=2",
    ]
    process = minitron(*two, *in_two, *halves)
    while not list((tmp_path / "two").glob("checkpoint-*")):
        assert process.poll() is None, finish(process)
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 130, errors
    assert "resumes" in output
    assert "Traceback" not in errors
    assert not (tmp_path / "two" / "config.json").exists()
    code, output, errors = finish(minitron(*two, *in_two, *halves))
    assert code == 0, errors
    assert "[correct] done before, skipped" in output

    for folder in ("", "controls/random_pruning", "controls/cross_entropy"):
        expected = losses(tmp_path / "one" / folder)
        assert len(expected) == 6
        assert losses(tmp_path / "two" / folder) == [pytest.approx(entry, rel=1e-5) for entry in expected]
        record = json.loads((tmp_path / "two" / folder / "distillation.json").read_text())
        assert record["num_processes"] == 2
    scores = [json.loads((tmp_path / name / "evaluation.json").read_text())["models"] for name in ("one", "two")]
    for name, values in scores[0].items():
        found, wanted = (each["metrics"]["kl_divergence"] for each in (scores[1][name], values))
        assert (wanted is None) == (name == "teacher")
        assert wanted is None or found == pytest.approx(wanted, rel=1e-5, abs=1e-7), name

    # A refusal in the processes is one message.
    code, output, errors = finish(
        minitron("distill", tmp_path / "two", "--train-data", tmp_path / "nothing.jsonl", "--teacher",
                 tmp_path / "teacher", "-o", tmp_path / "out", *in_two)
    )  # fmt: skip
    assert code == 2
    assert errors.count("minitron-hf:") == 1
    assert "nothing.jsonl" in errors
    assert "Traceback" not in errors


def test_run_does_not_let_itself_be_launched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["minitron-hf", "run", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--accelerate" in capsys.readouterr().err
