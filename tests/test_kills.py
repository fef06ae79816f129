"""Killed at any moment, the same command resumes without a manual step, and ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from killing import Kill, differing, kills, operations, restore, results, run, spread
from pocket import pocket_model, pocket_tokenizer

WORDS = ("old", "new", "red", "big", "sad", "far")
STAGES = ("score", "search", "plan", "prune", "correct", "cache", "distill", "controls", "evaluate", "card")


def run_stage(arguments: dict[str, Any]) -> None:
    """What a process does that may be killed: a run of a recipe, up to a stage."""
    from minitron_hf.recipe.runner import run_recipe
    from minitron_hf.recipe.schema import Recipe

    run_recipe(Recipe.from_dict(arguments["recipe"]), until=arguments["until"], show_progress=False)


def run_command(arguments: list[str]) -> None:
    """What a process does that may be killed: a command of the command line."""
    from minitron_hf.cli.app import app

    app(arguments, standalone_mode=False)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a pocket teacher and two corpora; and a home for what the libraries cache."""
    folder = tmp_path_factory.mktemp("kills")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer().save_pretrained(folder / "teacher")
    texts = [f"the {a} {b} of a {c} is {d}" for a in WORDS[:3] for b in WORDS for c in "xy" for d in "klm"]
    for name, rows in (("train", texts), ("eval", texts[::7])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return folder


@pytest.fixture(scope="module", autouse=True)
def environment(workshop):
    """Of the processes: caches of their own, and no network."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(workshop / "home"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


def recipe(workshop: Path, **changes: Any) -> dict[str, Any]:
    training = {"max_length": 16, "per_device_train_batch_size": 2}
    return {
        "teacher": {"model": str(workshop / "teacher"), "dtype": "float32"},
        "data": {"train": str(workshop / "train.jsonl"), "eval": str(workshop / "eval.jsonl")},
        "output_dir": str(workshop / "run"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 4, "max_length": 16},
        "distill": {**training, "max_steps": 3, "save_steps": 1, "eval_steps": 3, "lr_scheduler_type": "constant"},
        "evaluate": {"num_rows": 4, "speed": False, "prompts": ["the old"]},
        **changes,
    }


def full_recipe(workshop: Path) -> dict[str, Any]:
    """Every stage but the last, which uploads."""
    arguments = {"max_length": 16, "per_device_train_batch_size": 2, "save_steps": 1}
    return recipe(
        workshop,
        prune={},
        search={
            "space": {"intermediate_size": [0.5, 0.25]},
            "max_parameters": 1e9,
            "tolerance": 1.0,
            "num_candidates": 2,
            "num_rounds": 1,
            "num_tokens": 64,
            "num_rows": 4,
        },
        teacher_correction={"original_learning_rate": 1e-3, "num_tokens": 96, "arguments": arguments},
        teacher_cache={"top_k": 4},
        controls=["random_pruning", "cross_entropy"],
    )


class Killed:
    """Kills runs of one action on one folder, and counts.

    Attributes:
        kills: stage or command → how many died.
        in_checkpoints: how many of them between the first and the last file operation of a checkpoint.
        failures: what did not resume to the same bytes.
    """

    def __init__(self, workshop: Path, folder: Path) -> None:
        self.folder, self.log = folder, workshop / "operations"
        self.kills: Counter[str] = Counter()
        self.in_checkpoints = 0
        self.failures: list[str] = []

    def whole(self, action: Callable[[Any], None], arguments: Any) -> list[tuple[str, str]]:
        """Run to the end; the file operations."""
        assert run(action, arguments, self.folder, self.log) == 0, self.said()
        return operations(self.log)

    def said(self) -> str:
        return Path(f"{self.log}.txt").read_text()[-3000:]

    def one(self, name: str, action: Callable[[Any], None], arguments: Any, before: Path, kill: Kill) -> bool:
        """Kill a run that begins with a snapshot; whether it died before its end."""
        restore(before, self.folder)
        code = run(action, arguments, self.folder, self.log, kill)
        assert code in (-kill.signal, 130, 0), self.said()
        if code == 0:
            return False
        self.kills[name] += 1
        self.in_checkpoints += "checkpoint-" in operations(self.log)[-1][1] if kill.at is not None else 0
        return True

    def resumes(self, action: Callable[[Any], None], arguments: Any, expected: dict[str, Any], kill: Kill) -> None:
        """Run the same once more, and compare."""
        where = f"{kill} at {operations(self.log)[-1:]}"
        print(f"{sum(self.kills.values())}: {where}", flush=True)
        if run(action, arguments, self.folder, self.log) != 0:
            self.failures.append(f"{where}: {self.said()}")
            print(self.failures[-1], flush=True)
        elif others := differing(results(self.folder), expected):
            self.failures.append(f"{where}: {others}")
            print(self.failures[-1], flush=True)


def snapshot(folder: Path, where: Path) -> Path:
    restore(folder, where)
    return where


@pytest.mark.slow  # one kill is in test_runner
def test_a_distillation_survives_kills(workshop):
    """A sample of what follows: after a checkpoint, while the student is moved, and in the middle of a file."""
    killed = Killed(workshop, workshop / "run")
    values = recipe(workshop)
    killed.whole(run_stage, {"recipe": values, "until": "prune"})
    before = snapshot(killed.folder, workshop / "before")
    arguments = {"recipe": values, "until": "distill"}
    done = killed.whole(run_stage, arguments)
    expected = results(killed.folder)
    within = [index for index, (_, path) in enumerate(done) if "checkpoint-2" in path]
    for kill in kills(done, (within[-1] + 1, len(done) - 3, within[len(within) // 2])):
        assert killed.one("distill", run_stage, arguments, before, kill)
        killed.resumes(run_stage, arguments, expected, kill)
    assert not killed.failures


#: Stage → how many kills before file operations, of which every third tears the file, and how many within checkpoints.
KILLS = {
    "distill": (8, 10),
    "correct": (6, 7),
    "controls": (8, 6),
    "search": (6, 6),
    "card": (5, 0),
    "score": (3, 0),
    "plan": (4, 0),
    "prune": (4, 0),
    "cache": (6, 0),
    "evaluate": (4, 0),
}
TRAINING = ("search", "correct", "distill", "controls")


@pytest.mark.slow
def test_every_stage_survives_kills_at_every_kind_of_moment(workshop):
    """At least 70 kills; 40 within what trains, 20 within the writing of a checkpoint."""
    generator = random.Random(0)
    killed = Killed(workshop, workshop / "run")
    restore(workshop / "nothing", killed.folder)
    values = full_recipe(workshop)
    done = {}
    for stage in STAGES:
        snapshot(killed.folder, workshop / f"before-{stage}")
        done[stage] = killed.whole(run_stage, {"recipe": values, "until": stage})
        snapshot(killed.folder, workshop / f"after-{stage}")
    for stage, (anywhere, in_checkpoints) in KILLS.items():
        arguments = {"recipe": values, "until": stage}
        before, expected = workshop / f"before-{stage}", results(workshop / f"after-{stage}")
        within = [index for index, (_, path) in enumerate(done[stage]) if "checkpoint-" in path]
        chosen = sorted({*spread(range(len(done[stage])), anywhere), *spread(within, in_checkpoints)})
        chosen_kills = kills(done[stage], chosen)
        if stage in TRAINING:
            signals = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
            chosen_kills += [Kill(after=generator.uniform(0.3, 2.5), signal=which) for which in signals]
        for kill in chosen_kills:
            if killed.one(stage, run_stage, arguments, before, kill):
                killed.resumes(run_stage, arguments, expected, kill)
    print(dict(killed.kills), "in checkpoints:", killed.in_checkpoints)
    assert not killed.failures, "\n".join(killed.failures)
    trained = sum(killed.kills[stage] for stage in TRAINING)
    assert sum(killed.kills.values()) >= 75
    assert trained >= 40
    assert killed.in_checkpoints >= 20


@pytest.mark.slow
def test_every_command_survives_kills(workshop):
    """At least 25 kills."""
    teacher, train, held_out = (str(workshop / name) for name in ("teacher", "train.jsonl", "eval.jsonl"))
    out = workshop / "commands"
    killed = Killed(workshop, out)
    restore(workshop / "nothing", out)
    training = ["--set=max_length=16", "--set=per_device_train_batch_size=2"]
    search = [f"--set={entry}" for entry in ("num_tokens=64", "num_candidates=2", "num_rounds=1", "num_rows=4")]
    search += ["--set=max_length=16", "--set=tolerance=1.0", "--set=distillation.per_device_train_batch_size=2"]
    scoring = ["--set=num_rows=4", "--set=max_length=16"]
    commands = {
        "score": ["score", teacher, "--data", train, "-o", f"{out}/scores", *scoring],
        "plan": ["plan", teacher, "--scores", f"{out}/scores", "--intermediate-size", "0.5", "-o", f"{out}/plan"],
        "prune": ["prune", teacher, "--plan", f"{out}/plan", "-o", f"{out}/pruned"],
        "cache": ["cache", teacher, "--data", train, "-o", f"{out}/cache", "--top-k", "4", "--set=max_length=16"],
        "distill": [
            "distill", f"{out}/pruned", "--teacher", teacher, "--train-data", train, "--eval-data", held_out,
            "-o", f"{out}/student", *training, "--set=max_steps=3", "--set=save_steps=1",
        ],
        "search": [
            "search", teacher, "--scores", f"{out}/scores", "--space", "intermediate_size=[0.5,0.25]",
            "--data", train, "--train-data", train, "--max-parameters", "1B", "-o", f"{out}/search", *search,
        ],
    }  # fmt: skip
    for name, arguments in commands.items():
        before = snapshot(out, workshop / f"before-command-{name}")
        done = killed.whole(run_command, arguments)
        after = snapshot(out, workshop / f"after-command-{name}")
        expected = results(after)
        chosen = spread(range(len(done)), 8 if name in ("distill", "search") else 4)
        for kill in kills(done, chosen):
            if killed.one(name, run_command, arguments, before, kill):
                killed.resumes(run_command, arguments, expected, kill)
        restore(after, out)
    print(dict(killed.kills))
    assert not killed.failures, "\n".join(killed.failures)
    assert sum(killed.kills.values()) >= 25
