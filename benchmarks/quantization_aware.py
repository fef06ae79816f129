"""Compares distillation with and without rounded weights, by the quantised copies of the students.

Arms: plain distillation, and `fake_quantization` int8 and int4. All start from the same pruned student and train on
the same rows; a seed sets their order. Each student is measured as it was saved, and as int8 and int4 copies. Run from
the repository root:

    python benchmarks/quantization_aware.py --teacher MODEL --train train.jsonl --eval valid.jsonl --output out.json
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    apply_plan,
    estimate_importance,
    evaluate_models,
    load_text_dataset,
    load_tokenizer,
    make_plan,
    quantize_checkpoint,
)
from minitron_hf.files import versions, write_json
from minitron_hf.models import count_parameters, load_for_compute
from reporting import command
from teacher_cache import paired_interval

ARMS = (None, "int8", "int4")
COPIES = ("int8", "int4")


def main() -> None:
    """Run all arms and print the table."""
    arguments = parse_arguments()
    teacher, tokenizer = load_for_compute(arguments.teacher), load_tokenizer(arguments.teacher)
    train = load_text_dataset(arguments.train).select(range(arguments.documents))
    held_out = load_text_dataset(arguments.eval).select(range(arguments.eval_documents))
    scores = estimate_importance(
        teacher, train, processing_class=tokenizer, num_rows=512, max_length=arguments.max_length
    )
    plan = make_plan(teacher, PrunerConfig(intermediate_size=arguments.intermediate_size, multiple_of=1), scores)
    results: dict[str, Any] = {
        "command": command(arguments),
        "versions": versions(),
        "student": {"num_parameters": plan.student["num_parameters"]},
        "teacher": {"num_parameters": count_parameters(teacher)},
        "runs": [],
    }
    for seed in range(arguments.seeds):
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as work:
                student = apply_plan(teacher, plan).float()
                args = DistillationConfig(
                    f"{work}/run",
                    num_train_epochs=1,
                    per_device_train_batch_size=arguments.batch_size,
                    learning_rate=arguments.learning_rate,
                    warmup_steps=0.05,
                    max_length=arguments.max_length,
                    packing=True,
                    packing_strategy="wrapped",
                    fake_quantization=arm,
                    seed=seed,
                    save_strategy="no",
                    logging_steps=0.1,
                    report_to="none",
                    disable_tqdm=True,
                )
                trainer = DistillationTrainer(student, teacher, args, train_dataset=train, processing_class=tokenizer)
                trainer.train()
                trainer.save_student(f"{work}/student")
                models: dict[str, Any] = {"teacher": teacher, "as saved": f"{work}/student"}
                for copy in COPIES:
                    models[copy] = str(quantize_checkpoint(f"{work}/student", f"{work}/{copy}", copy, device="cpu"))
                found = evaluate_models(
                    models, held_out, processing_class=tokenizer, max_length=arguments.max_length, speed=False,
                    show_progress=False,
                )["models"]  # fmt: skip
                run = {"arm": arm, "seed": seed, "steps": trainer.state.global_step}
                run["kl_divergence"] = {
                    name: found[name]["metrics"]["kl_divergence"] for name in models if name != "teacher"
                }
                results["runs"].append(run)
                del trainer, student
                gc.collect()
            print(arm, seed, {name: round(one["value"], 4) for name, one in run["kl_divergence"].items()}, flush=True)
            if arguments.output:
                write_json(arguments.output, results)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: mean KL over seeds, and the paired difference from plain distillation with its 95 % interval."""
    runs = results["runs"]
    measured = ("as saved", *COPIES)
    lines = [
        "| distilled with | " + " | ".join(f"KL, {name} | difference" for name in measured) + " |",
        "|---|" + "---|---|" * len(measured),
    ]
    for arm in ARMS:
        cells = ["plain weights" if arm is None else f"fake_quantization {arm}"]
        for name in measured:
            plain, own = (
                [run["kl_divergence"][name]["value"] for run in runs if run["arm"] == which] for which in (None, arm)
            )
            mean, half = paired_interval([b - a for a, b in zip(plain, own, strict=False)])
            cells += [f"{sum(own) / len(own):.4f}", "–" if arm is None else f"{mean:+.4f} ± {half:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--intermediate-size", type=int, default=192)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--eval-documents", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
