"""Compares distillation from teacher caches with online distillation: quality, size and time.

Arms: online; a cache of the k most likely tokens with one more outcome for all others ("tail"); with `--no-tail` the
same k tokens with probabilities that sum to 1; a cache of D draws. All arms start from the same pruned student and
train on the same rows; a seed sets their order. The difference from online is paired by seed, with its 95 % interval
(Student's t). The script also measures bytes per token, CPU seconds and elapsed seconds per step (median, with data
loading), and CPU seconds to write a cache. Run from the repository root, for example:

    python benchmarks/teacher_cache.py --teacher MODEL --train train.jsonl --eval valid.jsonl --output results.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    TeacherCache,
    apply_plan,
    cache_teacher_logits,
    estimate_importance,
    evaluate_models,
    load_teacher_cache,
    load_text_dataset,
    load_tokenizer,
    make_plan,
)
from minitron_hf.files import versions, write_json
from minitron_hf.models import count_parameters, load_for_compute
from real.intervals import t_quantile
from reporting import command, spread

METRICS = ("kl_divergence", "bits_per_byte", "top1_agreement")


def main() -> None:
    """Write the caches, run all arms, print the table."""
    arguments = parse_arguments()
    teacher, tokenizer = load_for_compute(arguments.teacher), load_tokenizer(arguments.teacher)
    train = load_text_dataset(arguments.train).select(range(arguments.documents))
    held_out = load_text_dataset(arguments.eval).select(range(arguments.eval_documents))
    length = arguments.max_length
    scores = estimate_importance(
        teacher, (row["text"] for row in train), processing_class=tokenizer, num_rows=512, max_length=length
    )
    plan = make_plan(teacher, PrunerConfig(hidden_size=0.75, intermediate_size=0.65), scores)
    results: dict = {
        "command": command(arguments, together=("top_k", "num_draws")),
        "versions": versions(),
        "teacher": {"num_parameters": count_parameters(teacher), "vocab_size": teacher.config.vocab_size},
        "student": {"num_parameters": plan.student["num_parameters"]},
        "caches": {},
        "runs": [],
    }

    def settings(folder: str | Path, seed: int = 0) -> DistillationConfig:
        return DistillationConfig(
            str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            warmup_steps=0.05,
            max_length=length,
            packing=True,
            packing_strategy="wrapped",
            seed=seed,
            save_strategy="no",
            logging_steps=0.1,
            report_to="none",
            disable_tqdm=True,
        )

    with tempfile.TemporaryDirectory() as work:
        arms: dict = {"online": train}
        stored: dict = {f"k={k}": {"top_k": k} for k in arguments.top_k}
        stored |= {f"k={k}, packed": {"top_k": k, "dtype": "fixed12"} for k in arguments.top_k if arguments.packed}
        stored |= {f"D={d}": {"num_draws": d} for d in arguments.num_draws}
        for name, how in stored.items():
            folder, start = Path(work) / name, time.process_time()
            cache_teacher_logits(teacher, train, folder, **how, args=settings(folder), processing_class=tokenizer)
            cache = load_teacher_cache(folder)
            results["caches"][name] = {
                "bytes_per_token": cache.manifest["num_bytes"] / cache.manifest["num_tokens"],
                "num_tokens": cache.manifest["num_tokens"],
                "cpu_seconds": time.process_time() - start,
            }
            arms[name] = cache
            if "top_k" in how and "dtype" not in how:
                results["caches"][name]["mean_tail_probability"] = mean_tail(cache)
                if arguments.no_tail:
                    arms[f"{name}, no tail"] = without_tail(cache)
            print(name, results["caches"][name], flush=True)
        for seed in range(arguments.seeds):
            for arm, rows in arms.items():
                clock, student = Clock(), apply_plan(teacher, plan).float()
                trainer = DistillationTrainer(
                    student,
                    teacher if arm == "online" else None,
                    settings(Path(work) / "run", seed),
                    train_dataset=rows,
                    processing_class=tokenizer,
                    callbacks=[clock],
                )
                trainer.train()
                evaluation = evaluate_models(
                    {"teacher": teacher, "student": student.eval()},
                    held_out,
                    processing_class=tokenizer,
                    max_length=length,
                    speed=False,
                    show_progress=False,
                )["models"]
                results["teacher"]["metrics"] = evaluation["teacher"]["metrics"]
                found = {name: evaluation["student"]["metrics"][name] for name in METRICS}
                results["runs"].append(
                    {"arm": arm, "seed": seed, "steps": trainer.state.global_step, **found, **clock.medians()}
                )
                print(arm, seed, {name: round(value["value"], 4) for name, value in found.items()}, flush=True)
                del trainer, student
                gc.collect()
                if arguments.output:
                    write_json(arguments.output, results)
    print(table(results))


class Clock(TrainerCallback):
    """CPU seconds and elapsed seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Record the times at the end of a step."""
        self.times.append((time.process_time(), time.perf_counter()))

    def medians(self) -> dict[str, float]:
        """Medians over all steps but the first."""
        cpu, elapsed = np.median(np.diff(np.array(self.times), axis=0), axis=0).tolist()
        return {"cpu_seconds_per_step": cpu, "seconds_per_step": elapsed}


def without_tail(cache: TeacherCache) -> TeacherCache:
    """The cache without the tail: k tokens with probabilities that sum to 1."""
    top_k = cache.manifest["settings"]["top_k"]

    def renormalised(row: dict) -> dict:
        log_probs = row["teacher_log_probs"].reshape(-1, top_k).astype(np.float32)
        log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        return {
            "teacher_log_probs": log_probs.reshape(-1).astype(np.float16),
            "teacher_log_tail": np.full(len(log_probs), -np.inf, dtype=np.float16),
        }

    rows = cache.dataset.map(renormalised, features=cache.dataset.features, keep_in_memory=True)
    return replace(cache, dataset=rows)


def mean_tail(cache: TeacherCache) -> float:
    """Mean probability of all other tokens."""
    return float(np.mean(np.concatenate([np.exp(row) for row in cache.dataset["teacher_log_tail"]])))


def paired_interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval by Student's t; infinite for one seed."""
    if len(differences) < 2:
        return differences[0], float("inf")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), t_quantile(0.975, len(differences) - 1) * error


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds, and the difference from online of the same seed, of online's."""
    runs = results["runs"]
    online = {run["seed"]: run for run in runs if run["arm"] == "online"}
    lines = [
        f"| arm ({len(online)} seeds) | bytes per token | KL to teacher | more than online | bits per byte "
        "| CPU seconds per step |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        kl = [run["kl_divergence"]["value"] for run in mine]
        more = [value - online[run["seed"]]["kl_divergence"]["value"] for value, run in zip(kl, mine, strict=True)]
        size = "–"
        if arm != "online":
            size = f"{results['caches'][arm.removesuffix(', no tail')]['bytes_per_token']:.0f}"
        bits = [run["bits_per_byte"]["value"] for run in mine]
        step = statistics.median(run["cpu_seconds_per_step"] for run in mine)
        difference = "–"
        if arm != "online":
            mean, half = paired_interval(more)
            reference = statistics.mean(run["kl_divergence"]["value"] for run in online.values())
            difference = f"{100 * mean / reference:+.2f} % ± {100 * half / reference:.2f} %"
        lines.append(f"| {arm} | {size} | {spread(kl)} | {difference} | {spread(bits)} | {step:.3f} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="corpus")
    parser.add_argument("--eval", required=True, help="held-out corpus")
    parser.add_argument("--documents", type=int, default=1000, help="of the corpus, in one epoch")
    parser.add_argument("--eval-documents", type=int, default=100)
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--num-draws", type=int, nargs="*", default=[12, 25, 50])
    parser.add_argument("--packed", action="store_true", help="also the top k in 12 bits")
    parser.add_argument("--no-tail", action="store_true", help="also the top k without the other tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
