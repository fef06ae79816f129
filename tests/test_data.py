"""Token rows: every token once, nothing lost, and clear refusals."""

from __future__ import annotations

import json
from collections import UserDict
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from minitron_hf.data import TokenRows, load_text_dataset, padded_batches, position_ids, token_rows, tokenize
from minitron_hf.errors import DataError
from pocket import pocket_tokenizer

BOS = 1
TEXTS = ["Once upon a time", "a", "", "  \n", "The end of the story.", "x" * 23]


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer()


def streams(*lengths: int) -> list[list[int]]:
    """Documents of distinct tokens, so that every pair of neighbours is unique."""
    tokens = iter(range(3, 1000))
    return [[next(tokens) for _ in range(length)] for length in lengths]


def predicted(rows: TokenRows) -> list[tuple[int, int]]:
    """(context's last token, predicted token) of every prediction that the rows make."""
    return [pair for row in rows.rows for pair in pairwise(row)]


LENGTHS = [(7, 2, 30, 1, 16, 15, 17), (4,), (2, 2, 2), (100,)]


# Rows


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("max_length", [2, 3, 4, 15, 16, 17, 200])
def test_every_token_is_predicted_exactly_once_with_overlap(lengths: tuple[int, ...], max_length: int):
    documents = streams(*lengths)
    alone = token_rows(documents, max_length=max_length, packing=False, overlap=1)
    assert predicted(alone) == [pair for document in documents for pair in pairwise(document)]
    packed = token_rows(documents, max_length=max_length, packing=True, overlap=1)
    assert predicted(packed) == list(pairwise(chain(*documents)))
    for rows in (alone, packed):
        assert all(2 <= len(row) <= max_length for row in rows.rows)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("max_length", [2, 5, 16, 200])
def test_packed_rows_are_the_stream_cut_into_full_rows(lengths: tuple[int, ...], max_length: int):
    stream = list(chain(*streams(*lengths)))
    rows = token_rows(streams(*lengths), max_length=max_length)
    joined = [token for row in rows.rows for token in row]
    # A last single token predicts nothing and is left out.
    assert joined == (stream[:-1] if len(stream) % max_length == 1 else stream)
    assert all(len(row) == max_length for row in rows.rows[:-1])


def test_documents_keep_to_their_own_rows_without_packing():
    documents = streams(5, 12, 1, 3)
    rows = token_rows(documents, max_length=5, packing=False)
    assert [list(row) for row in rows.rows] == [
        documents[0],
        documents[1][:5],
        documents[1][5:10],
        documents[1][10:],
        documents[3],
    ]


def test_num_rows_is_a_limit_without_overlap_and_ends_with_a_document_with_it(tokenizer):
    documents = streams(10, 10, 10)
    assert len(token_rows(documents, max_length=4, num_rows=2)) == 2
    assert len(token_rows(documents, max_length=4, num_rows=100)) == 8
    # Ten tokens in rows of 4 that repeat one: 4 + 3 + 3.
    assert len(token_rows(documents, max_length=4, num_rows=1, packing=False, overlap=1)) == 3
    texts = ["abcdefghi", "jklmnopqr"]
    one = token_rows(texts, tokenizer, max_length=4, num_rows=1, packing=False, overlap=1)
    assert one.num_bytes == 9
    assert len(predicted(one)) == 9


def test_bytes_are_of_the_measured_text(tokenizer):
    texts = ["héllo", "", "   ", "wörld"]
    rows = token_rows(texts, tokenizer, max_length=64, packing=False, overlap=1)
    assert rows.num_bytes == len("héllo".encode()) + len("wörld".encode())
    bare = pocket_tokenizer(bos_token=None, eos_token=None)
    rows = token_rows(["a", "bcd"], bare, max_length=64, packing=False, overlap=1)
    assert len(rows) == 1  # "a" is one token without a separator: there is nothing to predict
    assert rows.num_bytes == 3
    assert token_rows(streams(5), max_length=64).num_bytes is None
    assert token_rows(["abc", [4, 5]], tokenizer, max_length=64).num_bytes is None


def test_num_tokens_and_digest():
    rows = token_rows(streams(7, 9), max_length=4, packing=False, overlap=1)
    assert rows.num_tokens == sum(len(row) for row in rows.rows)
    again = token_rows(streams(7, 9), max_length=4, packing=False, overlap=1)
    assert rows.digest == again.digest
    assert rows.digest != token_rows(streams(7, 9), max_length=5, packing=False, overlap=1).digest
    assert rows.digest != token_rows(streams(7, 8), max_length=4, packing=False, overlap=1).digest


# Sources


