"""Compares distillation losses and corrected teachers on the same pruned student, at an equal number of tokens.

Arms: each divergence alone; KL with cross-entropy; KL with hidden states, and also with embeddings (Muralidharan et
al. 2024, arXiv 2407.14679, tables 15 and 17). With `--original-learning-rate`, the arms are teachers instead:
unchanged, corrected before distillation, and corrected during distillation (Sreenivas et al. 2024, arXiv 2408.11796,
§2.1). A seed sets the order of the data. Run from the repository root, for example:

    python benchmarks/losses.py --teacher MODEL --train train.jsonl --eval valid.jsonl \
        --prune num_hidden_layers=3 --tokens 100000 --seeds 2 --output results.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import set_seed

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    apply_plan,
    correct_teacher,
    estimate_importance,
    evaluate_models,
    load_model,
    load_text_dataset,
    load_tokenizer,
    make_plan,
)
from minitron_hf.files import versions, write_json
from reporting import command, spread

LOSSES: dict[str, dict] = {
    "forward KL": {},
    "reverse KL": {"divergence": "reverse_kl"},
    "Jensen-Shannon": {"divergence": "jsd"},
    "total variation": {"divergence": "tv"},
    "MSE of logits": {"divergence": "mse"},
    "cosine of logits": {"divergence": "cosine"},
    "KL + CE": {"ce_weight": 1.0},
    "KL + states": {"hidden_loss": "cosine"},
    "KL + states + embeddings": {"hidden_loss": "cosine", "embedding_loss": "cosine"},
}
CORRECTIONS = ("corrected before", "corrected meanwhile")
METRICS = ("loss", "bits_per_byte", "kl_divergence", "top1_agreement")


def main() -> None:
    """Run all arms and print the table."""
    arguments = parse_arguments()
    teacher = load_model(arguments.teacher, dtype=torch.float32)
    tokenizer = load_tokenizer(arguments.teacher)
    train = load_text_dataset(arguments.train)
    if arguments.eval is None:
        held_out = train.select(range(len(train) - arguments.eval_documents, len(train)))
        train = train.select(range(len(train) - arguments.eval_documents))
    else:
        held_out = load_text_dataset(arguments.eval)
        held_out = held_out.select(range(min(arguments.eval_documents, len(held_out))))
    request = PrunerConfig.from_dict(dict(yaml.safe_load(p.replace("=", ": ", 1)).popitem() for p in arguments.prune))
    length = arguments.max_length
    scores = estimate_importance(
        teacher, (row["text"] for row in train), processing_class=tokenizer, num_rows=1024, max_length=length
    )
    plan = make_plan(teacher, request, scores)
    results: dict = {
        "command": command(arguments),
        "student": {key: value for key, value in plan.student.items() if key != "config"},
        "sizes": plan.sizes,
        "layers_dropped": plan.layers_dropped,
        "versions": versions(),
        "runs": [],
    }

    def measure(model, reference) -> dict:
        found = evaluate_models(
            {"teacher": reference, "model": model},
            held_out,
            processing_class=tokenizer,
            max_length=length,
            speed=False,
            show_progress=False,
        )["models"]
        results["teacher"] = found["teacher"]["metrics"]
        return {name: found["model"]["metrics"][name] for name in METRICS}

    corrected = {}
    arms = list(LOSSES) if not arguments.original_learning_rate else ["forward KL", *CORRECTIONS]
    for seed, arm in itertools.product(range(arguments.seeds), arguments.arms or arms):
        set_seed(seed)
        student, learned = apply_plan(teacher, plan).float(), copy.deepcopy(teacher)
        before = measure(student, teacher)
        changes = dict(LOSSES.get(arm, {}))
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if arm == "corrected meanwhile":
                changes |= {
                    "teacher_correction": "concurrent",
                    "teacher_original_learning_rate": arguments.original_learning_rate,
                }
            if arm == "corrected before":
                corrected.setdefault(seed, correct_teacher(
                    copy.deepcopy(teacher), train, f"{folder}/teacher", processing_class=tokenizer, seed=seed,
                    original_learning_rate=arguments.original_learning_rate, num_tokens=arguments.tokens,
                    max_length=length, per_device_train_batch_size=arguments.batch_size, disable_tqdm=True,
                    save_strategy="no",
                ))  # fmt: skip
                learned = load_model(corrected[seed], dtype=torch.float32)
            distil(student, learned, train, folder, tokenizer, seed, arguments, **changes)
        run = {"arm": arm, "seed": seed, "before": before, "after": measure(student.eval(), teacher)}
        run["learned_teacher"] = measure(learned.eval(), teacher)
        results["runs"].append({**run, "seconds": round(time.monotonic() - start, 1)})
        print(arm, seed, {name: round(value["value"], 4) for name, value in run["after"].items()}, flush=True)
        del student, learned
        gc.collect()
        if arguments.output:
            write_json(arguments.output, results)
    print(table(results))


def distil(student, teacher, train, folder, tokenizer, seed: int, arguments: argparse.Namespace, **changes) -> None:
    """Train a student in place, with the settings that all arms share; a seed decides the order of the data."""
    rows = arguments.batch_size * arguments.max_length
    DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            f"{folder}/student",
            max_steps=arguments.tokens // rows,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            warmup_steps=0.05,
            max_length=arguments.max_length,
            packing=True,
            packing_strategy="wrapped",
            shuffle_dataset=True,
            seed=seed,
            save_strategy="no",
            logging_steps=0.25,
            report_to="none",
            disable_tqdm=True,
            **changes,
        ),
        train_dataset=train,
        processing_class=tokenizer,
    ).train()


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    seeds = len({run["seed"] for run in results["runs"]})
    lines = [
        f"| loss ({seeds} seeds) | loss per token | bits per byte | KL to teacher | agreement | its teacher's loss |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["arm"] == arm]
        cells = [spread([run["after"][name]["value"] for run in runs]) for name in METRICS]
        cells.append(spread([run["learned_teacher"]["loss"]["value"] for run in runs]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="corpus")
    parser.add_argument("--eval", help="held-out corpus; default: the last documents of the other one, left out there")
    parser.add_argument("--eval-documents", type=int, default=200)
    parser.add_argument("--prune", action="append", required=True, metavar="FIELD=VALUE", help="of PrunerConfig")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--original-learning-rate", type=float, help="of the teacher; compares corrections instead")
    parser.add_argument("--arms", action="append", choices=[*LOSSES, *CORRECTIONS], help="only these arms")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
