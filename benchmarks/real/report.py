"""Writes the tables and the figure of the measurements on real teachers from their JSON files.

Claims are judged by paired differences on the same rows, see `intervals`. Run from the repository root:

    python -m benchmarks.real.report --page docs/explanation/real-teachers.md --figure docs/_static/real-teachers.png
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_hf.evaluation.quality import mean_and_error
from minitron_hf.files import read_json, replacing_file, write_text
from minitron_hf.publishing.drawing import BLUE, DPI, GREY, ORANGE

from .arms import TABLE, Arm, Claim, Experiment, load_experiments
from .intervals import EQUIVALENCE, Difference, Verdict, paired_difference, verdict
from .measure import bits_per_byte, unpacked
from .run import RESULTS

BEGIN, END = "<!-- results of benchmarks/real: begin -->", "<!-- results of benchmarks/real: end -->"

#: Measure of a claim → the value that is kept of every row.
KEPT_AS = {"kl": "kl", "loss": "loss", "bits_per_byte": "loss", "disagreement": "agree"}
COLOURS: dict[Verdict, str] = {"confirmed": BLUE, "refuted": ORANGE, "undecided": GREY}


class Results:
    """The results on one teacher, measured on the same held-out rows.

    Args:
        found: of one teacher.
    """

    def __init__(self, found: Sequence[dict[str, Any]]) -> None:
        self.found = {_settings(result["arm"]): result for result in found}
        self.any = found[0]
        self.domains = list(self.any["held_out"])

    @classmethod
    def read(cls, folder: Path) -> list[Results]:
        """The results of a folder, grouped by teacher, dtype and held-out rows."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.rglob("*.json")):
            result = read_json(path)
            if "rows" not in result:  # of another kind
                continue
            rows = [domain["digest"] for domain in result["held_out"].values()]
            groups.setdefault(str([result["teacher"]["digest"], result["teacher"]["computed_in"], *rows]), []).append(
                result
            )
        return [cls(found) for found in groups.values()]

    def get(self, arm: Arm) -> dict[str, Any] | None:
        """The result of an arm, if there is one."""
        return self.found.get(_settings(arm.settings))

    def budgets(self) -> list[int]:
        """Token budgets of all results."""
        return sorted({result["arm"]["tokens"] for result in self.found.values()})

    def seeds(self, *arms: Arm) -> list[dict[int, dict[str, Any]]]:
        """Seed → result of each arm, for the seeds that all of them have."""
        every = sorted({result["arm"]["seed"] for result in self.found.values()})
        shared = [seed for seed in every if all(self.get(arm.at(seed=seed)) for arm in arms)]
        return [{seed: self.found[_settings(arm.at(seed=seed).settings)] for seed in shared} for arm in arms]

    def counts(self, domain: str) -> list[int]:
        """Predicted tokens of the rows of a domain."""
        return [int(count) for count in unpacked(self.any["held_out"][domain]["tokens"])]


@dataclass(frozen=True)
class Finding:
    """A claim at one budget: the paired difference and the verdict."""

    claim: Claim
    tokens: int
    difference: Difference
    verdict: Verdict


def findings(results: Results, experiments: dict[str, Experiment]) -> Iterator[Finding]:
    """All claims at all budgets at which both arms were run."""
    for experiment in experiments.values():
        for claim in experiment.claims:
            for tokens in results.budgets():
                better, than = results.seeds(claim.better.at(tokens=tokens), claim.than.at(tokens=tokens))
                if better:
                    domain, _, measure = claim.measure.partition(".")
                    sums = [[_row_sums(one, domain, measure) for one in side.values()] for side in (better, than)]
                    difference = paired_difference(*sums, results.counts(domain))
                    yield Finding(claim, tokens, difference, verdict(difference, claim.expect))


def _row_sums(result: dict[str, Any], domain: str, measure: str) -> list[float]:
    values = unpacked(result["rows"]["after"][domain][KEPT_AS[measure]])
    if measure == "disagreement":
        counts = unpacked(result["held_out"][domain]["tokens"])
        return [count - value for count, value in zip(counts, values, strict=True)]
    return values


def _settings(settings: Any) -> str:
    return str(sorted((name, str(value)) for name, value in settings.items()))


# ---- Tables ----


