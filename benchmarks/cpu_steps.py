"""Measures what the memory allocator and `torch_compile` gain in a step of distillation on a CPU under Linux.

By default glibc returns large blocks to the system when they are freed. Every step then gets its activations and
gradients anew, page by page. The settings keep freed blocks and ask for huge pages. Every round runs all settings in
processes of their own. Run from the repository root while nothing else computes:

    python benchmarks/cpu_steps.py --teacher work/teacher --output benchmarks/results/cpu-steps.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from minitron_hf import DistillationConfig, DistillationTrainer, PrunerConfig, load_model, load_tokenizer, prune_model
from minitron_hf.evaluation.speed import device_description
from minitron_hf.files import versions, write_json
from minitron_hf.names import public_name
from reporting import command, peak_memory

VARIABLE = "GLIBC_TUNABLES"
KEPT = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000"
HUGE = f"glibc.malloc.hugetlb=1:{KEPT}:glibc.malloc.top_pad=268435456"
#: Name → value of the variable, and whether layers are compiled.
SETTINGS = {
    "default": ("", False),
    "blocks kept": (KEPT, False),
    "blocks kept, huge pages": (HUGE, False),
    "torch_compile": ("", True),
    "all three": (HUGE, True),
}
#: The steps before which the measurement begins and after which it ends; rows of a step.
FIRST, LAST, ROWS = 2, 8, 4


def main() -> None:
    """Alternate the settings, or, in a process of its own, measure one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.teacher, arguments.length, compiled=SETTINGS[arguments.one][1])))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for index in range(arguments.rounds):
        for name, (value, _) in SETTINGS.items():
            own = [sys.executable, __file__, "--teacher", arguments.teacher, "--one", name]
            own += ["--length", str(arguments.length)]
            shown = subprocess.run(
                own, env={**os.environ, VARIABLE: value}, capture_output=True, text=True, check=True
            )
            rounds[name].append(json.loads(shown.stdout.splitlines()[-1]))
            print(f"round {index + 1}, {name}: {rounds[name][-1]}", flush=True)
    for name, measured in rounds.items():
        ratios = [one["seconds"] / base["seconds"] for one, base in zip(measured, rounds["default"], strict=True)]
        print(f"{name:<24} {statistics.median(ratios):.2f} of the time of a step")
    if arguments.output:
        arguments.teacher = public_name(arguments.teacher)
        head = {
            "command": command(arguments),
            "versions": versions(),
            "device": device_description(torch.device("cpu")),
        }
        write_json(arguments.output, {**head, "settings": SETTINGS, "rounds": rounds})


class Clock(TrainerCallback):
    """Processor seconds of the process at the ends of steps."""

    def __init__(self) -> None:
        self.used: dict[int, tuple[float, float]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        """Read the clocks."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.used[state.global_step] = (used.ru_utime, used.ru_stime)


def measure(name: str, length: int, *, compiled: bool) -> dict[str, float]:
    """Processor seconds of a step, those in the kernel among them, and peak bytes."""
    torch.manual_seed(0)
    teacher, clock = load_model(name), Clock()
    config = teacher.config.get_text_config()
    tokens = torch.randint(config.vocab_size, (LAST * ROWS, length)).tolist()
    student = prune_model(
        load_model(name, dtype="float32"),
        PrunerConfig(num_hidden_layers=round(0.8 * config.num_hidden_layers)),
        calibration_data=tokens[:2],
        max_length=128,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            folder,
            max_steps=LAST,
            max_length=length,
            torch_compile=compiled,
            per_device_train_batch_size=ROWS,
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
        )
        DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": tokens}),
            processing_class=load_tokenizer(name),
            callbacks=[clock],
        ).train()
    (user, kernel), (user_after, kernel_after) = clock.used[FIRST], clock.used[LAST]
    user, kernel = (user_after - user) / (LAST - FIRST), (kernel_after - kernel) / (LAST - FIRST)
    return {"seconds": user + kernel, "kernel_seconds": kernel, "peak_bytes": peak_memory()}


if __name__ == "__main__":
    main()
