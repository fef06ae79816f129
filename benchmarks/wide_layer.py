"""Repairs one layer of Llama-3.1-8B's shape from its file, solved in full, against the estimate of its memory.

The checkpoint has one layer of random weights in float32 (14,336 neurons, of which 8,960 stay) and a small vocabulary.
The refitted weights are checked against the normal equations of the layer's activations. Run from the repository root;
it takes minutes, 2 GB of disk and 6 GB of memory:

    python benchmarks/wide_layer.py --output benchmarks/results/wide-layer.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron_hf import PrunerConfig, PruningPlan, estimate_importance, make_plan, prune_checkpoint
from minitron_hf.data import TokenRows
from minitron_hf.distillation.stage_memory import stage_memory
from minitron_hf.distillation.stage_workload import Workload
from minitron_hf.files import read_json, versions, write_json
from minitron_hf.pruning.repair_solve import RIDGES
from minitron_hf.pruning.stored_checkpoint import open_checkpoint
from minitron_hf.sizes.student import student_config
from reporting import command, peak_memory, reset_peak_memory, resident_memory

CONFIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=1024,
)
REQUEST = PrunerConfig(intermediate_size=0.625, repair="least_squares")
LOAD = Workload(batch_size=1, max_length=512, dtype=torch.float32, device="cpu", calibration_rows=4)


def main() -> None:
    """Make the checkpoint, repair it in a process of its own, check it, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        repair(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "TQDM_DISABLE": "1"}
        subprocess.run([sys.executable, __file__, "--folder", folder], env=environment, check=True)
        results: dict[str, Any] = {**read_json(Path(folder) / "measured.json"), "error": error(Path(folder))}
    results = {"command": command(arguments), "versions": versions(), **results}
    print(results)
    if arguments.output:
        write_json(arguments.output, results)


def rows() -> TokenRows:
    """Random tokens."""
    tokens = torch.randint(8, CONFIG.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    return TokenRows(tuple(map(tuple, tokens.tolist())), None)


def make(folder: Path) -> None:
    """The teacher of random weights, and a plan."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder / "teacher")
    teacher = open_checkpoint(folder / "teacher")
    make_plan(teacher, REQUEST, estimate_importance(teacher, metric="random")).save_pretrained(folder / "plan")


def repair(folder: Path) -> None:
    """Repair in this process, and write its peak memory beside the estimate."""
    torch.set_num_threads(1)
    plan, before = PruningPlan.from_pretrained(folder / "plan"), resident_memory()
    reset_peak_memory()
    arguments = {"data": rows(), "batch_size": 1, "show_progress": False, "device": "cpu"}
    prune_checkpoint(folder / "teacher", folder / "student", plan, **arguments)
    measured = peak_memory() - before
    parts = stage_memory(CONFIG, student_config(CONFIG, REQUEST), LOAD, stages=["repair, streamed"])
    estimated = parts["repair, streamed"]
    write_json(
        folder / "measured.json", {"measured": measured, "estimated": sum(estimated.values()), "parts": estimated}
    )


def error(folder: Path) -> float:
    """Largest |(XᵀX + λI) Δ − XᵀY W| relative to the largest entry of XᵀY W, in float64, for the λ that was chosen."""
    plan = PruningPlan.from_pretrained(folder / "plan")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    down = teacher.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in rows().rows:
            teacher.model(torch.tensor([row]))
    x, kept = torch.cat(seen).double(), torch.from_numpy(plan.kept["ffn"][0])
    before, after = (model.model.layers[0].mlp.down_proj.weight.detach().double().T for model in (teacher, student))
    change = after - before[kept]
    inputs = x[:, kept]
    missing = x @ before - inputs @ before[kept]
    scale = inputs.square().sum(0).mean()
    wanted = inputs.T @ missing
    gap = inputs.T @ (inputs @ change) - wanted
    return min(float((gap + ridge * scale * change).abs().max() / wanted.abs().max()) for ridge in RIDGES)


if __name__ == "__main__":
    main()