def test_all_kinds_of_sources_give_the_same_rows(tokenizer):
    texts = ["one text", "another text"]
    ids = tokenize(texts, tokenizer)
    expected = token_rows(texts, tokenizer, max_length=6)
    for source in (
        iter(texts),
        [{"text": text} for text in texts],
        datasets.Dataset.from_dict({"text": texts, "other": [1, 2]}),
        datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(),
        ids,
        [torch.tensor(row) for row in ids],
        [np.array(row) for row in ids],
        [{"input_ids": row} for row in ids],
        datasets.Dataset.from_dict({"input_ids": ids, "text": ["ignored", "too"]}),
        datasets.Dataset.from_dict({"input_ids": ids}).with_format("torch"),
        expected,
    ):
        assert token_rows(source, tokenizer, max_length=6).rows == expected.rows
    named = token_rows([{"story": text} for text in texts], tokenizer, max_length=6, text_field="story")
    assert named.rows == expected.rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_source_is_dropped(side: str):
    padding, tokens = [0, 0, 0], [5, 6, 7]
    ids, mask = [*tokens, *padding], [1, 1, 1, 0, 0, 0]
    if side == "left":
        ids, mask = ids[::-1], mask[::-1]
        tokens = tokens[::-1]
    row = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    assert token_rows([row], max_length=16).rows == (tuple(tokens),)


def test_separators(tokenizer):
    assert [ids[0] for ids in tokenize(["ab", "c"], tokenizer)] == [BOS, BOS]
    assert [len(ids) for ids in tokenize(["ab", "c"], tokenizer)] == [3, 2]
    only_end = pocket_tokenizer(bos_token=None)
    assert tokenize(["ab"], only_end)[0][0] == only_end.eos_token_id
    bare = pocket_tokenizer(bos_token=None, eos_token=None)
    assert len(tokenize(["ab"], bare)[0]) == 2


def test_a_tokenizer_that_adds_its_own_separator_does_not_get_a_second_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = pocket_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert tokenizer("ab")["input_ids"][0] == BOS
    assert tokenize(["ab"], tokenizer) == tokenize(["ab"], pocket_tokenizer())


def test_many_documents_keep_their_order(tokenizer):
    """More than one batch of the tokenizer, with texts and token ids mixed."""
    documents = [f"document {index}" if index % 3 else [3, 4, 5 + index % 80] for index in range(600)]
    rows = token_rows(documents, tokenizer, max_length=64, packing=False)
    expected = [d if isinstance(d, list) else [BOS, *tokenizer(d)["input_ids"]] for d in documents]
    assert [list(row) for row in rows.rows] == expected


# Refusals


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no documents"),
        (["", "   "], "no documents"),
        ([[5]], "1 document"),
        ("a string", "Pass a list of texts"),
        (Path("corpus.txt"), "Pass a list of texts"),
        ([3.5], "got float"),
        ([["a", "b"]], "got list"),
        ([{"content": "hello"}], r"columns \['content'\]"),
        ({"train": ["text"], "test": ["text"]}, "keys train, test"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), "keys train"),
        (UserDict(input_ids=[[1, 2]]), "keys input_ids"),
    ],
)
def test_unusable_data(tokenizer, source, message: str):
    with pytest.raises(DataError, match=message):
        token_rows(source, tokenizer, max_length=16)


@pytest.mark.parametrize(
    "settings", [{"max_length": 1}, {"max_length": 8, "overlap": 2}, {"max_length": 8, "num_rows": 0}]
)
def test_senseless_settings(settings: dict):
    with pytest.raises(DataError, match="="):
        token_rows(streams(20), **settings)


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="processing_class=tokenizer"):
        token_rows(["text"], max_length=16)


# Batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_batches_hold_the_rows(side: str, batch_size: int):
    rows = token_rows(streams(9, 4, 6, 2, 5), max_length=6, packing=False)
    batches = list(padded_batches(rows, batch_size, pad_token_id=2, padding_side=side))
    found = []
    for batch in batches:
        assert {tensor.shape for tensor in batch.values()} == {batch["input_ids"].shape}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert batch["attention_mask"].any(0).all()  # no column is padding alone
        for ids, mask, positions in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["position_ids"]):
            assert (ids[~mask] == 2).all()
            assert positions[mask].tolist() == list(range(int(mask.sum())))
            assert mask[0 if side == "right" else -1]
            assert (mask.long().diff() != 0).sum() <= 1
            found.append(tuple(ids[mask].tolist()))
    assert tuple(found) == rows.rows
    assert [len(batch["input_ids"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_position_ids():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


# Files


def test_load_text_dataset_reads_every_kind_of_file(tmp_path: Path):
    texts = ["first line", "second line"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(texts) + "\n")
    dataset = datasets.Dataset.from_dict({"text": texts})
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "a.txt", "a.csv", "a.parquet", "saved"):
        assert list(load_text_dataset(str(tmp_path / name))["text"]) == texts
    assert list(load_text_dataset(str(tmp_path / "a.jsonl"), split="train[:1]")["text"]) == texts[:1]


def test_load_text_dataset_refuses(tmp_path: Path):
    (tmp_path / "a.pdf").write_text("?")
    with pytest.raises(DataError, match=r"cannot read a '\.pdf' file"):
        load_text_dataset(str(tmp_path / "a.pdf"))
    with pytest.raises(DataError, match="does not exist"):
        load_text_dataset(str(tmp_path / "gone.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match="Cannot load the dataset"):
        load_text_dataset(str(tmp_path / "broken.jsonl"))
