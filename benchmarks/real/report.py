"""Writes the tables and the figure of the measurements on real teachers from their JSON files.

Claims are judged by paired differences on the same rows, see `intervals`. A verdict needs three seeds and more tokens
than a screening has; other findings are tendencies. Run from the repository root:

    python -m benchmarks.real.report --page docs/explanation/real-teachers.md --figure docs/_static/real-teachers.png
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_hf.evaluation.means import mean_and_error
from minitron_hf.files import read_json, replacing_file, write_text
from minitron_hf.publishing.drawing import BLUE, DPI, GREY, ORANGE

from .arms import SCREEN_TOKENS, TABLE, Arm, Claim, Experiment, load_experiments
from .intervals import EQUIVALENCE, Difference, Verdict, paired_difference, verdict
from .measure import bits_per_byte, unpacked
from .run import RESULTS
from .tasks_report import FOLDER as TASKS_FOLDER
from .tasks_report import TaskScores, tasks_section

#: The region of a page that holds the tables of `experiments.yaml`; another table's has its own name.
REGION = "benchmarks/real"

#: Measure of a claim → the value that is kept of every row.
KEPT_AS = {"kl": "kl", "loss": "loss", "bits_per_byte": "loss", "disagreement": "agree"}
COLOURS: dict[Verdict, str] = {"confirmed": BLUE, "refuted": ORANGE, "undecided": GREY}

#: Seeds that a verdict needs.
VERDICT_SEEDS = 3
#: What a finding is called that is no verdict.
TENDENCIES: dict[Verdict, str] = {"confirmed": "for the claim", "refuted": "against it", "undecided": "open"}


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
            result["name"] = path.stem
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

    @property
    def is_final(self) -> bool:
        """Whether it is a verdict; otherwise a tendency."""
        return self.difference.num_seeds >= VERDICT_SEEDS and self.tokens > SCREEN_TOKENS

    @property
    def words(self) -> str:
        """The verdict or the tendency."""
        return self.verdict if self.is_final else TENDENCIES[self.verdict]

    @property
    def measure(self) -> str:
        """The measure in words."""
        return self.claim.measure.replace(".", ", ").replace("_", " ").replace("kl", "KL")

    @property
    def numbers(self) -> str:
        """Relative difference and interval in words."""
        value, low, high = (f"{100 * part:+.1f}" for part in self.difference.relative)
        return f"{value} % [{low}, {high}]"


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


def claims_table(found: Sequence[Finding], last: str) -> list[str]:
    """Markdown lines; `last` is the head of the last column."""
    lines = [
        f"| claim | source | arms | tokens | seeds | measure | difference, 95 % interval | {last} |",
        "|---" * 8 + "|",
    ]
    for finding in found:
        claim, words = finding.claim, f"**{finding.words}**" if finding.is_final else finding.words
        lines.append(
            f"| {claim.text} | {claim.source} | {claim.better.label} – {claim.than.label} | "
            f"{_thousands(finding.tokens)} | {finding.difference.num_seeds} | {finding.measure} | {finding.numbers} | "
            f"{words} |"
        )
    return lines


def claims_section(
    found: Sequence[Finding], experiments: dict[str, Experiment], figure: str | None, others: Sequence[Finding]
) -> list[str]:
    """Verdicts, tendencies and the figure, as Markdown lines; `others` were computed in another dtype."""
    final, tendencies = by_strength(found)
    total = sum(len(experiment.claims) for experiment in experiments.values())
    seen = {id(finding.claim) for finding in found}
    decided = {id(finding.claim) for finding in final}
    apart = {id(finding.claim) for finding in others} - seen
    in_other = f"{len(apart)} measured in another dtype, " if apart else ""
    num_missing = total - len(seen) - len(apart)
    lines = [
        "## Claims",
        "",
        f"{total} claims: {len(decided)} with a verdict, {len(seen - decided)} with a tendency, {in_other}"
        f"{num_missing} not measured. A difference is that of two arms on the same held-out rows, as a part of the "
        "second arm's value. Lower is better.",
        "",
    ]
    if figure:
        lines += [f"![Relative differences of the claims, with 95 % intervals]({figure})", ""]
    if final:
        lines += [
            "### Verdicts",
            "",
            f"At least {VERDICT_SEEDS} seeds and more than {SCREEN_TOKENS:,} tokens. The interval counts rows and "
            "seeds.",
            "",
            *claims_table(final, "verdict"),
            "",
        ]
    if tendencies:
        lines += [
            "### Tendencies",
            "",
            f"From a screening: fewer than {VERDICT_SEEDS} seeds, or {SCREEN_TOKENS:,} tokens. With one seed, the "
            "interval counts the held-out rows alone, not the chance in training. **These are no verdicts.**",
            "",
            *claims_table(tendencies, "tendency"),
            "",
        ]
    return lines


def by_strength(found: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Verdicts; and tendencies, of claims without a verdict or with more tokens than it has."""
    final = [finding for finding in found if finding.is_final]
    decided = {id(finding.claim): finding.tokens for finding in final}  # smaller budgets come first
    return final, [finding for finding in found if finding.tokens > decided.get(id(finding.claim), 0)]


def measured_arms(
    results: Results, experiments: dict[str, Experiment]
) -> Iterator[tuple[Experiment, Arm, int, dict[int, dict[str, Any]]]]:
    """Experiment, arm, budget and results by seed: every arm at every budget once, in the first experiment with it."""
    known = set()
    for experiment in experiments.values():
        for tokens in results.budgets():
            for arm in experiment.arms:
                [found] = results.seeds(arm.at(tokens=tokens))
                if found and (arm.label, tokens) not in known:
                    known.add((arm.label, tokens))
                    yield experiment, arm, tokens, found


