"""Texts are tokenised once, however often a call or a run cuts them into rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from minitron_hf import PrunerConfig, prune_model
from minitron_hf.data import TokenizedDocuments, token_rows, tokenize_once
from minitron_hf.errors import DataError
from minitron_hf.recipe import runner
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.search.architectures import search_architectures
from pocket import pocket_model, pocket_tokenizer

TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text went through a tokenizer."""
    counts: Counter[str] = Counter()
    plain = PreTrainedTokenizerBase.__call__

    def counting(self, text=None, *args, **kwargs):
        counts.update([text] if isinstance(text, str) else text)
        return plain(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counting)
    return counts


def test_documents_are_read_as_far_as_rows_are_needed_and_only_once(counted: Counter[str]):
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS * 3:
            read.append(text)
            yield text

    tokenizer = pocket_tokenizer()
    data = tokenize_once(texts(), tokenizer)
    assert isinstance(data, TokenizedDocuments)
    first = token_rows(data, tokenizer, max_length=16, num_rows=2)
    assert 0 < len(read) < 3 * len(TEXTS)  # one batch of documents
    again = [
        token_rows(data, tokenizer, max_length=length, packing=packing, overlap=overlap)
        for length, packing, overlap in ((16, True, 0), (9, False, 1), (23, True, 1))
    ]
    assert len(read) == 3 * len(TEXTS)
    assert {counted[text] for text in TEXTS} == {3}
    fresh = [
        token_rows(TEXTS * 3, tokenizer, max_length=length, packing=packing, overlap=overlap)
        for length, packing, overlap in ((16, True, 0), (9, False, 1), (23, True, 1))
    ]
    assert again == fresh
    assert first == again[0].select([0, 1])


def test_another_tokenizer_is_refused():
    data = tokenize_once(TEXTS, pocket_tokenizer())
    with pytest.raises(DataError, match="tokenised with another tokenizer"):
        token_rows(data, pocket_tokenizer(), max_length=16)


def test_rows_and_what_is_no_data_are_left_alone():
    rows = token_rows(TEXTS, pocket_tokenizer(), max_length=16)
    loader = torch.utils.data.DataLoader([{"input_ids": torch.tensor([1, 2])}])
    for data in (None, rows, loader, "text.jsonl", {"train": TEXTS}):
        assert tokenize_once(data) is data


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"target_parameters": 0.5, "multiple_of": 1}, marks=pytest.mark.slow),
        {"intermediate_size": 0.5},
    ],
)
def test_a_generator_is_scored_measured_and_refitted_on(counted: Counter[str], request_: dict):
    """Scoring, the choice of sizes and the repair read the same texts; of two iterations likewise."""
    model = pocket_model("llama", dtype=torch.float32)
    config = PrunerConfig(**request_, repair="least_squares")
    iterations = {} if "target_parameters" in request_ else {"iterations": 2}
    settings = {"processing_class": pocket_tokenizer(), "num_rows": 8, "max_length": 16, "show_progress": False}
    once = prune_model(model, config, calibration_data=iter(TEXTS), **settings, **iterations)
    assert {counted[text] for text in TEXTS} == {1}
    listed = prune_model(model, config, calibration_data=TEXTS, **settings, **iterations)
    assert all(tensor.equal(listed.state_dict()[name]) for name, tensor in once.state_dict().items())


@pytest.mark.slow
def test_a_search_tokenises_its_corpora_once(counted: Counter[str], tmp_path: Path):
    """Two candidates, two rounds each, on a corpus in memory."""
    model, tokenizer = pocket_model("llama", dtype=torch.float32), pocket_tokenizer()
    train = Dataset.from_dict({"text": [f"{text} train" for text in TEXTS]})
    found = search_architectures(
        model,
        estimate_importance(model, metric="random"),
        space={"intermediate_size": [0.25, 0.5], "num_hidden_layers": [3, 4]},
        max_parameters=1e9,
        tolerance=1.0,
        calibration_data=TEXTS,
        train_dataset=train,
        processing_class=tokenizer,
        output_dir=tmp_path,
        num_candidates=2,
        num_rounds=2,
        num_tokens=64,
        max_length=16,
        show_progress=False,
    )
    assert sum(len(candidate.rounds) for candidate in found.candidates) == 3
    assert {counted[text] for text in TEXTS} == {1}
    # TRL appends the end-of-text token itself.
    assert {count for text, count in counted.items() if " train" in text} == {1}


@pytest.mark.slow
def test_a_run_tokenises_each_corpus_once(counted: Counter[str], tmp_path: Path):
    """Score, search, repair, controls and evaluation share documents; a check before them reads the first 64 rows."""
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    pocket_tokenizer().save_pretrained(tmp_path / "teacher")
    for name in ("train", "eval", "calibration"):
        texts = [f"{name} {text}" for text in TEXTS[:: 1 if name != "eval" else 2]]
        rows = [{"body": text, "text": "other"} if name == "eval" else {"text": text} for text in texts]
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    values = {
        "teacher": str(tmp_path / "teacher"),
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": {"source": str(tmp_path / "eval.jsonl"), "text_field": "body"},
            "calibration": str(tmp_path / "calibration.jsonl"),
        },
        "output_dir": str(tmp_path / "run"),
        "prune": {"repair": "least_squares"},
        "scores": {"num_rows": 8, "max_length": 16},
        "search": {
            "space": {"intermediate_size": [0.5, 0.6]},
            "max_parameters": 1e9,
            "tolerance": 1.0,
            "num_candidates": 1,
            "num_rounds": 1,
            "num_tokens": 64,
        },
        "distill": {"max_steps": 1, "max_length": 16, "per_device_train_batch_size": 2},
        "evaluate": {"num_rows": 4, "speed": False},
        "controls": ["random_pruning"],
    }
    runner.run_recipe(Recipe.from_dict(values), until="evaluate", show_progress=False)
    for name in ("train", "eval", "calibration"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line)["body" if name == "eval" else "text"] for line in lines]
        checked, others = rows[:64], rows[64:]
        own = 0 if name == "train" else 1  # TRL's texts of the training corpus end with the end-of-text token
        assert {counted[text] for text in checked} == {own + 1}, name
        assert {counted[text] for text in others} <= {own}, name
    ended = {text: count for text, count in counted.items() if text.startswith(("train", "eval")) and "</s>" in text}
    assert set(ended.values()) <= {1}
