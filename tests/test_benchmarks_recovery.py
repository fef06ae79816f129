"""KL before and after distillation: the fit against NumPy's, the order against ranks, the table against the page."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import peers, recovery
from benchmarks.real.arms import load_experiments
from benchmarks.real.recovery import Recovery, fit, is_trained_as_base, kind, pairs_in_order, section

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "real-teachers.md"


def starts(count: int, tokens: int = 131_072) -> list[Recovery]:
    random = np.random.default_rng(count)
    values = random.uniform(0.3, 3, (count, 2))
    return [Recovery(f"arm {at}", "neurons", tokens, *map(float, pair), 1) for at, pair in enumerate(values)]


def test_the_fit_is_the_straight_line_of_logarithms():
    found = starts(9)
    x, y = np.log([[one.before, one.after] for one in found]).T
    (slope, intercept), [squares], *_ = np.polyfit(x, y, 1, full=True)
    law = fit(found)
    assert (law.exponent, law.factor) == pytest.approx((slope, np.exp(intercept)))
    assert law.spread == pytest.approx(np.sqrt(squares / 7))
    exact = [replace(one, after=0.7 * one.before**0.5) for one in found]
    assert fit(exact).fitted(2.0) == pytest.approx(0.7 * 2**0.5)
    assert fit(exact).spread == pytest.approx(0, abs=1e-6)


def test_pairs_are_in_order_by_brute_force():
    found = starts(7)
    kept = 0
    for one, other in itertools.combinations(found, 2):
        nearer, farther = sorted((one, other), key=lambda start: start.before)
        kept += nearer.after < farther.after
    assert 0 < kept < 21
    assert pairs_in_order(found) == (kept, 21)


def test_kinds_are_compared_by_what_the_law_leaves():
    """Neurons end 10 % above the law and layers 10 % below it, at the same starts."""
    found = [
        Recovery(f"{word} {before}", word, 1000, before, before**0.5 * factor, 1)
        for before in (0.5, 1.0, 2.0)
        for word, factor in (("neurons", 1.1), ("layers", 0.9))
    ]
    lines = section([*found, *starts(3, tokens=2000)])  # three starts are too few for a law
    assert "### 1k tokens" in lines
    assert "### 2k tokens" not in lines
    middle = (1.1 * 0.9) ** 0.5
    assert f"| layers | 3 | {0.9 / middle:.3f} ± 0.000 |" in lines
    assert f"| neurons | 3 | {1.1 / middle:.3f} ± 0.000 |" in lines


def test_only_starts_with_the_training_of_the_base_arm_are_compared():
    arms = [arm for one in load_experiments(recovery.STARTS_TABLE).values() for arm in one.arms]
    left = {arm.label for arm in arms if not is_trained_as_base(arm)}
    assert "shape 26-layers-ffn-960, repair sequential, loss ce" in left
    assert "first_shape 27-layers-ffn-1310" in left
    training = ("tokens_per_step", "loss", "first_shape", "train")
    assert all(any(word in label for word in training) for label in left)
    assert {kind(arm) for arm in arms} >= {"neurons", "layers and neurons", "layers", "neurons and channels"}
    assert {kind(arm) for one in load_experiments(peers.TABLE).values() for arm in one.arms} >= {"other pruners"}


def test_the_page_has_the_section_of_the_committed_results():
    begin, end = (f"<!-- results of {recovery.REGION}: {where} -->" for where in ("begin", "end"))
    region = PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert region.strip() == "\n".join(recovery.committed()).strip()
