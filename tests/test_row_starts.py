"""Rows begin as the teacher expects, and what is added there is context alone: never scored, counted or a target."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from torch import nn

from minitron_hf.data import TokenRows, token_rows
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.pruning.candidates import Candidate, Divergence
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.row_starts import warn_of_later_rows, warn_of_missing_separator
from minitron_hf.sizes.request import PrunerConfig
from pocket import float64_throughout, pocket_model, pocket_tokens, starting_tokenizer

BOS = 1
LENGTHS = (9, 4, 12, 7, 3)
WHOLE = tuple(tuple(pocket_tokens(length + 3, seed=length).tolist()) for length in LENGTHS)
#: The last three tokens of every row are context alone. Nothing before them sees them.
MARKED = TokenRows(WHOLE, None, context=tuple((n, n + 1, n + 2) for n in LENGTHS))
CUT = TokenRows(tuple(row[:-3] for row in WHOLE), None)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("settings", [{"metric": "activation"}, {"metric": "taylor"}, {"depth_metric": "perplexity"}])
def test_tokens_that_are_context_alone_are_not_scored(name: str, settings: dict, batch_size: int):
    model = pocket_model(name)
    with float64_throughout():
        found, expected = (
            estimate_importance(model, rows, batch_size=batch_size, show_progress=False, **settings)
            for rows in (MARKED, CUT)
        )
    for axis, scores in expected.axes.items():
        torch.testing.assert_close(found.axes[axis], scores, rtol=1e-6, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(found.blocks, expected.blocks, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert found.settings["num_tokens"] == expected.settings["num_tokens"] == sum(LENGTHS)


def test_neither_are_they_repaired_or_compared():
    model, other = pocket_model("llama"), pocket_model("llama", seed=1)
    config = PrunerConfig(intermediate_size=0.5, repair="least_squares")
    with float64_throughout():
        plan = make_plan(model.config, config, estimate_importance(model, CUT, show_progress=False))
        found, expected = (repaired_weights(model, plan, rows) for rows in (MARKED, CUT))
        assert found.keys() == expected.keys() != set()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-9)
        values = [Divergence(model, rows, 2)(other, Candidate("x", config, {}, 0)) for rows in (MARKED, CUT)]
    assert values[0] == pytest.approx(values[1])


def test_evaluation_measures_every_token_of_the_text_once_and_nothing_else():
    """A naive loop: every row is run alone; the first rows begin with <s>, later ones with <s> and one known token."""
    tokenizer, model = starting_tokenizer(), pocket_model("llama")
    texts = ["Once upon a time there was a small model.", "It read books."]
    result = evaluate_models(
        {"model": model}, texts, processing_class=tokenizer, max_length=16, speed=False, show_progress=False
    )
    total = 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row, known = [BOS, *ids[:15]], 1
        while True:
            log_p = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
            total -= sum(log_p[place - 1, row[place]].item() for place in range(known, len(row)))
            if not (ids := ids[15 if known == 1 else 14 :]):
                break
            row, known = [BOS, row[-1], *ids[:14]], 2
    num_tokens = len("".join(texts))
    assert result["data"]["num_tokens"] == result["data"]["num_bytes"] == num_tokens
    assert result["models"]["model"]["metrics"]["loss"]["value"] == pytest.approx(total / num_tokens, rel=1e-6)


class Sensitive(nn.Module):
    """A teacher that knows the next token (one more than the last) only on rows that begin with <s>."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def get_input_embeddings(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> types.SimpleNamespace:
        sharpness = 8.0 * (input_ids[:, :1, None] == BOS)
        return types.SimpleNamespace(logits=sharpness * nn.functional.one_hot((input_ids + 1) % 90, 90))


@pytest.mark.parametrize("adds", [False, True])
def test_a_teacher_that_is_broken_on_later_rows_is_warned_about(adds: bool, caplog: pytest.LogCaptureFixture):
    documents = [list(range(first, first + 40)) for first in range(5, 45, 5)]
    if adds:
        rows = token_rows(documents, starting_tokenizer(), max_length=12, packing=False, overlap=1)
    else:
        rows = token_rows([[BOS, *ids] for ids in documents], max_length=12, packing=False, overlap=1)
    with caplog.at_level(logging.WARNING):
        warn_of_later_rows(Sensitive(), rows, "teacher")  # type: ignore[arg-type]
        packed = token_rows(documents, starting_tokenizer() if adds else None, max_length=12)
        warn_of_missing_separator(Sensitive(), packed, [BOS])  # type: ignore[arg-type]
    assert len(caplog.messages) == (0 if adds else 2)
    for message in caplog.messages:
        assert "add_bos_token" in message


def test_a_teacher_that_reads_later_rows_as_well_is_not_warned_about(caplog: pytest.LogCaptureFixture):
    model = pocket_model("llama")
    documents = [pocket_tokens(50, seed=seed).tolist() for seed in range(6)]
    with caplog.at_level(logging.WARNING):
        warn_of_later_rows(model, token_rows(documents, max_length=12, packing=False, overlap=1))
        warn_of_missing_separator(model, token_rows(documents, max_length=12), [BOS])
    assert not caplog.messages
