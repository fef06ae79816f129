"""Says what distillation makes of a start: the KL after it against the KL before it, for starts trained alike.

Fits after = a · before^b to the starts of one token budget (least squares of the logarithms), counts the pairs of
starts that keep their order, and compares the kinds of cut by after / fitted: below 1, distillation recovers more.

    python -m benchmarks.real.recovery --page docs/explanation/real-teachers.md
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .arms import OPTIONAL_FIELDS, START_FIELDS, Arm, load_experiments
from .measure import unpacked
from .peers import DISTILLED
from .peers import RESULTS as PEERS
from .peers import TABLE as PEERS_TABLE
from .report import Results, _thousands, measured_arms, write_page

STARTS = PEERS.with_name("starts")
STARTS_TABLE = PEERS_TABLE.with_name("starts.yaml")
REGION = "benchmarks.real.recovery"
#: Starts of one budget that a fit needs.
LEAST_STARTS = 4
#: Field of `PrunerConfig` → the units that a shape cuts.
UNITS = {
    "num_hidden_layers": "layers",
    "intermediate_size": "neurons",
    "num_attention_heads": "heads",
    "hidden_size": "channels",
}


@dataclass(frozen=True)
class Recovery:
    """One start at one budget.

    Attributes:
        label: of its arm.
        kind: the units that it cuts, or the other pruner.
        tokens: of the distillation.
        before: KL to the teacher before distillation, nats per token, mean over seeds.
        after: the same after distillation.
        num_seeds: number of seeds.
    """

    label: str
    kind: str
    tokens: int
    before: float
    after: float
    num_seeds: int


@dataclass(frozen=True)
class Law:
    """after = factor · before^exponent.

    Attributes:
        spread: standard deviation of ln(after / fitted), with two degrees of freedom less than starts.
    """

    factor: float
    exponent: float
    spread: float

    def fitted(self, before: float) -> float:
        """KL after distillation, in nats per token, that the law expects of a start."""
        return self.factor * before**self.exponent


def fit(found: Sequence[Recovery]) -> Law:
    """The law of starts with several different KLs."""
    x, y = ([math.log(value) for value in values] for values in zip(*((one.before, one.after) for one in found)))
    slope, intercept = statistics.linear_regression(x, y)
    squares = sum((after - intercept - slope * before) ** 2 for before, after in zip(x, y))
    return Law(math.exp(intercept), slope, math.sqrt(squares / (len(found) - 2)))


def pairs_in_order(found: Sequence[Recovery]) -> tuple[int, int]:
    """Number of pairs whose nearer start ends nearer, and number of all pairs."""
    pairs = list(itertools.combinations(found, 2))
    return sum((one.before - other.before) * (one.after - other.after) > 0 for one, other in pairs), len(pairs)


def recoveries(results: Results, table: Path) -> Iterator[Recovery]:
    """The starts of a table that are trained as its base arm is, at every budget."""
    domain = results.domains[0]
    total = sum(results.counts(domain))
    for _, arm, tokens, seeds in measured_arms(results, load_experiments(table)):
        if is_trained_as_base(arm):
            before, after = (
                statistics.fmean(sum(unpacked(one["rows"][when][domain]["kl"])) / total for one in seeds.values())
                for when in ("before", "after")
            )
            yield Recovery(arm.label, kind(arm), tokens, before, after, len(seeds))


def is_trained_as_base(arm: Arm) -> bool:
    """Whether an arm differs from the base arm in its start, tokens and seed alone."""
    own = {*START_FIELDS, *OPTIONAL_FIELDS, "tokens", "seed"} - {"first_shape"}
    return all(value == arm.base.get(name) for name, value in arm.settings.items() if name not in own)


def kind(arm: Arm) -> str:
    """The units that an arm cuts."""
    if arm["method"] != OPTIONAL_FIELDS["method"]:
        return "other pruners"
    random = "random " if arm["metric"] == "random" else ""
    return random + " and ".join(word for name, word in UNITS.items() if name in arm.shape)


def section(found: Sequence[Recovery]) -> list[str]:
    """Markdown lines: for every budget the law, the order, the kinds of cut and the starts."""
    lines: list[str] = []
    for tokens in sorted({one.tokens for one in found}):
        starts = sorted((one for one in found if one.tokens == tokens), key=lambda one: one.before)
        if len(starts) < LEAST_STARTS:
            continue
        law, (kept, pairs) = fit(starts), pairs_in_order(starts)
        lines += [
            f"### {_thousands(tokens)} tokens",
            "",
            f"KL after distillation ≈ {law.factor:.3f} · (KL before)^{law.exponent:.2f}, with a spread of "
            f"{law.spread:.1%} ({len(starts)} starts). {kept} of {pairs} pairs of starts keep their order.",
            "",
            "| cut | starts | after / fitted |",
            "|---|---|---|",
        ]
        for name in sorted({one.kind for one in starts}):
            ratios = [one.after / law.fitted(one.before) for one in starts if one.kind == name]
            error = f" ± {statistics.stdev(ratios) / math.sqrt(len(ratios)):.3f}" if len(ratios) > 1 else ""
            lines.append(f"| {name} | {len(ratios)} | {statistics.fmean(ratios):.3f}{error} |")
        lines += ["", "| start | cut | seeds | KL before | KL after | after / fitted |", "|---" * 6 + "|"]
        lines += [
            f"| {one.label} | {one.kind} | {one.num_seeds} | {one.before:.3f} | {one.after:.3f} | "
            f"{one.after / law.fitted(one.before):.3f} |"
            for one in starts
        ]
        lines.append("")
    return lines


def committed(
    folders: Sequence[tuple[Path, Path]] = ((STARTS, STARTS_TABLE), (PEERS / DISTILLED, PEERS_TABLE)),
) -> list[str]:
    """The section of the results in folders, each with its table of arms."""
    found: list[Recovery] = []
    for folder, table in folders:
        for results in Results.read(folder):
            found += recoveries(results, table)
    return section(found)


def main() -> None:
    """Write the region of a page, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="Markdown page whose generated region is replaced; default: print")
    arguments = parser.parse_args()
    region = "\n".join(committed())
    if arguments.page is None:
        print(region)
    else:
        write_page(arguments.page, region, REGION)


if __name__ == "__main__":
    main()
