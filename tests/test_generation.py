"""Generated corpora against a naive loop: one row at a time, without a cache, without padding."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_dataset

from minitron_hf import DistillationConfig, DistillationTrainer, generate_corpus, load_text_dataset
from minitron_hf.errors import DataError, MismatchError, OutputError
from minitron_hf.files import read_json
from minitron_hf.generation import corpus as corpus_module
from minitron_hf.generation.decoding import (
    Sampling,
    continue_prompts,
    end_tokens_of,
    length_batches,
    reads_padding,
    without_generation_defaults,
)
from minitron_hf.generation.prompts import Prompts
from pocket import pocket_model, pocket_tokenizer, starting_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
QUESTIONS = [f"what is {a} {b}" + "x" * n for n, a in enumerate(("old", "new", "the")) for b in "ab"]
FAMILIES = ["llama", "gpt2", "bloom", "gemma2", "mamba2", "falcon_mamba"]


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = pocket_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@torch.no_grad()
def naive(model, ids, count, ends=(2,), choose=lambda logits, step: int(logits.argmax())):
    """New tokens, one forward pass of the whole row for each."""
    new = []
    while len(new) < count and not (new and new[-1] in ends):
        logits = model(torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
        new.append(choose(logits, len(new)))
    return new


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("train-*.jsonl")) for line in path.open()]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_batches_equal_one_row_at_a_time(name):
    model = pocket_model(name, dtype=torch.float32)
    prompts = [[5, 6, 7], [8] * 11, [9, 4], [12]]
    if reads_padding(model, prompts[0], 0):
        prompts = [prompts[0], [7, 5, 9]]
    found = continue_prompts(model, prompts, max_new_tokens=7, end_tokens=[2], pad_token_id=0)
    assert found == [naive(model, ids, 7) for ids in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_padding_is_noticed(monkeypatch, dtype):
    model = pocket_model("llama", dtype=dtype)
    assert not reads_padding(model, [5, 6, 7], 0)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, attention_mask=None, **rest: forward(*args, **rest))
    assert reads_padding(model, [5, 6, 7], 0)


def test_padding_is_tried_within_the_context():
    """Three times as many tokens would exceed the learned positions."""
    model = pocket_model("gpt2", dtype=torch.float32)
    assert not reads_padding(model, [5] * (model.config.n_positions // 2), 0)


def test_sampled_tokens_are_the_inverse_of_the_distribution(teacher):
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.8, seed=3)
    prompts, indices = [[5, 6, 7], [8] * 5], [4, 9]

    def choose(index):
        draws = np.random.default_rng([3, index]).random(6)

        def chosen(logits, step):
            probabilities = torch.softmax(logits.double() / 0.7, -1).tolist()
            kept, total = [], 0.0
            ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:9]
            mass = sum(probabilities[token] for token in ranked)
            for token in ranked:  # top-p keeps the token that reaches it
                kept.append(token)
                total += probabilities[token] / mass
                if total >= 0.8:
                    break
            limit = draws[step] * sum(probabilities[token] for token in kept)
            for token in sorted(kept):
                limit -= probabilities[token]
                if limit < 0:
                    return token
            raise AssertionError

        return chosen

    found = continue_prompts(
        teacher, prompts, max_new_tokens=6, end_tokens=[2], pad_token_id=0, sampling=sampling, indices=indices
    )
    assert found == [naive(teacher, ids, 6, choose=choose(index)) for ids, index in zip(prompts, indices)]


def test_sampling_at_temperature_1_follows_the_model(teacher):
    """Frequencies of 4,000 draws against the probabilities: chi-square per degree of freedom near 1."""
    first = continue_prompts(
        teacher, [[5, 6]] * 4000, max_new_tokens=1, end_tokens=[], pad_token_id=0, sampling=Sampling(seed=1)
    )
    with torch.no_grad():
        expected = torch.softmax(teacher(torch.tensor([[5, 6]])).logits[0, -1].double(), -1) * 4000
    counts = torch.bincount(torch.tensor(first).flatten(), minlength=len(expected)).double()
    often = expected > 5
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum() / often.sum()
    assert 0.5 < chi < 1.6


def test_the_models_own_penalties_do_not_apply(teacher):
    kept = teacher.generation_config
    changed = type(kept)(repetition_penalty=50.0, suppress_tokens=list(range(30)))
    teacher.generation_config = changed
    try:
        found = continue_prompts(teacher, [[5, 6, 7]], max_new_tokens=7, end_tokens=[2], pad_token_id=0)
        assert teacher.generation_config is changed
    finally:
        teacher.generation_config = kept
    assert found == [naive(teacher, [5, 6, 7], 7)]
    with pytest.raises(RuntimeError), without_generation_defaults(teacher):
        raise RuntimeError
    assert teacher.generation_config is kept


def test_batches_are_sorted_and_of_equal_lengths_where_asked():
    assert list(length_batches([1, 3, 2, 3, 3], 2)) == [[1, 3], [4, 2], [0]]
    assert list(length_batches([1, 3, 2, 3, 3], 2, equal_lengths=True)) == [[1, 3], [4], [2], [0]]


def test_chat_rows_are_the_greedy_answers(teacher, tokenizer, tmp_path):
    data = Dataset.from_dict({"question": QUESTIONS})
    folder = generate_corpus(
        teacher, data, tmp_path / "corpus", processing_class=tokenizer, text_field="question", do_sample=False,
        max_new_tokens=8, batch_size=4, rows_per_file=4, show_progress=False,
    )  # fmt: skip
    rows = rows_of(folder)
    ends = end_tokens_of(teacher, tokenizer)
    for index, (row, question) in enumerate(zip(rows, QUESTIONS, strict=True)):
        ids = tokenizer(f"<s>user: {question}</s><s>assistant: ", add_special_tokens=False)["input_ids"]
        new = naive(teacher, ids, 8, ends)
        answer = tokenizer.decode([token for token in new if token > 3])
        assert row == {
            "index": index,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "finished": new[-1] in ends,
            "num_new_tokens": len(new),
        }
    record = read_json(folder / "generation.json")
    assert record["format"] == 1
    assert record["complete"]
    assert [file["num_rows"] for file in record["files"]] == [4, 2]
    assert record["num_new_tokens"] == sum(row["num_new_tokens"] for row in rows)
    assert record["settings"]["do_sample"] is False
    for loaded in (load_dataset(str(folder), split="train"), load_text_dataset(str(folder))):
        assert [row["messages"] for row in loaded] == [row["messages"] for row in rows]


@pytest.mark.parametrize("make", [pocket_tokenizer, starting_tokenizer])
def test_texts_begin_with_their_prompts_or_the_begin_of_text_token(teacher, make, tmp_path):
    tokenizer = make()
    folder = generate_corpus(
        teacher, None, tmp_path / "own", processing_class=tokenizer, num_rows=3, max_new_tokens=6, show_progress=False
    )
    indexed = [
        continue_prompts(
            teacher, [[1]], max_new_tokens=6, end_tokens=[2], pad_token_id=0, sampling=Sampling(), indices=[index]
        )[0]
        for index in range(3)
    ]
    assert [row["text"] for row in rows_of(folder)] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in indexed
    ]
    folder = generate_corpus(
        teacher, ["the old man", "a"], tmp_path / "text", processing_class=tokenizer, do_sample=False,
        max_new_tokens=5, max_prompt_length=4, show_progress=False,
    )  # fmt: skip
    rows = rows_of(folder)
    for row, text in zip(rows, ["the", "a"]):  # a begin-of-text token and three characters
        ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        new = [token for token in naive(teacher, ids, 5) if token > 3]
        assert row["text"] == text + tokenizer.decode(new)


def test_prompts_of_conversations_end_before_the_answer(tokenizer):
    talk = [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "user", "value": "c"}]
    data = [{"conversations": [*talk, {"from": "gpt", "value": "d"}]}, {"prompt": "e", "tools": [{"name": "f"}]}]
    found = list(Prompts(data, tokenizer))
    assert [[m["content"] for m in prompt.messages] for prompt in found] == [["a", "b", "c"], ["e"]]
    assert found[1].columns == {"tools": '[{"name": "f"}]'}
    assert tokenizer.decode(found[0].ids) == "<s>user: a</s><s>assistant: b</s><s>user: c</s><s>assistant: "
    long = Prompts(data, tokenizer, max_length=20)
    assert [prompt.index for prompt in long] == []
    assert long.num_skipped == 2
    with pytest.raises(DataError, match=r"Prompt 0 .*no turn of a user"):
        list(Prompts([[{"role": "assistant", "content": "a"}]], tokenizer))
    with pytest.raises(DataError, match="columns question"):
        list(Prompts([{"question": "a"}], tokenizer))


def test_the_batch_size_changes_no_row(teacher, tokenizer, tmp_path):
    found = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        generate_corpus(
            teacher, QUESTIONS, folder, processing_class=tokenizer, max_new_tokens=8, batch_size=size, seed=5,
            show_progress=False,
        )  # fmt: skip
        found.append(rows_of(folder))
    assert found[0] == found[1]
    assert len({row["messages"][1]["content"] for row in found[0]}) > 1


class Killed(BaseException):
    pass


def test_resumed_equals_uninterrupted(teacher, tokenizer, tmp_path, monkeypatch):
    """Interrupted before every batch in turn, with a torn line: the same bytes, and each batch is computed once."""
    settings = {
        "processing_class": tokenizer, "max_new_tokens": 8, "batch_size": 2, "rows_per_file": 4, "show_progress": False
    }  # fmt: skip
    whole = generate_corpus(teacher, QUESTIONS, tmp_path / "whole", **settings)
    computed, limit = [], [1]

    def counted(*args, **kwargs):
        if len(computed) == limit[0]:
            raise Killed
        computed.append(1)
        return continue_prompts(*args, **kwargs)

    monkeypatch.setattr(corpus_module, "continue_prompts", counted)
    folder, times = tmp_path / "resumed", {}
    for limit[0] in (1, 2):
        with pytest.raises(Killed):
            generate_corpus(teacher, QUESTIONS, folder, **settings)
        for path in folder.glob(".unfinished-*"):
            with path.open("ab") as file:
                file.write(b'{"prompt": "torn')
        for path in folder.glob("train-*"):
            assert times.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    limit[0] = math.inf
    generate_corpus(teacher, QUESTIONS, folder, **settings)
    assert len(computed) == 3
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    generate_corpus(teacher, QUESTIONS, folder, **settings)
    assert len(computed) == 3


def test_other_settings_prompts_and_folders_are_refused(teacher, tokenizer, tmp_path):
    settings = {"processing_class": tokenizer, "max_new_tokens": 4, "show_progress": False}
    folder = generate_corpus(teacher, QUESTIONS, tmp_path / "corpus", **settings)
    with pytest.raises(MismatchError, match="seed=0, this call has 1"):
        generate_corpus(teacher, QUESTIONS, folder, seed=1, **settings)
    with pytest.raises(MismatchError, match=r"teacher\.digest"):
        generate_corpus(pocket_model("llama", dtype=torch.float32, seed=1), QUESTIONS, folder, **settings)
    with pytest.raises(MismatchError, match="other prompts"):
        generate_corpus(teacher, QUESTIONS[::-1], folder, **settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds files"):
        generate_corpus(teacher, QUESTIONS, tmp_path / "full", **settings)
    out = tmp_path / "none"
    for error, match, changes in (
        (DataError, "temperature", {"temperature": 0.0}),
        (DataError, "top_p", {"top_p": 0.0}),
        (DataError, "batch_size", {"batch_size": 0}),
        (MismatchError, "no room", {"max_new_tokens": 10**6}),
        (MismatchError, "exceed", {"max_prompt_length": 10**6}),
        (DataError, "no chat template", {"chat": True, "processing_class": pocket_tokenizer()}),
    ):
        with pytest.raises(error, match=match):
            generate_corpus(teacher, QUESTIONS, out, **{**settings, **changes})
    with pytest.raises(DataError, match="num_rows"):
        generate_corpus(teacher, None, out, **settings)
    with pytest.raises(DataError, match="no prompts"):
        generate_corpus(teacher, [], tmp_path / "empty", **settings)
    assert not out.exists()


def test_a_generated_corpus_is_distilled_from(teacher, tokenizer, tmp_path):
    folder = generate_corpus(
        teacher, QUESTIONS, tmp_path / "corpus", processing_class=tokenizer, max_new_tokens=8, show_progress=False
    )
    other = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
    )
    concatenate_datasets([load_text_dataset(str(folder)), other]).save_to_disk(tmp_path / "mix")
    args = DistillationConfig(str(tmp_path / "out"), max_steps=1, report_to="none", disable_tqdm=True)
    trainer = DistillationTrainer(
        model=pocket_model("llama", dtype=torch.float32, seed=1), teacher_model=teacher, args=args,
        train_dataset=load_text_dataset(str(tmp_path / "mix")), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    row = trainer.train_dataset[0]["input_ids"]
    assert tokenizer.decode(row).startswith("<s>user: what is old a</s><s>assistant: ")
    assert tokenizer.decode(trainer.train_dataset[-1]["input_ids"]) == "<s>user: a</s><s>assistant: b</s>"
