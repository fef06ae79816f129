"""Compares importance pruning and distillation with controls, at an equal number of tokens.

Arms: importance pruning + KD; random pruning + KD; random initialisation + KD; importance pruning + cross-entropy.
These are the four controls of Sreenivas et al. 2024 (arXiv 2408.11796). A seed sets the order of the data, the units
that random pruning keeps, and the random initialisation. Run from the repository root, for example:

    python benchmarks/controls.py --teacher MODEL --train train.jsonl --eval valid.jsonl \
        --prune hidden_size=0.75 --prune intermediate_size=0.65 --tokens 2000000 --seeds 3 --output results.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from pathlib import Path
from typing import get_args

import torch
import yaml
from transformers import AutoModelForCausalLM, set_seed

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    apply_plan,
    estimate_importance,
    evaluate_models,
    iterate_importance,
    load_text_dataset,
    load_tokenizer,
    make_plan,
)
from minitron_hf.files import versions, write_json
from minitron_hf.models import count_parameters, load_for_compute
from minitron_hf.scoring.metrics import metric_names
from minitron_hf.scoring.reductions import Reduction
from reporting import command, spread

ARMS = ("importance + KD", "random + KD", "random init + KD", "importance + CE")


def main() -> None:
    """Run all arms and print the table."""
    arguments = parse_arguments()
    teacher = load_for_compute(arguments.teacher)
    tokenizer = load_tokenizer(arguments.teacher)
    train = load_text_dataset(arguments.train)
    held_out = load_text_dataset(arguments.eval).select(range(arguments.eval_documents))
    request = PrunerConfig.from_dict(dict(yaml.safe_load(p.replace("=", ": ", 1)).popitem() for p in arguments.prune))
    length = arguments.max_length
    scores = iterate_importance(
        teacher,
        request,
        [row["text"] for row in train.select(range(min(len(train), 1024)))],
        iterations=arguments.iterations,
        processing_class=tokenizer,
        max_length=length,
        num_rows=1024,
        metric=arguments.metric,
        depth_metric=arguments.depth_metric,
        sequence_reduction=arguments.sequence_reduction,
    )
    plan = make_plan(teacher, request, scores)
    results: dict = {
        "command": command(arguments),
        "teacher": {"num_parameters": count_parameters(teacher)},
        "student": {key: value for key, value in plan.student.items() if key != "config"},
        "sizes": plan.sizes,
        "layers_dropped": plan.layers_dropped,
        "versions": versions(),
        "runs": [],
    }

    def measure(model, reference=teacher) -> dict:
        evaluation = evaluate_models(
            {"teacher": reference, "model": model},
            held_out,
            processing_class=tokenizer,
            max_length=length,
            speed=False,
            show_progress=False,
        )
        results["teacher"]["metrics"] = evaluation["models"]["teacher"]["metrics"]
        return evaluation["models"]["model"]["metrics"]

    for seed, arm in itertools.product(range(arguments.seeds), arguments.arms or ARMS):
        set_seed(seed)
        if arm.startswith("importance"):
            student = apply_plan(teacher, plan)
        elif arm.startswith("random +"):
            random = estimate_importance(teacher, metric="random", seed=seed)
            student = apply_plan(teacher, make_plan(teacher, request, random))
        else:
            student = AutoModelForCausalLM.from_config(plan.build_student_config(), dtype=torch.float32)
        before = measure(student)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            trainer = DistillationTrainer(
                model=student.float(),
                teacher_model=teacher,
                args=DistillationConfig(
                    folder,
                    max_steps=arguments.tokens // (arguments.batch_size * length),
                    per_device_train_batch_size=arguments.batch_size,
                    learning_rate=arguments.learning_rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=0.05,
                    max_length=length,
                    packing=True,
                    packing_strategy="wrapped",
                    shuffle_dataset=True,
                    seed=seed,
                    kd_weight=0.0 if arm.endswith("CE") else 1.0,
                    ce_weight=1.0 if arm.endswith("CE") else 0.0,
                    save_strategy="no",
                    logging_steps=0.1,
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=train,
                processing_class=tokenizer,
            )
            trainer.train()
        after = measure(student.eval())
        results["runs"].append(
            {"arm": arm, "seed": seed, "before": before, "after": after, "seconds": round(time.monotonic() - start, 1)}
        )
        print(arm, seed, {key: round(value["value"], 4) for key, value in after.items() if value}, flush=True)
        del trainer, student
        gc.collect()
        if arguments.output:
            write_json(arguments.output, results)
    print(table(results))


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    seeds = len({run["seed"] for run in results["runs"]})
    lines = [
        f"| arm ({seeds} seeds) | KL before | KL after | bits per byte before | bits per byte after | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["arm"] == arm]
        cells = [
            spread([run[when][metric]["value"] for run in runs])
            for when, metric in (
                ("before", "kl_divergence"),
                ("after", "kl_divergence"),
                ("before", "bits_per_byte"),
                ("after", "bits_per_byte"),
                ("after", "top1_agreement"),
            )
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    metrics = results["teacher"]["metrics"]["bits_per_byte"]
    lines.append(f"| teacher | – | – | – | {metrics['value']:.4f} | 1 |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="corpus")
    parser.add_argument("--eval", required=True, help="held-out corpus")
    parser.add_argument("--eval-documents", type=int, default=200)
    parser.add_argument("--prune", action="append", required=True, metavar="FIELD=VALUE", help="of PrunerConfig")
    parser.add_argument("--metric", choices=metric_names(), default="activation", help="of estimate_importance")
    parser.add_argument("--depth-metric", choices=("perplexity", "logit_nmse"), help="of estimate_importance")
    parser.add_argument(
        "--sequence-reduction", choices=get_args(Reduction), default="mean", help="of estimate_importance"
    )
    parser.add_argument("--iterations", type=int, default=1, help="rounds of scoring")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--arms", action="append", choices=ARMS, help="only these arms")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
