r"""Measures students before any retraining: KL to the teacher, by request and by calibration text.

Importance and repair read the same rows. A request has fields of `PrunerConfig` and arguments of
`estimate_importance`. One JSON file per request, text and number of rows; existing files are read. For example, and
then the table of all results:

    python -m benchmarks.real.before --teacher work/teacher --work work/before \
        --request intermediate_size=0.5 --request intermediate_size=0.5,repair=least_squares \
        --rows 160 --text mixed=work/data/train/mixed.jsonl --held-out wikitext2=wikitext2_valid.jsonl
    python -m benchmarks.real.before --page docs/explanation/measurements.md
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minitron_hf import (
    ImportanceScores,
    PrunerConfig,
    count_parameters,
    estimate_importance,
    load_tokenizer,
    make_plan,
    prune_with_plan,
    token_rows,
)
from minitron_hf.evaluation.speed import device_description
from minitron_hf.files import read_json, replacing_folder, versions, write_json
from minitron_hf.models import load_for_compute
from minitron_hf.names import public_name
from minitron_hf.weights import model_digest

from .arms import key
from .corpora import read_texts
from .measure import Domain, Reference, row_sums, summary
from .report import write_page
from .run import OTHER_ROWS, ROW_LENGTH
from .stopping import Stop, Stopped, log

RESULTS = Path(__file__).parents[1] / "results/real/before"
#: Tokens of a calibration row.
LENGTH = 256
PRUNER_FIELDS = {field.name for field in dataclasses.fields(PrunerConfig)}


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

    def run(self, request: str, text: str, file: str, num_rows: int) -> dict[str, Any]:
        """Prune a request with one calibration text, and measure; or read the result."""
        rows = token_rows(read_texts(file), self.tokenizer, max_length=LENGTH, num_rows=num_rows)
        fields = parse_request(request)
        named = key(self.digest, str(self.teacher.dtype), rows.digest, self.domain.rows.digest, fields)
        path = self.arguments.results / f"{request.replace(',', '-')}-{text}-{len(rows)}.{named}.json"
        if path.is_file():
            return dict(read_json(path))
        request_fields = {name: value for name, value in fields.items() if name in PRUNER_FIELDS}
        scoring = {name: value for name, value in fields.items() if name not in PRUNER_FIELDS}
        config = PrunerConfig(**{"multiple_of": 1, **request_fields})
        plan = make_plan(self.teacher, config, self._scores(rows, scoring))
        student = prune_with_plan(self.teacher, plan, rows if plan.repair else None)
        sums = row_sums(student, self.domain, self.reference, self.stop.check)
        found = summary(sums, self.domain.counts, self.domain.rows.num_bytes)
        result = {
            "format": 1,
            "request": fields,
            "calibration": {
                "text": text, "source": public_name(file), "num_rows": len(rows), "num_tokens": rows.num_tokens,
            },
            "num_parameters": count_parameters(student),
            "layers_dropped": list(plan.layers_dropped),
            "result": found,
            "teacher": {"name": public_name(self.arguments.teacher), "digest": self.digest},
            "held_out": {"name": self.domain.name, **self.domain.to_dict()},
            "versions": versions(),
            "device": device_description(self.teacher.device),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        log(f"{request}, {text}, {rows.num_tokens:,} tokens: KL {found['kl_divergence']}")
        return result

    def _scores(self, rows: Any, arguments: dict[str, Any]) -> ImportanceScores:
        """Scores of the teacher on some rows, made once."""
        named = key(self.digest, str(self.teacher.dtype), rows.digest, arguments)
        folder = self.arguments.work / f"scores-{named}"
        if not folder.is_dir():
            arguments = {"hidden_covariance": True, **arguments}
            scores = estimate_importance(self.teacher, rows, show_progress=False, **arguments)
            with replacing_folder(folder) as unfinished:
                scores.save_pretrained(unfinished)
        self.stop.check()
        return ImportanceScores.from_pretrained(folder)


def parse_request(text: str) -> dict[str, Any]:
    """Fields of a `PrunerConfig` and arguments of `estimate_importance`.

    >>> parse_request("hidden_size=540,repair=least_squares")
    {'hidden_size': 540, 'repair': 'least_squares'}
    """
    pairs = (one.partition("=") for one in text.split(","))
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def table(folder: Path) -> Iterator[str]:
    """The lines of a table of all results in a folder."""
    yield "| request | parameters | calibration text | tokens | KL | agreement |"
    yield "|---|---|---|---|---|---|"
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    for one in sorted(found, key=_order):
        kl, agreement = one["result"]["kl_divergence"], one["result"]["top1_agreement"]
        request = ", ".join(f"{name} {value}" for name, value in one["request"].items())
        yield (
            f"| {request} | {one['num_parameters'] / 1e6:.1f}M | {one['calibration']['text']} "
            f"| {one['calibration']['num_tokens']:,} | {kl['value']:.3f} ± {kl['stderr']:.3f} "
            f"| {agreement['value']:.3f} ± {agreement['stderr']:.3f} |"
        )


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    sizes = {name: value for name, value in result["request"].items() if name not in ("repair", "hidden_basis")}
    calibration = result["calibration"]
    return str(sizes), calibration["text"], calibration["num_tokens"], -result["result"]["kl_divergence"]["value"]


def main() -> None:
    """Measure every request with every text and number of rows, or write the table."""
    arguments = parse_arguments()
    if arguments.page:
        write_page(arguments.page, "\n".join([*table(arguments.results), ""]), "benchmarks.real.before")
        return
    measurement = Measurement(arguments)
    measurement.stop.listen()
    try:
        for given in arguments.text:
            name, _, file = given.partition("=")
            for num_rows in arguments.rows:
                for request in arguments.request:
                    measurement.run(request, name, file, num_rows)
    except Stopped:
        log("stopped; the same command goes on.")
    print("", *table(arguments.results), sep="\n")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the table of all results into this page, and end")
    parser.add_argument("--teacher", help="folder or Hub id")
    parser.add_argument("--request", action="append", metavar="FIELD=VALUE,…", help="fields of PrunerConfig")
    parser.add_argument("--text", action="append", metavar="NAME=FILE", help="a calibration text")
    parser.add_argument("--rows", action="append", type=int, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--held-out", metavar="NAME=FILE", help="text to measure on")
    parser.add_argument("--held-out-rows", type=int, default=OTHER_ROWS, help=f"rows of {ROW_LENGTH} tokens")
    parser.add_argument("--work", type=Path, help="folder for scores and the teacher's states")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for one JSON per result")
    arguments = parser.parse_args()
    needed = ("teacher", "request", "text", "rows", "held_out", "work")
    if not arguments.page and (missing := [name for name in needed if not getattr(arguments, name)]):
        parser.error(f"missing: {', '.join('--' + name.replace('_', '-') for name in missing)}")
    return arguments


if __name__ == "__main__":
    main()
