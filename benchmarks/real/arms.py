"""The table of arms: reads `experiments.yaml`, names every arm, and says which ones an experiment runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from minitron_hf.files import digest

TABLE = Path(__file__).with_name("experiments.yaml")

#: Fields of `base`, in the order in which they stand in an arm's name.
FIELDS = (
    "shape",
    "metric",
    "repair",
    "calibration_rows",
    "calibration_length",
    "loss",
    "learning_rate",
    "schedule",
    "warmup",
    "tokens_per_step",
    "optimizer",
    "length",
    "corpus",
    "train",
    "teacher",
    "teacher_original_learning_rate",
    "tokens",
    "seed",
)
#: Fields that decide the pruned start.
START_FIELDS = ("shape", "metric", "repair", "calibration_rows", "calibration_length")
#: Fields that an arm has only where it changes them, with the value of all others: pruning method (`peer_starts`),
#: calibration corpus (None: the base arm's corpus), reductions of the scores, metric that ranks layers, and the shape
#: of a first round of pruning and distillation, which gets half of the tokens.
OPTIONAL_FIELDS: dict[str, Any] = {
    "method": "ours",
    "calibration": None,
    "batch_reduction": "l2",
    "sequence_reduction": "mean",
    "depth_metric": None,
    "first_shape": None,
}

#: Budget and seeds of a screening.
SCREEN_TOKENS, SCREEN_SEEDS = 131_072, (0,)


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        settings: value of every one of `FIELDS`, and of those of `OPTIONAL_FIELDS` that it or the base sets.
        shape: fields of `PrunerConfig` that `settings["shape"]` names.
        loss: fields of `DistillationConfig` that `settings["loss"]` names.
        base: the settings that its name leaves out.
        first: fields of `PrunerConfig` of the first of two rounds; None where there is one.
    """

    settings: Mapping[str, Any]
    shape: Mapping[str, Any]
    loss: Mapping[str, Any]
    base: Mapping[str, Any] = field(repr=False)
    first: Mapping[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.settings[name] if name in self.settings else OPTIONAL_FIELDS[name]

    @property
    def name(self) -> str:
        """The changes of the base arm, with tokens and seed, as a file name."""
        changed = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.settings.items()
            if value != self.base.get(name, OPTIONAL_FIELDS.get(name)) or name in ("tokens", "seed")
        ]
        return ",".join(changed)

    @property
    def label(self) -> str:
        """The changes of the base arm, without tokens and seed, for tables."""
        changed = [part for part in self.name.split(",") if not part.startswith(("tokens=", "seed="))]
        return ", ".join(part.replace("=", " ") for part in changed) or "base"

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self["tokens"] // self["tokens_per_step"])

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step."""
        return max(1, self["tokens_per_step"] // self["length"])

    def start(self) -> dict[str, Any]:
        """The settings that determine the student before distillation, with the seed if it is random."""
        values = {name: self[name] for name in START_FIELDS if name != "shape"} | {"shape": dict(self.shape)}
        values |= {name: value for name, value in self.settings.items() if name in OPTIONAL_FIELDS}
        values |= {} if self.first is None else {"first_shape": dict(self.first)}
        return {**values, "seed": self["seed"] if self["metric"] in ("random", "none") else None}

    def identity(self) -> dict[str, Any]:
        """Settings that determine the result, besides teacher and data, with the contents of named tables."""
        first = {} if self.first is None else {"first_shape": dict(self.first)}
        return {**self.settings, "shape": dict(self.shape), "loss": dict(self.loss), **first}

    def at(self, **changes: Any) -> Arm:
        """The arm at another budget or seed."""
        return replace(self, settings={**self.settings, **changes})

    def rounds(self) -> tuple[Arm, ...]:
        """The rounds of pruning and distillation, each as an arm: the arm itself, or two with half of its tokens."""
        if self.first is None:
            return (self,)
        settings = {name: value for name, value in self.settings.items() if name != "first_shape"}
        settings["tokens"] //= 2
        first = replace(self, settings={**settings, "shape": self["first_shape"]}, shape=self.first, first=None)
        return first, replace(self, settings=settings, first=None)


@dataclass(frozen=True)
class Claim:
    """A claim that `better` has a lower or the same `measure` as `than`. Both are changes of the base arm."""

    text: str
    source: str
    better: Arm
    than: Arm
    measure: str
    expect: str = "lower"


@dataclass(frozen=True)
class Experiment:
    """A question, its arms and the claims that they test."""

    name: str
    title: str
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    tokens: Sequence[int]
    seeds: Sequence[int]

    def runs(self, tokens: Sequence[int] | None = None, seeds: Sequence[int] | None = None) -> Iterator[Arm]:
        """Its arms at every budget and seed, smallest budget first. Given budgets and seeds replace its own."""
        for budget, seed, arm in itertools.product(tokens or self.tokens, seeds or self.seeds, self.arms):
            yield arm.at(tokens=budget, seed=seed)


def load_experiments(path: str | Path = TABLE) -> dict[str, Experiment]:
    """The experiments of a table, by name.

    Raises:
        ValueError: if a field or a name is unknown.
    """
    table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    base = table["base"]
    if unknown := (set(base) - set(OPTIONAL_FIELDS)) ^ set(FIELDS):
        raise ValueError(f"{path}: base has other fields than expected: {', '.join(sorted(unknown))}.")

    def arm(changes: Mapping[str, Any]) -> Arm:
        if unknown := set(changes) - set(FIELDS) - set(OPTIONAL_FIELDS):
            expected = ", ".join([*FIELDS, *OPTIONAL_FIELDS])
            raise ValueError(f"{path}: an arm has no field {', '.join(sorted(unknown))}. Expected: {expected}.")
        settings = {name: changes.get(name, base[name]) for name in FIELDS}
        for name, default in OPTIONAL_FIELDS.items():
            value = changes.get(name, base.get(name, default))
            if name in base or value != default:
                settings[name] = value
        for name, kind in (("shape", "shapes"), ("first_shape", "shapes"), ("loss", "losses")):
            if name in settings and settings[name] not in table[kind]:
                raise ValueError(f"{path}: {name}={settings[name]!r} is not in the table of {kind}.")
        shape, first = table["shapes"][settings["shape"]], table["shapes"].get(settings.get("first_shape"))
        return Arm(settings, shape, table["losses"][settings["loss"]], base, first)

    experiments = {}
    for name, values in table["experiments"].items():
        grid = values.get("grid", {})
        arms = [arm(changes) for changes in values.get("arms", [])]
        arms += [arm(dict(zip(grid, point))) for point in itertools.product(*grid.values()) if grid]
        claims = [
            Claim(
                one["text"], one["source"], arm(one["better"]), arm(one["than"]), measure, one.get("expect", "lower")
            )
            for one in values.get("claims", [])
            for measure in one["measures"]
        ]
        known = [one.settings for one in arms]
        for claim in claims:
            for side in (claim.better, claim.than):
                if side.settings not in known:
                    raise ValueError(f"{path}: the claim {claim.text!r} compares {side.label}, no arm of {name}.")
        experiments[name] = Experiment(
            name,
            values["title"],
            arms,
            claims,
            values.get("tokens", [base["tokens"]]),
            values.get("seeds", [base["seed"]]),
        )
    return experiments


def key(*parts: Any) -> str:
    """A short name computed from contents, for files that are reused only if all contents are equal."""
    return digest(*parts).removeprefix("sha256:")[:12]
