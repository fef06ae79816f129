"""Compares two rounds of pruning and distillation with one round, at an equal total number of tokens.

All arms have the same final shape. Their teacher is the original one unless stated otherwise:

- one round: pruned once, distilled on all tokens;
- one round, distilled twice: pruned once, distilled on half of the tokens, then with a restarted schedule on the
  other half. Only the intermediate shape distinguishes it from two rounds;
- two rounds: pruned to the intermediate shape and distilled on half of the tokens; then the student is scored, pruned
  again, and distilled on the other half;
- two rounds, from the previous: the teacher of the second round is the student of the first;
- two rounds, random: units are kept at random in both rounds.

A seed sets the order of the data (another order in the second half) and the units that random pruning keeps. Run from
the repository root, for example:

    python benchmarks/rounds.py --teacher MODEL --train train.jsonl --eval valid.jsonl --between hidden_size=104 \
        --between intermediate_size=280 --prune hidden_size=80 --prune intermediate_size=208 --output results.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from pathlib import Path

import yaml

from losses import distil
from minitron_hf import (
    PrunerConfig,
    apply_plan,
    estimate_importance,
    evaluate_models,
    load_text_dataset,
    load_tokenizer,
    make_plan,
)
from minitron_hf.files import versions, write_json
from minitron_hf.models import count_parameters, load_for_compute
from reporting import command, spread

ARMS = ("one round", "one round, distilled twice", "two rounds", "two rounds, from the previous", "two rounds, random")


def main() -> None:
    """Run all arms and print the table."""
    arguments = parse_arguments()
    teacher = load_for_compute(arguments.teacher)
    tokenizer = load_tokenizer(arguments.teacher)
    train = load_text_dataset(arguments.train)
    held_out = load_text_dataset(arguments.eval).select(range(arguments.eval_documents))
    between, final = (
        PrunerConfig.from_dict(dict(yaml.safe_load(one.replace("=", ": ", 1)).popitem() for one in entries))
        for entries in (arguments.between, arguments.prune)
    )
    results: dict = {
        "command": command(arguments),
        "versions": versions(),
        "num_parameters": {},
        "runs": [],
    }
    results["num_parameters"]["teacher"] = count_parameters(teacher)

    def cut(model, request, *, random: int | None):
        """Score and prune the model: by importance, or at random with this seed."""
        texts = (row["text"] for row in train)
        how = {"metric": "random", "seed": random} if random is not None else {"data": texts}
        scores = estimate_importance(
            model,
            processing_class=tokenizer,
            max_length=arguments.max_length,
            num_rows=1024,
            show_progress=False,
            **how,
        )
        return apply_plan(model, make_plan(model, request, scores)).float()

    def learn(student, source, part: int, order: int):
        """Distil the student on a part of the tokens."""
        tokens = argparse.Namespace(**{**vars(arguments), "tokens": arguments.tokens // part})
        with tempfile.TemporaryDirectory() as folder:
            distil(student, source, train, folder, tokenizer, order, tokens, lr_scheduler_type="cosine")
        gc.collect()
        return student.eval()

    def measure(model) -> dict:
        evaluation = evaluate_models(
            {"teacher": teacher, "model": model},
            held_out,
            processing_class=tokenizer,
            max_length=arguments.max_length,
            speed=False,
            show_progress=False,
        )
        results["teacher"] = evaluation["models"]["teacher"]["metrics"]
        return evaluation["models"]["model"]["metrics"]

    for seed, arm in itertools.product(range(arguments.seeds), ARMS):
        start, after = time.monotonic(), {}
        random = seed if arm.endswith("random") else None
        orders = (2 * seed, 2 * seed + 1)
        if arm == "one round":
            student = learn(cut(teacher, final, random=random), teacher, 1, orders[0])
        else:
            rounds = arm.startswith("two")
            first = cut(teacher, between if rounds else final, random=random)
            first = learn(first, teacher, 2, orders[0])
            after["first half"] = measure(first)
            student = first
            if rounds:
                results["num_parameters"]["between"] = count_parameters(first)
                student = cut(first, final, random=random)
            after["second cut"] = measure(student)
            student = learn(student, first if arm.endswith("previous") else teacher, 2, orders[1])
        after["all tokens"] = measure(student)
        results["num_parameters"]["student"] = count_parameters(student)
        results["runs"].append(
            {"arm": arm, "seed": seed, "after": after, "seconds": round(time.monotonic() - start, 1)}
        )
        found = {when: round(metrics["kl_divergence"]["value"], 4) for when, metrics in after.items()}
        print(arm, seed, found, flush=True)
        if arguments.output:
            write_json(arguments.output, results)
    print(table(results))


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = ["| arm | KL to teacher | bits per byte | top-1 agreement |", "|---|---|---|---|"]
    for arm in ARMS:
        ends = [run["after"]["all tokens"] for run in results["runs"] if run["arm"] == arm]
        metrics = ("kl_divergence", "bits_per_byte", "top1_agreement")
        cells = [spread([end[metric]["value"] for end in ends]) for metric in metrics]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="corpus")
    parser.add_argument("--eval", required=True, help="held-out corpus")
    parser.add_argument("--eval-documents", type=int, default=50)
    parser.add_argument(
        "--between", action="append", required=True, metavar="FIELD=VALUE", help="after the first round"
    )
    parser.add_argument("--prune", action="append", required=True, metavar="FIELD=VALUE", help="in the end")
    parser.add_argument("--tokens", type=int, default=327_680, help="of both rounds together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
