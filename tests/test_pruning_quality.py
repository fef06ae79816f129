"""On a model that has learnt something, importance must be worth more than chance, and its reverse worth less."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from minitron_hf import PrunerConfig, apply_plan, estimate_importance, load_model, load_tokenizer, make_plan
from minitron_hf.data import token_rows

DEMO = Path(__file__).parent.parent / "examples" / "demo"


@pytest.fixture(scope="module")
def measured():
    """The shipped teacher, its scores on calibration text, and the loss of a student on validation text."""
    sys.path.insert(0, str(DEMO))
    try:
        from text import documents
    finally:
        sys.path.remove(str(DEMO))
    teacher, tokenizer = load_model(DEMO / "teacher", dtype=torch.float32), load_tokenizer(DEMO / "teacher")
    scores = estimate_importance(
        teacher, documents("calibration"), processing_class=tokenizer, num_rows=32, max_length=128
    )
    rows = token_rows(documents("validation"), tokenizer, max_length=128, num_rows=24)
    tokens = torch.tensor(rows.rows)

    @torch.no_grad()
    def loss(scores_, request):
        student = apply_plan(teacher, make_plan(teacher, request, scores_))
        return student(input_ids=tokens, labels=tokens).loss.item()

    return teacher, scores, loss


@pytest.mark.parametrize(
    "request_",
    [
        {"intermediate_size": 0.5},
        {"hidden_size": 0.75},
        pytest.param({"num_attention_heads": 4}, marks=pytest.mark.slow),
        pytest.param({"num_key_value_heads": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda request: next(iter(request)),
)
def test_importance_beats_chance_and_its_reverse_loses_to_it(measured, request_):
    teacher, scores, loss = measured
    request = PrunerConfig(**request_)
    chance = [loss(estimate_importance(teacher, metric="random", seed=seed), request) for seed in range(3)]
    reverse = dataclasses.replace(scores, axes={axis: -values for axis, values in scores.axes.items()})
    mean = sum(chance) / len(chance)
    assert loss(scores, request) < mean < loss(reverse, request)
