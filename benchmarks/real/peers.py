"""Compares students of other pruners with ours: same teacher, calibration rows and largest number of parameters.

`peers.yaml` lists them as arms. This script makes every start and measures it before retraining, one JSON per arm;
existing files are read, so the same command goes on. `benchmarks.real.run` distils the same starts, and found results
stand beside them in the table. For example:

    python -m benchmarks.real.peers --teacher work/teacher --work work/runs \
        --corpus written=benchmarks/real/written.jsonl --held-out wikitext2=wikitext2_valid.jsonl
    python -m benchmarks.real.run --teacher work/teacher --work work/runs --data work/data \
        --corpus written=benchmarks/real/written.jsonl --experiments benchmarks/real/peers.yaml \
        --results benchmarks/results/real/peers/distilled
    python -m benchmarks.real.peers --page docs/explanation/real-teachers.md

`--starts` does the same with our own starts, the arms of `starts.yaml`, so that only the closest need be distilled.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_hf import count_parameters, load_tokenizer
from minitron_hf.evaluation.speed import device_description
from minitron_hf.files import read_json, versions, write_json
from minitron_hf.models import load_for_compute
from minitron_hf.names import public_name
from minitron_hf.weights import model_digest

from .arms import OPTIONAL_FIELDS, Arm, Experiment, key, load_experiments
from .corpora import given_file
from .measure import Domain, Reference, packed, row_sums, summary
from .peer_starts import METHODS
from .report import Results, _cell, _thousands, write_page
from .run import ROW_LENGTH, ROWS
from .starts import DESCRIPTION_NAME, Starts
from .stopping import Stop, Stopped, log

TABLE = Path(__file__).with_name("peers.yaml")
RESULTS = Path(__file__).parents[1] / "results/real/peers"
#: Students after distillation, and the comparison of our criteria with the authors' code, in that folder.
DISTILLED, AGREEMENT_NAME = "distilled", "agreement.json"
#: Results of `starts.yaml`: some of its arms are arms of this table, too, and are not distilled twice. `--starts`
#: measures them before retraining alone.
STARTS = "starts"
#: Results of `caches.yaml`, whose base is an arm of `starts.yaml`, too.
CACHES = "caches"
#: A start and the start of what was distilled are one if their KL differs by no more: they are computed in two dtypes.
SAME_START = 0.01
STARTS_TABLE, BEFORE = TABLE.with_name("starts.yaml"), RESULTS.parent / f"{STARTS}-before"


class Comparison:
    """A teacher, calibration texts and a held-out text.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.stop = arguments, Stop()
        self.teacher = load_for_compute(arguments.teacher)
        self.teacher.requires_grad_(False)
        self.digest = model_digest(self.teacher)
        tokenizer = load_tokenizer(arguments.teacher)
        corpora = {name: given_file(path) for name, _, path in (one.partition("=") for one in arguments.corpus)}
        shared = arguments.work / "shared"
        shared.mkdir(parents=True, exist_ok=True)
        self.starts = Starts(self.teacher, self.digest, tokenizer, corpora, shared)
        name, _, file = arguments.held_out.partition("=")
        self.domain = Domain.read(name, file, tokenizer, arguments.held_out_rows, arguments.row_length)
        self.reference = Reference.of(self.teacher, self.digest, self.domain, shared, self.stop.check)

    def path(self, arm: Arm) -> Path:
        """The JSON file of an arm."""
        named = key(self.starts.name(arm), self.domain.rows.digest)
        return Path(self.arguments.results) / f"{arm.label.replace(', ', ',').replace(' ', '=')}.{named}.json"

    def run(self, arm: Arm) -> dict[str, Any]:
        """Make the start of an arm and measure it. Nothing is done if its JSON file exists."""
        path = self.path(arm)
        if path.is_file():
            return dict(read_json(path))
        log(arm.label)
        student, described = self._start(arm)
        sums = row_sums(student, self.domain, self.reference, self.stop.check)
        rows = self.starts.rows(arm)
        result = {
            "format": 1,
            "arm": {name: value for name, value in arm.settings.items() if name not in ("tokens", "seed")},
            "shape": dict(arm.shape),
            **described,
            "calibration": {"digest": rows.digest, "num_rows": len(rows), "num_tokens": rows.num_tokens},
            "result": summary(sums, self.domain.counts, self.domain.rows.num_bytes),
            "rows": {name: packed(values) for name, values in sums.items()},
            "teacher": {
                "name": public_name(self.arguments.teacher),
                "digest": self.digest,
                "num_parameters": count_parameters(self.teacher),
                "computed_in": str(self.teacher.dtype).removeprefix("torch."),
            },
            "held_out": {"name": self.domain.name, **self.domain.to_dict()},
            "versions": versions(),
            "device": device_description(self.teacher.device),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        kl = result["result"]["kl_divergence"]
        log(f"  {described['num_parameters']:,} parameters, KL {kl['value']:.4f} ± {kl['stderr'] or 0:.4f}")
        return result

    def _start(self, arm: Arm) -> tuple[Any, dict[str, Any]]:
        """The student of an arm, and what it is."""
        method = METHODS.get(arm["method"])
        if method is not None and method.is_module:
            start = self.starts.build(arm)
            return start.student, start.to_dict()
        folder = self.starts.get(arm)
        student = load_for_compute(folder, dtype=self.teacher.dtype)
        if method is not None:
            return student, dict(read_json(folder / DESCRIPTION_NAME))
        return student, {"num_parameters": count_parameters(student), "is_stock": True, "sizes": dict(arm.shape)}


# ---- Table ----


def table(folder: Path, experiments: dict[str, Experiment]) -> Iterator[str]:
    """The lines of the tables: one per target, with a row for every arm; what has no result is not measured."""
    path = folder / AGREEMENT_NAME
    found = _measured(folder) | _measured(folder.parent / BEFORE.name)
    distilled = [one for part in (folder / DISTILLED, folder.parent / STARTS) for one in Results.read(part)]
    agreement = read_json(path)["criteria"] if path.is_file() else {}
    for experiment in experiments.values():
        yield f"### {experiment.title}"
        yield ""
        yield "| method | criterion | parameters | stock checkpoint | KL before retraining | KL after distillation |"
        yield "|---|---|---|---|---|---|"
        for arm in experiment.arms:
            one = found.get(_settings(arm.settings))
            trained = next(_distilled(distilled, arm), None)
            cells = [title(arm), _criterion(arm, agreement), "", "", "not measured", _after(arm, trained)]
            if trained is not None:
                any_seed = next(iter(trained.seeds.values()))
                cells[2] = _millions(any_seed["student"])
                cells[3] = "yes" if arm["method"] not in METHODS else ""
                cells[4] = trained.kl("before")
            if one is not None:
                cells[2:4] = [_millions(one), "yes" if one["is_stock"] else "no"]
                if trained is None:  # otherwise the start of what was trained, which may have other calibration text
                    cells[4] = _kl(one)
            yield f"| {' | '.join(cells)} |"
        yield ""


def starts_table(folder: Path, experiments: dict[str, Experiment]) -> Iterator[str]:
    """The lines of the tables of our own starts: one per experiment with two results, the best start first."""
    found = _measured(folder)
    distilled = [one for part in (STARTS, CACHES) for one in Results.read(folder.parent / part)]
    for experiment in experiments.values():
        measured = [
            (found[_settings(arm.settings)], arm) for arm in experiment.arms if _settings(arm.settings) in found
        ]
        if len(measured) < 2:  # nothing to compare
            continue
        yield f"### {experiment.title}, before retraining"
        yield ""
        yield "| arm | parameters | KL before retraining | KL after distillation |"
        yield "|---|---|---|---|"
        for one, arm in sorted(measured, key=lambda pair: pair[0]["result"]["kl_divergence"]["value"]):
            trained = next((each for each in _distilled(distilled, arm) if each.began_at(one)), None)
            cells = [arm.label or "base", _millions(one), _kl(one), _after(arm, trained)]
            yield f"| {' | '.join(cells)} |"
        yield ""


def title(arm: Arm) -> str:
    """What a row of the table is called."""
    if arm["method"] in METHODS:
        return METHODS[arm["method"]].title
    kind = "random units" if arm["metric"] == "random" else "ours"
    repair = "" if arm["repair"] == "none" else f", {arm['repair'].replace('_', ' ')}"
    frozen = ", frozen embeddings" if arm["train"] == "layers" else ""
    norm = ", L2 norm over tokens" if arm["sequence_reduction"] == "l2" else ""
    schedule = "" if arm["schedule"] == "cosine" else f", {arm['schedule']} schedule"
    return f"{kind}: {arm['shape'].replace('-', ' ')}{repair}{frozen}{norm}{schedule}"


def _criterion(arm: Arm, agreement: dict[str, Any]) -> str:
    """Whether the criterion is the authors': their package, or shown to do what published code of it does."""
    method = METHODS.get(arm["method"])
    if method is None:
        return ""
    if method.needs:
        return "the authors' package"
    compared = agreement.get(method.criterion, {})
    return "as published code" if compared.get("agrees") else "our reading"


@dataclass(frozen=True)
class Trained:
    """An arm after distillation with the most tokens: the results it is among, and its seeds."""

    results: Results
    seeds: dict[int, dict[str, Any]]
    tokens: int

    def kl(self, when: str) -> str:
        """KL before or after distillation."""
        return _cell(self.results, self.seeds, when, self.results.domains[0], "kl")

    def began_at(self, one: dict[str, Any]) -> bool:
        """Whether it began at a start that was measured; calibrated on other text, it began elsewhere."""
        domain = self.results.domains[0]
        starts = [seed["summary"]["before"][domain]["kl_divergence"]["value"] for seed in self.seeds.values()]
        return abs(statistics.fmean(starts) - one["result"]["kl_divergence"]["value"]) <= SAME_START


def _distilled(distilled: list[Results], arm: Arm) -> Iterator[Trained]:
    """The arm after distillation, with the most tokens first."""
    for results in distilled:
        for tokens in reversed(results.budgets()):
            [seeds] = results.seeds(arm.at(tokens=tokens))
            if seeds:
                yield Trained(results, seeds, tokens)


def _after(arm: Arm, trained: Trained | None) -> str:
    if METHODS.get(arm["method"]) is not None and METHODS[arm["method"]].is_module:
        return "not measured (no stock checkpoint)"
    if trained is None:
        return "not measured"
    seeds = len(trained.seeds)
    return f"{trained.kl('after')} ({_thousands(trained.tokens)} tokens, {seeds} seed{'s' if seeds > 1 else ''})"


def _measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of an arm → what was measured of its start."""
    files = [path for path in sorted(folder.glob("*.json")) if path.name != AGREEMENT_NAME]
    return {_settings(one["arm"]): dict(one) for one in map(read_json, files)}


def _millions(model: dict[str, Any]) -> str:
    return f"{model['num_parameters'] / 1e6:.1f}M"


def _kl(one: dict[str, Any]) -> str:
    kl = one["result"]["kl_divergence"]
    return f"{kl['value']:.3f}" if kl["stderr"] is None else f"{kl['value']:.3f} ± {kl['stderr']:.3f}"


def _settings(settings: Any) -> str:
    return str(sorted((name, str(value)) for name, value in settings.items() if name not in ("tokens", "seed")))


def main() -> None:
    """Measure all arms before retraining, or write the tables."""
    arguments = parse_arguments()
    experiments = load_experiments(arguments.experiments)
    lines = starts_table if arguments.starts else table
    if arguments.page:
        region = "benchmarks.real.starts.before" if arguments.starts else "benchmarks.real.peers"
        write_page(arguments.page, "\n".join(lines(arguments.results, experiments)), region)
        return
    comparison = Comparison(arguments)
    comparison.stop.listen()
    try:
        for name, experiment in experiments.items():
            for arm in experiment.arms if not arguments.only or name in arguments.only else ():
                if arguments.method and arm["method"] not in arguments.method:
                    continue
                try:
                    comparison.run(arm)
                except (ModuleNotFoundError, ValueError) as error:
                    log(f"{arm.label} is left out: {error}")
    except Stopped:
        log("stopped; the same command goes on.")
    print("", *lines(arguments.results, experiments), sep="\n")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the tables of all results into this page, and end")
    parser.add_argument("--teacher", help="folder or Hub id")
    parser.add_argument("--corpus", action="append", metavar="NAME=FILE", help="a calibration text")
    parser.add_argument("--held-out", metavar="NAME=FILE", help="text to measure on")
    parser.add_argument("--held-out-rows", type=int, default=ROWS, help="rows to measure on")
    parser.add_argument("--row-length", type=int, default=ROW_LENGTH, help="tokens of such a row")
    parser.add_argument("--work", type=Path, help="folder of benchmarks.real.run, for starts and the teacher's states")
    parser.add_argument("--starts", action="store_true", help="our own starts, of starts.yaml, instead")
    parser.add_argument("--results", type=Path, help="folder for one JSON per arm")
    parser.add_argument("--experiments", type=Path, help="the table of arms")
    parser.add_argument("--only", action="append", help="only this experiment")
    parser.add_argument(
        "--method", action="append", choices=[OPTIONAL_FIELDS["method"], *METHODS], help="only this method"
    )
    arguments = parser.parse_args()
    arguments.experiments = arguments.experiments or (STARTS_TABLE if arguments.starts else TABLE)
    arguments.results = arguments.results or (BEFORE if arguments.starts else RESULTS)
    needed = ("teacher", "corpus", "held_out", "work")
    if not arguments.page and (missing := [name for name in needed if not getattr(arguments, name)]):
        parser.error(f"missing: {', '.join('--' + name.replace('_', '-') for name in missing)}")
    return arguments


if __name__ == "__main__":
    main()
