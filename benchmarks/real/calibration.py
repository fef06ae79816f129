r"""Measures how much the calibration text matters: KL to the teacher before retraining, by text and number of rows.

Importance and repair read the same rows. One JSON file per text, size and number of rows; existing files are read.
For example:

    python -m benchmarks.real.calibration --teacher work/teacher --work work/calibration \
        --size intermediate_size=0.5 --rows 160 --rows 320 \
        --text mixed=work/data/train/mixed.jsonl --text written=work/written \
        --held-out wikitext2=wikitext2_valid.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from minitron_hf import (
    PrunerConfig,
    count_parameters,
    estimate_importance,
    load_tokenizer,
    make_plan,
    prune_with_plan,
    token_rows,
)
from minitron_hf.evaluation.speed import device_description
from minitron_hf.files import public_name, read_json, versions, write_json
from minitron_hf.models import load_for_compute
from minitron_hf.weights import model_digest

from .arms import key
from .corpora import read_texts
from .measure import Domain, Reference, row_sums, summary
from .run import OTHER_ROWS, ROW_LENGTH
from .stopping import Stop, Stopped, log

RESULTS = Path(__file__).parents[1] / "results/real/calibration"
#: Tokens of a calibration row.
LENGTH = 256
REPAIRS = (None, "least_squares")


class Measurement:
    """A teacher and the held-out text that its students are measured on.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.stop = arguments, Stop()
        self.teacher = load_for_compute(arguments.teacher)
        self.tokenizer = load_tokenizer(arguments.teacher)
        self.digest = model_digest(self.teacher)
        name, _, file = arguments.held_out.partition("=")
        self.domain = Domain.read(name, file, self.tokenizer, arguments.held_out_rows, ROW_LENGTH)
        arguments.work.mkdir(parents=True, exist_ok=True)
        self.reference = Reference.of(self.teacher, self.digest, self.domain, arguments.work, self.stop.check)

    def run(self, text: str, file: str, num_rows: int) -> list[dict[str, Any]]:
        """Prune with one calibration text, without a repair and with it, and measure; or read the results."""
        rows = token_rows(read_texts(file), self.tokenizer, max_length=LENGTH, num_rows=num_rows)
        size = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in self.arguments.size)}
        named = key(self.digest, str(self.teacher.dtype), rows.digest, self.domain.rows.digest, size)
        path = self.arguments.results / f"{text}-{len(rows)}.{named}.json"
        if path.is_file():
            return list(read_json(path)["results"])
        scores = estimate_importance(self.teacher, rows, show_progress=False)
        results = []
        for repair in REPAIRS:
            self.stop.check()
            plan = make_plan(self.teacher, PrunerConfig(**size, multiple_of=1, repair=repair), scores)
            student = prune_with_plan(self.teacher, plan, rows if repair else None)
            sums = row_sums(student, self.domain, self.reference, self.stop.check)
            found = summary(sums, self.domain.counts, self.domain.rows.num_bytes)
            results.append({"repair": repair, "num_parameters": count_parameters(student), **found})
            log(f"{text}, {rows.num_tokens:,} tokens, repair {repair}: KL {found['kl_divergence']}")
        setting = {"text": text, "source": public_name(file), "num_rows": len(rows), "num_tokens": rows.num_tokens}
        about = {
            "teacher": {"name": public_name(self.arguments.teacher), "digest": self.digest},
            "held_out": {"name": self.domain.name, **self.domain.to_dict()},
            "versions": versions(),
            "device": device_description(self.teacher.device),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": 1, "size": size, "calibration": setting, "results": results, **about})
        return results


def main() -> None:
    """Measure every text with every number of rows, and print a table."""
    arguments = parse_arguments()
    measurement, lines = Measurement(arguments), []
    measurement.stop.listen()
    try:
        for given in arguments.text:
            name, _, file = given.partition("=")
            for num_rows in arguments.rows:
                cut, repaired = (one["kl_divergence"] for one in measurement.run(name, file, num_rows))
                cells = " | ".join(f"{one['value']:.3f} ± {one['stderr']:.3f}" for one in (cut, repaired))
                lines.append(f"| {name} | {num_rows * LENGTH:,} | {cells} |")
    except Stopped:
        log("stopped; the same command goes on.")
    print("\n| text | tokens | KL, cut | KL, repaired |\n|---|---|---|---|", *lines, sep="\n")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder or Hub id", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="a calibration text")
    parser.add_argument("--rows", action="append", type=int, required=True, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--size", action="append", required=True, metavar="FIELD=VALUE", help="size of the student")
    parser.add_argument("--held-out", required=True, metavar="NAME=FILE", help="text to measure on")
    parser.add_argument("--held-out-rows", type=int, default=OTHER_ROWS, help=f"rows of {ROW_LENGTH} tokens")
    parser.add_argument("--work", type=Path, required=True, help="folder for the teacher's states")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for one JSON per text and number of rows"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
