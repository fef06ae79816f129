"""Measures memory and time of pruning a large checkpoint from disk to disk.

The script makes a checkpoint with the shape of Llama-3.1-8B (16 GB of synthetic bfloat16 weights) and prunes it to
the published 4B width and depth shapes. It reports the peak memory, and the wall time compared with a plain copy. The
copy reads and writes the same number of bytes in pieces of the same size, and syncs its file in the same way. Pruning
and copying alternate, each in its own process, and the teacher is removed from the page cache before each. Run from
the repository root; it needs 26 GB of disk:

    python benchmarks/streaming.py --work /tmp/streaming --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reporting import peak_memory

#: name → (sizes asked for, published number of parameters).
SHAPES = {
    "width": ({"hidden_size": 3072, "intermediate_size": 9216}, 4_512_746_496),
    "depth": ({"num_hidden_layers": 16}, 4_540_469_248),
}


def main() -> None:
    """Make the teacher, then let pruning and copying take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; removed afterwards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", nargs=2, metavar=("NAME", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, shape = arguments.step
        print(json.dumps({"make": make, "prune": prune, "copy": copy}[name](arguments.work, shape)))
        return

    from minitron_hf.files import versions, write_json

    arguments.work.mkdir(parents=True)
    try:
        made = step("make", "-", arguments.work)
        results: dict = {
            "versions": versions(),
            "cpus": os.cpu_count(),
            "teacher": made,
            "shapes": {name: {"rounds": []} for name in SHAPES},
        }
        for number in range(arguments.rounds):
            for shape, values in results["shapes"].items():
                # The first pruning gives the number of bytes to copy. Later, copy and pruning take turns to go first.
                order = ["prune", "copy"] if number % 2 == 0 else ["copy", "prune"]
                values["rounds"].append({name: step(name, shape, arguments.work) for name in order})
                print(f"{shape}, round {number + 1}: {values['rounds'][-1]}", flush=True)
        for shape, values in results["shapes"].items():
            prunings = [entry["prune"] for entry in values["rounds"]]
            ratios = [entry["prune"]["seconds"] / entry["copy"]["seconds"] for entry in values["rounds"]]
            values["peak_memory_bytes"] = max(pruning["peak_memory_bytes"] for pruning in prunings)
            values["seconds"] = statistics.median(pruning["seconds"] for pruning in prunings)
            values["copy_seconds"] = statistics.median(entry["copy"]["seconds"] for entry in values["rounds"])
            values["ratio"] = statistics.median(ratios)
            print(
                f"{shape}: peak {values['peak_memory_bytes'] / 2**30:.2f} GiB, {values['seconds']:.0f} s, "
                f"{values['ratio']:.2f} × a copy ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        if arguments.output:
            write_json(arguments.output, results)
    finally:
        shutil.rmtree(arguments.work, ignore_errors=True)


def step(name: str, shape: str, work: Path) -> dict:
    """Run one step in a new process, after the teacher was removed from the page cache."""
    for path in (work / "teacher").glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--work", str(work), "--step", name, shape]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(work / "student", ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def make(work: Path, _: str) -> dict:
    """A teacher of synthetic weights in shards, a tokenizer-less stock checkpoint, and a plan for each student."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from minitron_hf import PrunerConfig, estimate_importance, make_plan
    from minitron_hf.models import empty_model
    from minitron_hf.pruning.stored_checkpoint import open_checkpoint

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    folder = work / "teacher"
    config.save_pretrained(folder)
    state = empty_model(config).to(torch.bfloat16).state_dict()
    shards = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def values(number: int, shape: torch.Size) -> torch.Tensor:
        """Different numbers in every tensor."""
        size = math.prod(shape)
        return pool.roll(number * 7919).repeat(-(-size // len(pool)))[:size].reshape(shape)

    for name, names in shards.filename_to_tensors.items():
        tensors = {key: values(number, state[key].shape) for number, key in enumerate(names)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    teacher = open_checkpoint(folder)
    scores = estimate_importance(teacher, metric="random", seed=0)
    for shape, (sizes, _) in SHAPES.items():
        plan = make_plan(teacher, PrunerConfig(**sizes), scores)
        assert plan.teacher["digest"]
        plan.save_pretrained(work / shape)
    return {
        "num_parameters": sum(tensor.numel() for tensor in state.values()),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "files": len(shards.filename_to_tensors),
    }


def prune(work: Path, shape: str) -> dict:
    """Prune; this includes the comparison of the weights with the plan's digest."""
    from minitron_hf import PruningPlan, prune_checkpoint

    plan = PruningPlan.from_pretrained(work / shape)
    before, start = transferred(), time.perf_counter()
    prune_checkpoint(work / "teacher", work / "student", plan, show_progress=False)
    seconds, after = time.perf_counter() - start, transferred()
    traffic = {key: after[key] - before[key] for key in after}
    (work / f"{shape}.json").write_text(json.dumps(traffic))
    peak = peak_memory()
    check(work, shape, plan)
    return {"seconds": seconds, "peak_memory_bytes": peak, **traffic}


def check(work: Path, shape: str, plan) -> None:
    """Check the number of parameters against the published one, and one matrix against a computation by hand."""
    import torch
    from safetensors import safe_open

    def read(folder: Path, name: str) -> torch.Tensor:
        for path in folder.glob("*.safetensors"):
            if path.name.startswith("model"):
                with safe_open(path, "pt") as file:
                    if name in file.keys():  # noqa: SIM118 (not a mapping)
                        return file.get_tensor(name)
        raise KeyError(name)

    with safe_open(work / "student" / "model.safetensors", "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert sum(sizes) == SHAPES[shape][1], sum(sizes)
    made = read(work / "student", "model.layers.9.mlp.down_proj.weight")
    expected = read(work / "teacher", f"model.layers.{plan.layers_kept[9]}.mlp.down_proj.weight")
    if shape == "width":
        expected = expected[torch.from_numpy(plan.kept["hidden"])][:, torch.from_numpy(plan.kept["ffn"][9])]
    assert torch.equal(made, expected)


def copy(work: Path, shape: str) -> dict:
    """Read and write as many bytes as the pruning did."""
    traffic = json.loads((work / f"{shape}.json").read_text())
    to_read, to_write = traffic["bytes_read"], traffic["bytes_written"]
    files = itertools.cycle(sorted((work / "teacher").glob("*.safetensors")))
    buffer = memoryview(bytearray(32 << 20))
    (work / "student").mkdir()
    start = time.perf_counter()
    source = next(files).open("rb", buffering=0)
    with (work / "student" / "copy").open("wb", buffering=0) as target:
        while to_read > 0 or to_write > 0:
            count = source.readinto(buffer[: min(len(buffer), to_read)]) if to_read > 0 else 0
            to_read -= count
            if not count and to_read > 0:
                source.close()
                source = next(files).open("rb", buffering=0)
            to_write -= target.write(buffer[: min(len(buffer), to_write)])
        os.fsync(target.fileno())
    source.close()
    return {"seconds": time.perf_counter() - start, **traffic}


def transferred() -> dict:
    """Bytes that this process has read and written so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    found = dict(line.split(": ") for line in lines)
    return {"bytes_read": int(found["rchar"]), "bytes_written": int(found["wchar"])}


if __name__ == "__main__":
    main()
