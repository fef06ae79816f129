"""Which importance to prune by? Loss of students before any retraining, by metric, beside random pruning.

One set of scores per metric, one cut per request; `--seeds` random choices are the control. Run from the repository
root, for example:

    python benchmarks/metrics.py --teacher MODEL --train train.jsonl --eval valid.jsonl --output results.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import get_args

import yaml

from minitron_hf import (
    PrunerConfig,
    apply_plan,
    estimate_importance,
    evaluate_models,
    load_model,
    load_text_dataset,
    load_tokenizer,
    make_plan,
)
from minitron_hf.artifacts import public_name, versions, write_json
from minitron_hf.data import token_rows
from minitron_hf.importance import Metric
from minitron_hf.models import compute_dtype

#: What is cut, each by itself and all together.
REQUESTS = {
    "neurons": "{intermediate_size: 0.5}",
    "heads": "{num_attention_heads: 0.5}",
    "groups": "{num_key_value_heads: 0.5}",
    "channels": "{hidden_size: 0.75}",
    "neurons and channels": "{intermediate_size: 0.65, hidden_size: 0.75}",
}


def main() -> None:
    """Measure all metrics of all teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3, help="random choices")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of PrunerConfig, for all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    more = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in arguments.set)}
    results: dict = {"versions": versions(), "arguments": {"rows": arguments.rows, **more}, "teachers": {}}
    for name in arguments.teacher:
        teacher, tokenizer = load_model(name, dtype=compute_dtype()), load_tokenizer(name)
        texts = (row["text"] for row in load_text_dataset(arguments.train))
        rows = token_rows(texts, tokenizer, max_length=arguments.max_length, num_rows=arguments.rows)
        held_out = load_text_dataset(arguments.eval)
        metrics = [metric for metric in get_args(Metric) if metric != "random"]
        scores, seconds = {}, {}
        for metric in metrics:
            start = time.monotonic()
            scores[metric] = estimate_importance(teacher, rows, metric=metric, show_progress=False)
            seconds[metric] = round(time.monotonic() - start, 2)
        for seed in range(arguments.seeds):
            scores[f"random {seed}"] = estimate_importance(teacher, metric="random", seed=seed)
        models = {"teacher": teacher}
        for cut, text in REQUESTS.items():
            request = PrunerConfig.from_dict({**yaml.safe_load(text), **more})
            for metric, found in scores.items():
                models[f"{cut} by {metric}"] = apply_plan(teacher, make_plan(teacher, request, found))
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
        for metric in metrics:
            cells = [f"{losses[f'{cut} by {metric}']['value']:.3f}" for cut in REQUESTS]
            print(f"| {metric} | {' | '.join(cells)} |", flush=True)
        drawn = [[losses[f"{cut} by random {seed}"]["value"] for seed in range(arguments.seeds)] for cut in REQUESTS]
        cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in drawn]
        print(f"| random | {' | '.join(cells)} |")
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
