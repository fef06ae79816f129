"""A student as the draft of its teacher: laws that hold for every pair."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from minitron_hf import evaluate_models, measure_draft
from minitron_hf.cli.printing import _print_measurement
from minitron_hf.errors import DataError, MismatchError, UnsupportedModelError
from minitron_hf.publishing.card_tables import draft_table
from pocket import pocket_model

ROWS = [[(7 * start + place) % 50 + 3 for place in range(40)] for start in range(6)]
QUIET = {"num_prompts": 3, "prompt_tokens": 8, "new_tokens": 20, "draft_tokens": 3, "show_progress": False}


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama")


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_teacher_keeps_all_of_its_own_proposals(teacher, is_copy):
    found = measure_draft(teacher, copy.deepcopy(teacher) if is_copy else teacher, ROWS, **QUIET)
    assert found["acceptance"] == {"value": 1.0, "stderr": 0.0}
    assert found["tokens_per_call"]["value"] == 20 / 5  # each pass adds one token of the teacher's own
    assert found["identical_outputs"]["value"] == 1.0


def nearby(teacher, scale: float):
    """A model that often agrees with the teacher."""
    draft = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(scale * parameter.std() * noise)
    return draft


def test_counts_agree_with_a_naive_loop(teacher):
    draft = nearby(teacher, 0.15)
    found = measure_draft(teacher, draft, ROWS, **QUIET)
    accepted = proposed = calls = 0
    for row in ROWS[:3]:
        ids, end = list(row[:8]), 28
        while len(ids) < end:
            guess = list(ids)
            for _ in range(min(3, end - len(ids) - 1)):
                guess.append(int(draft(torch.tensor([guess])).logits[0, -1].argmax()))
            chosen = teacher(torch.tensor([guess])).logits[0].argmax(-1).tolist()
            kept = 0
            while len(ids) + kept < len(guess) and guess[len(ids) + kept] == chosen[len(ids) + kept - 1]:
                kept += 1
            proposed, accepted, calls = proposed + len(guess) - len(ids), accepted + kept, calls + 1
            ids = [*guess[: len(ids) + kept], chosen[len(ids) + kept - 1]]
    assert 0 < accepted < proposed
    assert found["acceptance"]["value"] == pytest.approx(accepted / proposed)
    assert found["tokens_per_call"]["value"] == pytest.approx(60 / calls)
    assert found["identical_outputs"]["value"] == 1.0


def test_settings_of_the_models_stay(teacher):
    draft = nearby(teacher, 0.1)
    before = [model.generation_config.to_dict() for model in (teacher, draft)]
    measure_draft(teacher, draft, ROWS, **QUIET)
    assert [model.generation_config.to_dict() for model in (teacher, draft)] == before


def test_pairs_that_cannot_work_are_refused(teacher):
    with pytest.raises(MismatchError, match="vocabulary"):
        measure_draft(teacher, pocket_model("llama", vocab_size=64), ROWS, **QUIET)
    with pytest.raises(DataError, match="Lower prompt_tokens"):
        measure_draft(teacher, teacher, ROWS, **{**QUIET, "prompt_tokens": 41})
    with pytest.raises(DataError, match="draft_tokens=0"):
        measure_draft(teacher, teacher, ROWS, **{**QUIET, "draft_tokens": 0})
    recurrent = pocket_model("mamba", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="stateful"):
        measure_draft(recurrent, recurrent, ROWS, **QUIET)
    with pytest.raises(DataError, match="two models"):
        evaluate_models({"teacher": teacher}, ROWS, draft_prompts=2, speed=False, show_progress=False)


def test_drafts_are_in_the_evaluation_and_in_its_tables(teacher, tmp_path, capsys):
    found = evaluate_models(
        {"teacher": teacher, "student": copy.deepcopy(teacher)},
        ROWS,
        draft_prompts=2,
        draft_tokens=3,
        speed=False,
        output_path=tmp_path,
        show_progress=False,
    )
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["draft"]["num_prompts"] == 2
    assert stored["models"]["student"]["draft"]["acceptance"]["value"] == 1.0
    assert "draft" not in stored["models"]["teacher"]
    table = {row[0]: row[1:] for row in draft_table(found)}
    assert table[""] == ["Student"]
    assert table["Proposed tokens that the teacher keeps"] == ["100 %"]
    _print_measurement(tmp_path)
    assert "As a draft of teacher, 3 tokens at a time" in capsys.readouterr().out
