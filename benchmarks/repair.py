"""Does refitting the output projections help? Loss of students before any retraining, with and without it.

Run from the repository root, for example:

    python benchmarks/repair.py --teacher MODEL --train train.jsonl --eval valid.jsonl --output results.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from minitron_hf import (
    PrunerConfig,
    apply_plan,
    estimate_importance,
    evaluate_models,
    load_model,
    load_text_dataset,
    load_tokenizer,
    make_plan,
    repaired_weights,
)
from minitron_hf.artifacts import public_name, versions, write_json
from minitron_hf.data import token_rows
from minitron_hf.models import compute_dtype

#: What is cut, each by itself and both together.
REQUESTS = {
    "neurons": {"intermediate_size": 0.5},
    "heads": {"num_attention_heads": 0.5},
    "neurons and heads": {"intermediate_size": 0.5, "num_attention_heads": 0.5},
}


def main() -> None:
    """Measure all teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows")
    parser.add_argument("--eval-rows", type=int, default=100, help="held-out rows")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sizes = {"rows": arguments.rows, "eval_rows": arguments.eval_rows, "max_length": arguments.max_length}
    results: dict = {"versions": versions(), "arguments": sizes, "teachers": {}}
    for name in arguments.teacher:
        teacher, tokenizer = load_model(name, dtype=compute_dtype()), load_tokenizer(name)
        texts = (row["text"] for row in load_text_dataset(arguments.train))
        rows = token_rows(texts, tokenizer, max_length=arguments.max_length, num_rows=arguments.rows)
        start = time.monotonic()
        scores = estimate_importance(teacher, rows, show_progress=False)
        seconds = {"scoring": round(time.monotonic() - start, 2)}
        models = {"teacher": teacher}
        for cut, request in REQUESTS.items():
            models[cut] = apply_plan(teacher, make_plan(teacher, PrunerConfig(**request), scores))
            plan = make_plan(teacher, PrunerConfig(**request, repair="least_squares"), scores)
            start = time.monotonic()
            repaired = repaired_weights(teacher, plan, rows)
            seconds[f"repair of {cut}"] = round(time.monotonic() - start, 2)
            models[f"{cut}, repaired"] = apply_plan(teacher, plan, repaired=repaired)
        measured = evaluate_models(
            models,
            load_text_dataset(arguments.eval),
            processing_class=tokenizer,
            max_length=arguments.max_length,
            num_rows=arguments.eval_rows,
            speed=False,
            show_progress=False,
        )["models"]
        losses = {key: value["metrics"]["loss"] for key, value in measured.items()}
        results["teachers"][public_name(name)] = {"seconds": seconds, "loss": losses}
        print(public_name(name), seconds, {key: round(value["value"], 3) for key, value in losses.items()}, flush=True)
        if arguments.output:
            write_json(arguments.output, results)


if __name__ == "__main__":
    main()
