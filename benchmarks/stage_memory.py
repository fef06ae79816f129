"""Peak memory of every stage against `stage_memory` at two widths and two depths, and its estimates for 8B and 70B.

Each shape is measured in a process of its own, in float32 on a CPU, as resident bytes above those before the models.
Distillation is compared with `estimate_capacity`. Run from the repository root, in about six minutes:

    python benchmarks/stage_memory.py --output benchmarks/results/stage-memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    apply_plan,
    cache_teacher_logits,
    estimate_importance,
    evaluate_models,
    make_plan,
    prune_checkpoint,
    repaired_weights,
)
from minitron_hf.data import TokenRows
from minitron_hf.distillation.capacity import estimate_capacity
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.distillation.fake_runs import Setup
from minitron_hf.distillation.gpu_data_sheets import Device
from minitron_hf.distillation.stage_memory import stage_memory
from minitron_hf.distillation.stage_workload import Workload
from minitron_hf.files import versions, write_json
from minitron_hf.pruning.candidates import Candidate, Divergence
from minitron_hf.saving import save_model
from minitron_hf.sizes.student import student_config
from reporting import command, peak_memory, reset_peak_memory, resident_memory

#: Width → layers, measured; a vocabulary that is large beside the width, as in small models.
MEASURED = [(width, depth) for width in (768, 1152) for depth in (4, 8)]
LOAD = Workload(
    batch_size=8, max_length=256, eval_length=512, dtype=torch.float32, device="cpu", num_rows=8, calibration_rows=8
)
#: Distillation of such a batch.
SETUP = Setup(
    device=Device(1e12, type="cpu"),
    batch_size=8,
    max_length=256,
    activation_checkpointing=False,
    accumulates=False,
)
#: Shapes of Llama 3.1, and what the largest matrices of the repair may take there.
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LARGE = {
    "Llama-3.1-8B": LlamaConfig(**LLAMA_8B, num_key_value_heads=8, vocab_size=128256),
    "Llama-3.1-70B": LlamaConfig(**LLAMA_70B, num_key_value_heads=8, vocab_size=128256),
}
#: Stages whose results later ones need.
PREPARING = ("score", "repair", "prune")
REQUEST = PrunerConfig(intermediate_size=0.625, repair="least_squares")
LIMIT = 8e9


def main() -> None:
    """Measure, estimate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--shape", help="measure one shape, such as 768x4, and print bytes by stage")
    parser.add_argument("--stage", action="append", help="with --shape: measure this stage only; may be repeated")
    parser.add_argument("--check", help="measure one shape, and print estimate and measurement by stage")
    arguments = parser.parse_args()
    if arguments.check:
        width, depth = map(int, arguments.check.split("x"))
        rows = compared(width, depth)
        print("\n" + json.dumps({stage: [row["estimated"], row["measured"]] for stage, row in rows.items()}))
        return
    if arguments.shape:
        width, depth = map(int, arguments.shape.split("x"))
        print("\n" + json.dumps(measure(width, depth, arguments.stage)))
        return
    results: dict[str, Any] = {"command": command(arguments), "versions": versions(), "measured": {}, "large": {}}
    for name, config in LARGE.items():
        load, student = Workload(memory_limit=LIMIT), student_of(config)
        results["large"][name] = stage_memory(config, student, load)
        # The inputs of a layer wait in main memory: all of it is counted for a computation on the CPU.
        on_cpu = stage_memory(config, student, replace(load, device="cpu"), stages=["repair, streamed"])
        results["large"][name] |= on_cpu
        for stage, parts in results["large"][name].items():
            described = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in parts.items())
            print(f"{name}, {stage}: {sum(parts.values()) / 1e9:.1f} GB ({described})", flush=True)
    for width, depth in MEASURED:
        name = f"{width} wide, {depth} layers"
        results["measured"][name] = compared(width, depth)
        for stage, row in results["measured"][name].items():
            ratio = row["estimated"] / row["measured"]
            print(f"{name}, {stage}: {row['measured'] / 1e6:.0f} MB, estimated {ratio:.3f} of it", flush=True)
        if arguments.output:
            write_json(arguments.output, results)


def compared(width: int, depth: int) -> dict[str, dict[str, Any]]:
    """Measured and estimated bytes of every stage of a shape."""
    config = teacher_config(width, depth)
    student, found = student_of(config), in_a_process(width, depth)
    estimated = stage_memory(config, student, LOAD)
    estimated["distil"] = dict(estimate_capacity(config, student, SETUP).parts)
    return {
        stage: {"measured": found[stage], "estimated": sum(parts.values()), "parts": parts}
        for stage, parts in estimated.items()
        if stage in found
    }


