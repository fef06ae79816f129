"""Compares importance metrics by the loss of pruned students before any retraining. The control is random pruning.

Each metric is scored once, and each request is pruned by its scores. `--seeds` is the number of random prunings.
`--vary reduction` compares the nine reductions over tokens and rows instead (Muralidharan et al. 2024, arXiv
2407.14679, table 13). `--vary iterations` compares one, two and four rounds of scoring. Run from the repository root,
for example:

    python benchmarks/metrics.py --teacher MODEL --train train.jsonl --eval valid.jsonl --output results.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import get_args

import yaml

from minitron_hf import (
    PrunerConfig,
    apply_plan,
    estimate_importance,
    evaluate_models,
    iterate_importance,
    load_text_dataset,
    load_tokenizer,
    make_plan,
)
from minitron_hf.data import token_rows
from minitron_hf.files import versions, write_json
from minitron_hf.models import load_for_compute
from minitron_hf.names import public_name
from minitron_hf.scoring.metrics import metric_names
from minitron_hf.scoring.reductions import Reduction
from reporting import command, spread

#: Requests: each size alone, and all together.
REQUESTS = {
    "neurons": "{intermediate_size: 0.5}",
    "heads": "{num_attention_heads: 0.5}",
    "groups": "{num_key_value_heads: 0.5}",
    "channels": "{hidden_size: 0.75}",
    "neurons and channels": "{intermediate_size: 0.65, hidden_size: 0.75}",
}
#: Variants to compare: name → arguments of scoring.
VARIANTS: dict[str, dict[str, dict]] = {
    "metric": {metric: {"metric": metric} for metric in metric_names() if metric != "random"},
    "reduction": {
        f"{tokens} over tokens, {rows} over rows": {"sequence_reduction": tokens, "batch_reduction": rows}
        for tokens, rows in itertools.product(get_args(Reduction), repeat=2)
    },
    "iterations": {f"T = {rounds}": {"iterations": rounds} for rounds in (1, 2, 4)},
}


def main() -> None:
    """Measure all variants of all teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--vary", choices=VARIANTS, default="metric", help="what is compared")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3, help="random choices")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of PrunerConfig, for all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    more = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in arguments.set)}
    results: dict = {
        "command": command(arguments),
        "versions": versions(),
        "teachers": {},
    }
    for name in arguments.teacher:
        teacher, tokenizer = load_for_compute(name), load_tokenizer(name)
        texts = (row["text"] for row in load_text_dataset(arguments.train))
        rows = token_rows(texts, tokenizer, max_length=arguments.max_length, num_rows=arguments.rows)
        held_out = load_text_dataset(arguments.eval)
        variants = VARIANTS[arguments.vary]
        requests = {cut: PrunerConfig.from_dict({**yaml.safe_load(text), **more}) for cut, text in REQUESTS.items()}
        models, seconds = {"teacher": teacher}, {}
        for variant, how in variants.items():
            start = time.monotonic()
            if "iterations" in how:  # each round depends on the pruned sizes
                scores = {
                    cut: iterate_importance(teacher, request, rows, show_progress=False, **how)
                    for cut, request in requests.items()
                }
            else:
                scores = dict.fromkeys(requests, estimate_importance(teacher, rows, show_progress=False, **how))
            seconds[variant] = round(time.monotonic() - start, 2)
            for cut, request in requests.items():
                models[f"{cut} by {variant}"] = apply_plan(teacher, make_plan(teacher, request, scores[cut]))
        for seed, (cut, request) in itertools.product(range(arguments.seeds), requests.items()):
            drawn = estimate_importance(teacher, metric="random", seed=seed)
            models[f"{cut} by random {seed}"] = apply_plan(teacher, make_plan(teacher, request, drawn))
        measured = evaluate_models(
            models,
            held_out,
            processing_class=tokenizer,
            max_length=128,
            num_rows=100,
            speed=False,
            show_progress=False,
        )["models"]
        losses = {key: value["metrics"]["loss"] for key, value in measured.items()}
        results["teachers"][public_name(name)] = {"seconds": seconds, "loss": losses}
        print(f"\n{public_name(name)}: teacher loss {losses['teacher']['value']:.3f}")
        print("| | " + " | ".join(REQUESTS) + " |\n|---|" + "---|" * len(REQUESTS))
        for variant in variants:
            cells = [f"{losses[f'{cut} by {variant}']['value']:.3f}" for cut in REQUESTS]
            print(f"| {variant} | {' | '.join(cells)} |", flush=True)
        chances = [[losses[f"{cut} by random {seed}"]["value"] for seed in range(arguments.seeds)] for cut in REQUESTS]
        print(f"| random | {' | '.join(map(spread, chances))} |")
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
