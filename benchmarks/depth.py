"""Compares the block importance of every contiguous block of layers with the loss of the model without the block.

Block importance takes one forward pass. The loss is measured on held-out text before any retraining. Run from the
repository root:

    python benchmarks/depth.py --teacher MODEL [--teacher MODEL …] --train train.jsonl --eval valid.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
from minitron_hf.models import load_for_compute
from minitron_hf.names import public_name


def main() -> None:
    """Measure all blocks of all teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--longest", type=int, default=2, help="longest block")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results: dict = {"versions": versions(), "teachers": {}}
    for name in arguments.teacher:
        teacher, tokenizer = load_for_compute(name), load_tokenizer(name)
        texts = [row["text"] for row in load_text_dataset(arguments.train, split="train[:500]")]
        scores = estimate_importance(teacher, texts, processing_class=tokenizer, num_rows=256, max_length=128)
        depth = teacher.config.num_hidden_layers
        blocks = [(i, i + n - 1) for n in range(1, arguments.longest + 1) for i in range(depth - n + 1)]
        models = {"teacher": teacher}
        for first, last in blocks:
            request = PrunerConfig(layers_to_drop=list(range(first, last + 1)))
            models[f"{first}-{last}"] = apply_plan(teacher, make_plan(teacher, request, scores))
        held_out = load_text_dataset(arguments.eval)
        measured = evaluate_models(
            models, held_out, processing_class=tokenizer, max_length=128, num_rows=100, speed=False
        )["models"]
        print(f"\n{public_name(name)}: teacher loss {measured['teacher']['metrics']['loss']['value']:.3f}")
        rows = []
        for first, last in blocks:
            loss = measured[f"{first}-{last}"]["metrics"]["loss"]
            rows.append({"layers": [first, last], "block_importance": float(scores.blocks[first, last]), "loss": loss})
            print(
                f"  without {first}-{last}: block importance {rows[-1]['block_importance']:.3f}, "
                f"loss {loss['value']:.3f} ± {loss['stderr']:.3f}"
            )
        results["teachers"][public_name(name)] = {"loss": measured["teacher"]["metrics"]["loss"], "blocks": rows}
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