def teacher_config(width: int, depth: int) -> LlamaConfig:
    """A teacher of a width and depth."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32768,
    )


def student_of(config: LlamaConfig) -> Any:
    """The config of the student."""
    return student_config(config, REQUEST)


def in_a_process(width: int, depth: int) -> dict[str, int]:
    """Measured bytes of every stage of a shape."""
    done = subprocess.run(
        [sys.executable, __file__, "--shape", f"{width}x{depth}"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(width: int, depth: int, only: list[str] | None = None) -> dict[str, int]:
    """Bytes at the peak of every stage, or of some, above those before the models, in this process."""
    torch.set_num_threads(1)
    tiny = teacher_config(96, 2)
    for _, run in stages(tiny, 2):  # whatever is loaded and set up at the first use
        run()
    del run  # and the tiny models that it holds
    _return_freed_memory()
    before, found = resident_memory(), {}
    for name, run in stages(teacher_config(width, depth), LOAD.batch_size):
        if only and name not in (*only, *PREPARING):
            continue
        _return_freed_memory()
        reset_peak_memory()
        run()
        found[name] = peak_memory() - before
        print(f"{name}: {found[name]:,}", file=sys.stderr, flush=True)
    return found


def stages(config: LlamaConfig, num_rows: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The stages in turn, with their models."""
    torch.manual_seed(0)
    models = {"teacher": AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()}
    tokens = torch.randint(8, config.vocab_size, (num_rows, LOAD.max_length))
    rows = TokenRows(tuple(map(tuple, tokens.tolist())), None)
    quiet = {"batch_size": LOAD.batch_size, "show_progress": False}
    depth = {"metric": "random", "depth_metric": "perplexity", "block_length": 1}
    made: dict[str, Any] = {}

    def keep(name: str, run: Callable[[], Any]) -> Callable[[], None]:
        return lambda: made.update({name: run()})

    with tempfile.TemporaryDirectory() as folder:
        yield "score", keep("scores", lambda: estimate_importance(models["teacher"], rows, **quiet))
        yield "score by Taylor", lambda: estimate_importance(models["teacher"], rows, metric="taylor", **quiet)
        yield "score depth", lambda: estimate_importance(models["teacher"], rows, **depth, **quiet)
        plan = make_plan(models["teacher"], REQUEST, made["scores"])
        plain = make_plan(models["teacher"], PrunerConfig(intermediate_size=0.625), made["scores"])
        yield (
            "repair",
            keep("repaired", lambda: repaired_weights(models["teacher"], plan, rows, batch_size=LOAD.batch_size)),
        )
        yield (
            "prune, repaired",
            keep("student", lambda: apply_plan(models["teacher"], plan, repaired=made["repaired"])),
        )
        made.clear()
        yield "cache", lambda: _cache(models["teacher"], tokens, f"{folder}/cache")
        yield "prune", keep("student", lambda: apply_plan(models["teacher"], plain))
        models["student"] = made["student"]
        yield "compare shapes", lambda: Divergence(models["teacher"], rows)(models["student"], Candidate(REQUEST, 1))
        long = torch.randint(8, config.vocab_size, (8, LOAD.eval_length))
        long_rows = TokenRows(tuple(map(tuple, long.tolist())), None)
        yield "evaluate", lambda: evaluate_models(models, long_rows, speed=False, **quiet)
        yield "distil", lambda: _distil(models, tokens, f"{folder}/distilled")
        save_model(models["teacher"], f"{folder}/teacher")
        del models["teacher"]
        yield "save", lambda: save_model(models["student"], f"{folder}/student")
        models.clear()
        made.clear()
        yield (
            "prune, streamed",
            lambda: prune_checkpoint(f"{folder}/teacher", f"{folder}/streamed", plain, show_progress=False),
        )
        repair = {"data": rows, "batch_size": LOAD.batch_size, "show_progress": False, "overwrite": True}
        yield "repair, streamed", lambda: prune_checkpoint(f"{folder}/teacher", f"{folder}/streamed", plan, **repair)
        for name, method in (("correct", "full"), ("correct by LoRA", "lora")):
            yield name, lambda method=method: _correct(f"{folder}/teacher", tokens, f"{folder}/{method}", method)


def _cache(teacher: Any, tokens: torch.Tensor, folder: str) -> None:
    args = DistillationConfig(folder, per_device_eval_batch_size=LOAD.batch_size, **_training())
    corpus, settings = _corpus(tokens), {"args": args, "processing_class": _tokenizer(), "top_k": LOAD.top_k}
    cache_teacher_logits(teacher, corpus, folder, **settings)


def _distil(models: dict[str, Any], tokens: torch.Tensor, folder: str) -> None:
    arguments = {"per_device_train_batch_size": LOAD.batch_size, "max_steps": 3, "save_strategy": "no"}
    DistillationTrainer(
        models["student"].train(),
        models["teacher"],
        args=DistillationConfig(folder, activation_checkpointing=False, **arguments, **_training()),
        train_dataset=_corpus(tokens),
        processing_class=_tokenizer(),
    ).train()


def _correct(teacher: str, tokens: torch.Tensor, folder: str, method: Any) -> None:
    correct_teacher(
        teacher,
        _corpus(tokens),
        folder,
        original_learning_rate=1e-3,
        num_tokens=3 * LOAD.batch_size * LOAD.max_length,
        method=method,
        processing_class=_tokenizer(),
        per_device_train_batch_size=LOAD.batch_size,
        packing=False,
        save_strategy="no",
        **_training(),
    )


def _training() -> dict[str, Any]:
    return {
        "max_length": LOAD.max_length, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def _corpus(tokens: torch.Tensor) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": tokens.tolist()})


def _tokenizer() -> Any:
    """A tokenizer, which the trainer asks for; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _return_freed_memory() -> None:
    """Give freed memory back to the system, which glibc keeps (Linux)."""
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
