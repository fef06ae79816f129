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

#: Budget and seeds of a screening.
SCREEN_TOKENS, SCREEN_SEEDS = 131_072, (0,)


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        settings: value of every one of `FIELDS`.
        shape: fields of `PrunerConfig` that `settings["shape"]` names.
        loss: fields of `DistillationConfig` that `settings["loss"]` names.
        base: the settings that its name leaves out.
    """

    settings: Mapping[str, Any]
    shape: Mapping[str, Any]
    loss: Mapping[str, Any]
    base: Mapping[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    @property
    def name(self) -> str:
        """The changes of the base arm, with tokens and seed, as a file name."""
        changed = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.settings.items()
            if value != self.base[name] or name in ("tokens", "seed")
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
        return {**values, "seed": self["seed"] if self["metric"] in ("random", "none") else None}

    def identity(self) -> dict[str, Any]:
        """Settings that determine the result, besides teacher and data, with the contents of named tables."""
        return {**self.settings, "shape": dict(self.shape), "loss": dict(self.loss)}

    def at(self, **changes: Any) -> Arm:
        """The arm at another budget or seed."""
        return replace(self, settings={**self.settings, **changes})


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
    if unknown := set(base) ^ set(FIELDS):
        raise ValueError(f"{path}: base has other fields than expected: {', '.join(sorted(unknown))}.")

    def arm(changes: Mapping[str, Any]) -> Arm:
        if unknown := set(changes) - set(FIELDS):
            raise ValueError(
                f"{path}: an arm has no field {', '.join(sorted(unknown))}. Expected: {', '.join(FIELDS)}."
            )
        settings = {name: changes.get(name, base[name]) for name in FIELDS}
        for name, kind in (("shape", "shapes"), ("loss", "losses")):
            if settings[name] not in table[kind]:
                raise ValueError(f"{path}: {name}={settings[name]!r} is not in the table of {kind}.")
        return Arm(settings, table["shapes"][settings["shape"]], table["losses"][settings["loss"]], base)

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
