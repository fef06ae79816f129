"""Measures what a width and a depth student of equal parameters gain in speed and memory, beside their teacher.

The depth student drops layers. The width students have as many neurons, or channels and neurons, as give at most the
same parameters. All are timed in alternating rounds; the values of the weights do not matter, so nothing is trained.
With the text of `docs/guides/width-or-depth.md`, run from the repository root while nothing else computes:

    python benchmarks/width_and_depth.py --teacher work/teacher --text work/data/held_out/wikitext2.jsonl \
        --output benchmarks/results/width-and-depth.json --page docs/guides/width-or-depth.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from minitron_hf import (
    PrunerConfig,
    count_parameters,
    estimate_importance,
    load_text_dataset,
    load_tokenizer,
    make_plan,
    prune_with_plan,
    student_config,
    token_rows,
)
from minitron_hf.evaluation.speed import Workload, device_description, measure_speed
from minitron_hf.files import read_json, versions, write_json
from minitron_hf.models import load_for_compute
from minitron_hf.names import public_name
from real.report import write_page
from reporting import command

#: Prompts and decoding of the one stream, and further workloads.
PREFILL, DECODE, GRID = 512, 64, (Workload(1, 2048), Workload(8, 512))


def main() -> None:
    """Measure, or read the results; print the table and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="folder or Hub id")
    parser.add_argument("--text", help="JSON Lines with prompts")
    parser.add_argument(
        "--layers", type=float, default=0.6, help="fraction of the layers that the depth student keeps"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results; read without a teacher")
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    arguments = parser.parse_args()
    if arguments.teacher:
        measured = measure(arguments.teacher, arguments.text, arguments.layers, arguments.rounds)
        public = {name: public_name(getattr(arguments, name)) for name in ("teacher", "text")}
        shown = argparse.Namespace(**{**vars(arguments), **public, "page": None})
        write_json(arguments.output, {"command": command(shown), "versions": versions(), **measured})
    lines = table(read_json(arguments.output))
    print("\n".join(lines))
    if arguments.page:
        write_page(arguments.page, "\n".join([*lines, ""]), "benchmarks/width_and_depth.py")


def measure(name: str, text: str, layers: float, rounds: int) -> dict[str, Any]:
    """Prune a teacher in three ways and time all four models."""
    teacher = load_for_compute(name)
    rows = token_rows(load_text_dataset(text), load_tokenizer(name), max_length=PREFILL, num_rows=32)
    scores = estimate_importance(teacher, metric="magnitude")
    models: dict[str, PreTrainedModel] = {"teacher": teacher}
    for label, request in requests(teacher, layers).items():
        models[label] = prune_with_plan(teacher, make_plan(teacher, request, scores))
    speeds = measure_speed(
        models, rows, prefill_length=PREFILL, decode_tokens=DECODE, rounds=rounds, show_progress=True, grid=GRID
    )
    return {
        "models": {
            label: {"num_parameters": count_parameters(model), **speeds[label]} for label, model in models.items()
        },
        "settings": {"prefill": PREFILL, "decode": DECODE, "grid": [asdict(load) for load in GRID], "rounds": rounds},
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "device": device_description(teacher.device),
    }


def requests(teacher: PreTrainedModel, layers: float) -> dict[str, PrunerConfig]:
    """The depth student, and the largest width students that do not exceed its parameters."""
    config = teacher.config.get_text_config()
    depth = PrunerConfig(num_hidden_layers=round(layers * config.num_hidden_layers))
    limit = count_parameters(student_config(teacher.config, depth))
    found = {f"{depth.num_hidden_layers} of {config.num_hidden_layers} layers": depth}
    for hidden in (None, 8 * round(0.875 * config.hidden_size / 8)):
        fits = [
            request
            for ffn in range(8, config.intermediate_size, 4)
            if count_parameters(student_config(teacher.config, request := _width(hidden, ffn))) <= limit
        ]
        label = f"{fits[-1].intermediate_size} of {config.intermediate_size} neurons"
        found[label if hidden is None else f"{hidden} of {config.hidden_size} channels, {label}"] = fits[-1]
    return found


def _width(hidden: int | None, neurons: int) -> PrunerConfig:
    return PrunerConfig(hidden_size=hidden, intermediate_size=neurons, multiple_of=1)


def table(results: Mapping[str, Any]) -> list[str]:
    """Speeds relative to the teacher: medians over rounds of the ratio within a round."""
    settings, models = results["settings"], results["models"]
    loads = [{"batch_size": 1, "prompt_tokens": settings["prefill"]}, *settings["grid"]]
    names = [f"{one['batch_size']} × {one['prompt_tokens']}" for one in loads]
    lines = [
        f"Tokens per second relative to the teacher, in {results['dtype']} on {results['device']['name']}: median of "
        f"{settings['rounds']} rounds [quartiles]; reading prompts (batch × tokens) and decoding {settings['decode']} "
        "tokens after them.",
        "",
        "| model | parameters | " + " | ".join(f"read {n} | decode {n}" for n in names) + " | memory, 1 × 512 |",
        "|---|---|" + "---|---|" * len(names) + "---|",
    ]
    for label, one in models.items():
        cells = [f"{one['num_parameters'] / 1e6:.1f}M"]
        for own, other in zip(_speeds(one), _speeds(models["teacher"]), strict=True):
            for kind in ("prefill_tokens_per_second", "decode_tokens_per_second"):
                cells.append(_ratio(own[kind]["rounds"], other[kind]["rounds"]) if own is not other else "1")
        memory = one["peak_memory_bytes"] / models["teacher"]["peak_memory_bytes"]
        lines.append(f"| {label} | " + " | ".join([*cells, f"{memory:.2f}"]) + " |")
    return lines


def _speeds(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [model, *model["speeds"]]


def _ratio(own: list[float], other: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(own, other, strict=True))
    low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