def claims_table(found: Sequence[Finding]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| claim | source | tokens | seeds | measure | difference, 95 % interval | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for finding in found:
        claim, difference = finding.claim, finding.difference
        value, low, high = (f"{100 * part:+.1f}" for part in difference.relative)
        measure = claim.measure.replace(".", ", ").replace("_", " ").replace("kl", "KL")
        lines.append(
            f"| {claim.text} | {claim.source} | {_thousands(finding.tokens)} | {difference.num_seeds} | {measure} | "
            f"{value} % [{low}, {high}] | **{finding.verdict}** |"
        )
    return lines


def arms_table(results: Results, experiments: dict[str, Experiment]) -> list[str]:
    """Markdown lines: every arm at every budget once, in the first experiment that has it."""
    first = results.domains[0]
    heads = [f"bits per byte, {domain}" for domain in results.domains]
    lines = [
        f"| experiment | arm | tokens | seeds | KL on {first}, before | after | agreement | {' | '.join(heads)} |",
        "|---" * (7 + len(heads)) + "|",
    ]
    known = set()
    for experiment in experiments.values():
        for tokens in results.budgets():
            for arm in experiment.arms:
                [found] = results.seeds(arm.at(tokens=tokens))
                if found and (arm.label, tokens) not in known:
                    known.add((arm.label, tokens))
                    cells = [_cell(results, found, when, first, "kl") for when in ("before", "after")]
                    cells.append(_cell(results, found, "after", first, "agree"))
                    cells += [_cell(results, found, "after", domain, "bits_per_byte") for domain in results.domains]
                    head = [experiment.name, arm.label, _thousands(tokens), str(len(found))]
                    lines.append(f"| {' | '.join(head + cells)} |")
    teacher = [_cell(results, {0: results.any}, "teacher", domain, "bits_per_byte") for domain in results.domains]
    lines.append(f"| | teacher | | | 0 | 0 | 1 | {' | '.join(teacher)} |")
    return lines


def _cell(results: Results, found: dict[int, dict[str, Any]], when: str, domain: str, measure: str) -> str:
    """Mean over seeds ± standard error over rows."""
    counts = results.counts(domain)
    name = "loss" if measure == "bits_per_byte" else measure
    columns = zip(*(unpacked(result["rows"][when][domain][name]) for result in found.values()))
    value, error = mean_and_error([statistics.fmean(column) for column in columns], counts)
    num_bytes = results.any["held_out"][domain]["num_bytes"]
    scale = bits_per_byte(counts, num_bytes) if measure == "bits_per_byte" else 1.0
    return f"{value * scale:.3f}" if error is None else f"{value * scale:.3f} ± {error * scale:.3f}"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}k"


def described(results: Results) -> str:
    """One paragraph on teacher, student and held-out rows."""
    teacher = results.any["teacher"]
    name = teacher.get("original") or teacher.get("source") or teacher["name"]
    rows = ", ".join(
        f"{domain} ({entry['num_tokens']:,} tokens in {entry['num_rows']} rows)"
        for domain, entry in results.any["held_out"].items()
    )
    shapes = sorted({f"{found['student']['num_parameters']:,}" for found in results.found.values()})
    return (
        f"Teacher: {name}, {teacher['num_parameters']:,} parameters ({teacher['weights']}), computed in "
        f"{teacher['computed_in']} on {results.any['device']['name']}. Students: {', '.join(shapes)} parameters. "
        f"Held out: {rows}."
    )


def text(groups: Sequence[Results], experiments: dict[str, Experiment], figure: str | None) -> str:
    """The generated region of the page."""
    parts = []
    for results in groups:
        found = list(findings(results, experiments))
        parts += [described(results), ""]
        if found:
            parts += ["## Claims", "", *claims_table(found), ""]
            if figure and results is groups[0]:
                parts += [f"![Relative differences of the claims, with 95 % intervals]({figure})", ""]
        parts += ["## Arms", "", *arms_table(results, experiments), ""]
    return "\n".join(parts)


def write_page(page: Path, region: str) -> None:
    """Replace the generated region of a page; a new page holds nothing else."""
    before, after = "# Real teachers\n\n", ""
    if page.is_file():
        content = page.read_text(encoding="utf-8")
        if BEGIN not in content or END not in content:
            raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}, between which the results go. Add them.")
        before, after = content.partition(BEGIN)[0], content.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n\n{region}\n{END}{after or chr(10)}")


# ---- Figure ----


def draw(found: Sequence[Finding], path: Path) -> None:
    """Forest plot: relative difference and interval of every claim, and the band that counts as equal."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(10, 1.2 + 0.42 * len(found)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvspan(-100 * EQUIVALENCE, 100 * EQUIVALENCE, color=GREY, alpha=0.2, linewidth=0)
        axes.axvline(0, color="black", linewidth=0.8)
        for place, finding in enumerate(found):
            value, low, high = (100 * part for part in finding.difference.relative)
            colour = COLOURS[finding.verdict]
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([value], [place], "o", color=colour, markersize=4)
        axes.set_yticks(range(len(found)))
        axes.set_yticklabels(
            [f"{one.claim.text}\n{one.claim.measure}, {_thousands(one.tokens)}: {one.verdict}" for one in found]
        )
        axes.invert_yaxis()
        axes.set_xlabel("difference, % (lower is better), with 95 % interval")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def main() -> None:
    """Write page and figure, or print the tables."""
    arguments = parse_arguments()
    experiments = load_experiments(arguments.experiments)
    groups = Results.read(arguments.results)
    if not groups:
        raise SystemExit(f"{arguments.results} holds no results. Run benchmarks.real.run first.")
    name = None
    if arguments.figure is not None:
        draw(list(findings(groups[0], experiments)), arguments.figure)
        name = f"../_static/{arguments.figure.name}"
    region = text(groups, experiments, name)
    if arguments.page is None:
        print(region)
    else:
        write_page(arguments.page, region)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--experiments", type=Path, default=TABLE)
    parser.add_argument("--page", type=Path, help="Markdown page whose generated region is replaced; default: print")
    parser.add_argument("--figure", type=Path, help="PNG file in the folder docs/_static")
    return parser.parse_args()


if __name__ == "__main__":
    main()
