"""Compares repairs of pruned heads and neurons: none, head add-back, and refitted output projections.

Head add-back is the method of Muralidharan et al. 2024 (arXiv 2407.14679, §2.2). The script measures loss and KL of
the student before any retraining, and with `--tokens` also after the same distillation. A seed sets the order of the
data. Run from the repository root, for example:

    python benchmarks/repair.py --teacher MODEL --train train.jsonl --eval valid.jsonl --tokens 100000 \
        --output results.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import set_seed

from losses import METRICS, distil
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
from minitron_hf.data import token_rows
from minitron_hf.files import versions, write_json
from reporting import command, spread

#: Requests: heads; heads and neurons; and the sizes in the tables of `controls.py`.
REQUESTS = {
    "neurons": {"intermediate_size": 0.5},
    "heads": {"num_attention_heads": 0.5},
    "neurons and heads": {"intermediate_size": 0.5, "num_attention_heads": 0.5},
    "channels and neurons": {"hidden_size": 0.75, "intermediate_size": 0.65},
}


def main() -> None:
    """Measure every request with every repair."""
    arguments = parse_arguments()
    teacher = load_model(arguments.teacher, dtype=torch.float32)
    tokenizer = load_tokenizer(arguments.teacher)
    train, held_out = load_text_dataset(arguments.train), load_text_dataset(arguments.eval)
    rows = token_rows(
        (row["text"] for row in train), tokenizer, max_length=arguments.max_length, num_rows=arguments.rows
    )
    results: dict = {
        "command": command(arguments),
        "versions": versions(),
        "seconds": {},
        "before": {},
        "runs": [],
    }

    def measure(model) -> dict:
        found = evaluate_models(
            {"teacher": teacher, "model": model},
            held_out,
            processing_class=tokenizer,
            max_length=arguments.max_length,
            num_rows=arguments.eval_rows,
            speed=False,
            show_progress=False,
        )["models"]
        results["teacher"] = found["teacher"]["metrics"]
        return {name: found["model"]["metrics"][name] for name in METRICS}

    def timed(what: str, work):
        start = time.monotonic()
        done = work()
        results["seconds"][what] = round(time.monotonic() - start, 2)
        return done

    scores = timed("scoring", lambda: estimate_importance(teacher, rows, show_progress=False))
    students = {}
    for cut, request in REQUESTS.items():
        if arguments.cuts and cut not in arguments.cuts:
            continue
        students[cut] = apply_plan(teacher, make_plan(teacher, PrunerConfig(**request), scores))
        if "heads" in cut:
            added = make_plan(teacher, PrunerConfig(**request, head_add_back=True), scores)
            if any((units >= 0).any() for units in added.partners.values()):
                students[f"{cut}, added back"] = apply_plan(teacher, added)
        plan = make_plan(teacher, PrunerConfig(**request, repair="least_squares"), scores)
        refit = timed(f"repair of {cut}", lambda plan=plan: repaired_weights(teacher, plan, rows))
        students[f"{cut}, repaired"] = apply_plan(teacher, plan, repaired=refit)
    for arm, student in students.items():
        results["before"][arm] = measure(student)
        print(arm, "before", {name: round(value["value"], 4) for name, value in results["before"][arm].items()})
    weights = {arm: {name: value.clone() for name, value in m.state_dict().items()} for arm, m in students.items()}
    for seed in range(arguments.seeds if arguments.tokens else 0):
        for arm, student in students.items():
            set_seed(seed)
            student.load_state_dict(weights[arm])
            with tempfile.TemporaryDirectory() as folder:
                distil(student, teacher, train, folder, tokenizer, seed, arguments)
            results["runs"].append({"arm": arm, "seed": seed, "after": measure(student.eval())})
            print(arm, seed, {name: round(value["value"], 4) for name, value in results["runs"][-1]["after"].items()})
            if arguments.output:
                write_json(arguments.output, results)
    if arguments.output:
        write_json(arguments.output, results)
    print(table(results))


def table(results: dict) -> str:
    """Markdown: before, and mean ± standard deviation over seeds after."""
    lines = ["| cut | loss before | KL before | loss after | KL after |", "|---|---|---|---|---|"]
    for arm, before in results["before"].items():
        runs = [run["after"] for run in results["runs"] if run["arm"] == arm]
        cells = [f"{before[name]['value']:.4f}" for name in ("loss", "kl_divergence")]
        cells += [spread([run[name]["value"] for run in runs]) if runs else "–" for name in ("loss", "kl_divergence")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="corpus; its beginning calibrates")
    parser.add_argument("--eval", required=True, help="held-out corpus")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows")
    parser.add_argument("--eval-rows", type=int, default=100, help="held-out rows")
    parser.add_argument("--cuts", action="append", choices=list(REQUESTS), help="only these")
    parser.add_argument("--tokens", type=int, default=0, help="of distillation; 0: none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