def arms_table(results: Results, experiments: dict[str, Experiment]) -> list[str]:
    """Markdown lines."""
    first = results.domains[0]
    heads = [f"bits per byte, {domain}" for domain in results.domains]
    lines = [
        f"| experiment | arm | tokens | seeds | KL on {first}, before | after | agreement | {' | '.join(heads)} |",
        "|---" * (7 + len(heads)) + "|",
    ]
    for experiment, arm, tokens, found in measured_arms(results, experiments):
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


def text(groups: Sequence[Results], experiments: dict[str, Experiment], figure: str | None, tasks: Path) -> str:
    """The generated region of the page; `tasks` is the folder of the scores on tasks."""
    parts = []
    found_in = [list(findings(results, experiments)) for results in groups]
    for number, (results, found) in enumerate(zip(groups, found_in, strict=True)):
        others = [one for other, ones in enumerate(found_in) if other != number for one in ones]
        parts += [described(results), ""]
        if found:
            parts += claims_section(found, experiments, None if number else figure, others)
        parts += ["## Arms", "", *arms_table(results, experiments), ""]
        teacher = results.any["teacher"]
        models = [
            ([arm.label, _thousands(tokens)], [result["name"] for result in seeds.values()])
            for _, arm, tokens, seeds in measured_arms(results, experiments)
        ]
        parts += tasks_section(TaskScores.read(tasks, teacher["digest"], teacher["computed_in"]), models)
    return "\n".join(parts)


def write_page(page: Path, region: str, name: str = REGION) -> None:
    """Replace a generated region of a page; a new page holds nothing else."""
    begin, end = (f"<!-- results of {name}: {where} -->" for where in ("begin", "end"))
    before, after = "# Real teachers\n\n", ""
    if page.is_file():
        content = page.read_text(encoding="utf-8")
        if begin not in content or end not in content:
            raise ValueError(f"{page} has no lines {begin!r} and {end!r}, between which the results go. Add them.")
        before, after = content.partition(begin)[0], content.partition(end)[2]
    write_text(page, f"{before}{begin}\n\n{region}\n{end}{after or chr(10)}")


# ---- Figure ----


#: Differences beyond this, in percent, are drawn as arrows at the edge; their numbers stand beside them.
EDGE = 25


def draw(found: Sequence[Finding], path: Path) -> None:
    """Forest plot: relative difference and interval of every claim, and the band that counts as equal.

    Verdicts come first, with filled points and bold words; tendencies have hollow points and thin lines.
    """
    import matplotlib
    from matplotlib.figure import Figure

    parts = [part for part in by_strength(found) if part]
    num_lines = sum(len(part) for part in parts)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(11, 0.6 + 0.35 * len(parts) + 0.4 * num_lines), layout="constrained")
        heights = [len(part) for part in parts]
        rows = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, part in zip(rows, parts, strict=True):
            _draw_findings(axes, part)
        rows[-1].set_xlabel("difference, % (below 0: as claimed; grey: counts as equal), with 95 % interval")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def _draw_findings(axes: Any, found: Sequence[Finding]) -> None:
    """Verdicts, or tendencies, into one plot."""
    final = found[0].is_final
    kind = f"Verdicts: {VERDICT_SEEDS} seeds or more" if final else "Tendencies from the screening: no verdicts"
    axes.set_title(kind, loc="left", fontsize=9, fontweight="bold" if final else "normal")
    axes.axvspan(-100 * EQUIVALENCE, 100 * EQUIVALENCE, color=GREY, alpha=0.2, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-EDGE, EDGE)
    for place, finding in enumerate(found):
        value, low, high = (100 * part for part in finding.difference.relative)
        colour = COLOURS[finding.verdict]
        face = colour if final else "white"
        if abs(value) > EDGE:
            edge = EDGE if value > 0 else -EDGE
            style = {"marker": ">" if value > 0 else "<", "clip_on": False}
            axes.plot([edge], [place], color=colour, markerfacecolor=face, markersize=6, **style)
        else:
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5 if final else 1)
            axes.plot([value], [place], "o", color=colour, markerfacecolor=face, markersize=5)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_yticks(range(len(found)), [_label(finding) for finding in found])
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(range(len(found)), [f"{finding.numbers}\n{finding.words}" for finding in found])
    right.tick_params(length=0)
    for text_of, finding in zip(right.get_yticklabels(), found, strict=True):
        text_of.set(color=COLOURS[finding.verdict], fontweight="bold" if final else "normal")


def _label(finding: Finding) -> str:
    seeds = finding.difference.num_seeds
    small = f"{finding.measure}, {_thousands(finding.tokens)} tokens, {seeds} seed{'s' if seeds > 1 else ''}"
    return f"{textwrap.shorten(finding.claim.text, 80, placeholder='…')}\n{small}"


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
    region = text(groups, experiments, name, arguments.results / TASKS_FOLDER)
    if arguments.page is None:
        print(region)
    else:
        write_page(arguments.page, region, arguments.region)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--experiments", type=Path, default=TABLE)
    parser.add_argument("--page", type=Path, help="Markdown page whose generated region is replaced; default: print")
    parser.add_argument("--region", default=REGION, help="name of that region: another table of arms has its own")
    parser.add_argument("--figure", type=Path, help="PNG file in the folder docs/_static")
    return parser.parse_args()


if __name__ == "__main__":
    main()
