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
from pocket import pocket_tokenizer, starting_tokenizer

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
    assert rows.num_bytes == 2  # nor is there for the first token of "bcd"
    rows = token_rows(["a", "bcd"], bare, max_length=3, packing=True, overlap=1)
    assert rows.num_bytes == 3  # only the first token of the stream is predicted by nothing
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


# Rows that begin in the middle of a document


STARTS = [("<s>",), ("<s>", "<unk>"), ("</s>",)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("max_length", [4, 7, 100])
@pytest.mark.parametrize(("packing", "overlap"), [(True, 0), (True, 1), (False, 0), (False, 1)])
def test_every_row_begins_with_what_the_tokenizer_adds(start: tuple, max_length: int, packing: bool, overlap: int):
    """The added tokens are context alone: without them, every token of the texts is predicted exactly once."""
    tokenizer = starting_tokenizer(" ".join(start))
    added = tuple(tokenizer.convert_tokens_to_ids(list(start)))
    texts = ["Once upon a time", "ab", "", "The end of the story.", "x" * 23]
    rows = token_rows(texts, tokenizer, max_length=max_length, packing=packing, overlap=overlap)
    assert all(len(row) <= max_length for row in rows.rows)
    assert all(row[: len(added)] == added for row in rows.rows)
    found = [row[place] for index, row in enumerate(rows.rows) for place in rows.predicted(index)]
    assert found == tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    assert rows.num_predicted == len(found)
    if overlap:
        assert rows.num_bytes == len("".join(texts).encode())
        for index, row in enumerate(rows.rows):  # the repeated token gives the first new one its context
            if rows.continues[index] and packing is False:
                assert row[len(added)] == rows.rows[index - 1][-1]
    else:
        assert rows.num_tokens == len(found)
    if not packing:
        assert [not later for later in rows.continues].count(True) == sum(map(bool, texts))


def test_rows_of_tokenizers_that_add_nothing_are_the_stream_as_it_is(tokenizer):
    texts = ["Once upon a time", "The end of the story."]
    rows = token_rows(texts, tokenizer, max_length=6)
    stream = [token for text in texts for token in [BOS, *tokenizer(text)["input_ids"]]]
    assert [token for row in rows.rows for token in row] == stream
    assert rows.context == ()
    assert rows.digest == TokenRows(rows.rows, None).digest


def test_token_ids_get_the_start_where_it_is_missing():
    tokenizer = starting_tokenizer()
    rows = token_rows([[5, 6, 7, 8, 9], [BOS, 5, 6]], tokenizer, max_length=4, packing=False)
    assert rows.rows == ((BOS, 5, 6, 7), (BOS, 8, 9), (BOS, 5, 6))
    assert rows.context == ((0,), (0,), (0,))
    assert token_rows([[5, 6, 7]], max_length=4).rows == ((5, 6, 7),)  # without a tokenizer nothing is known


def test_context_is_part_of_the_digest_and_of_the_batches():
    rows = token_rows(["abcdefg", "hi"], starting_tokenizer(), max_length=5, packing=False)
    assert rows.digest != TokenRows(rows.rows, None).digest
    for side in ("left", "right"):
        [batch] = padded_batches(rows, 8, padding_side=side)
        kept = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["scored_mask"])]
        assert kept == [[token for token in row if token != BOS] for row in rows.rows]
        assert batch["attention_mask"].sum() == sum(map(len, rows.rows))


def test_rows_that_only_hold_what_is_added_are_left_out():
    rows = token_rows(["abc", "d"], starting_tokenizer(), max_length=4)
    assert [len(row) for row in rows.rows] == [4, 2]  # the second begins where "d" does
    assert not [row for row in token_rows(["abc", " "], starting_tokenizer(), max_length=4).rows if len(row) < 2]
    with pytest.raises(DataError, match=r"max_length=2.*2 token\(s\)"):
        token_rows(["abc"], starting_tokenizer("<s> <unk>"), max_length=2)


# Conversations and completions


CHAT = "{% for m in messages %}{{ '<s>' if loop.first }}{{ m['role'][0] }}: {{ m['content'] }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}a: {% endif %}"


def test_conversations_and_completions_are_read_as_trl_reads_them(tmp_path):
    """The oracle is the trainer's own rows: token ids, and labels where they count."""
    from trl import SFTConfig, SFTTrainer

    from pocket import pocket_model

    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    kinds = {
        "messages": [{"messages": talk}, {"messages": talk * 2}],
        "sharegpt": [{"conversations": [{"from": m["role"], "value": m["content"]} for m in talk]}] * 2,
        "texts": [{"prompt": "One and", "completion": " two."}, {"prompt": "Three", "completion": " four.</s>"}],
        "turns": [{"prompt": talk[:1], "completion": talk[1:]}] * 2,
    }
    for tokenizer in (pocket_tokenizer(), starting_tokenizer()):
        tokenizer.chat_template = CHAT
        for kind, data in kinds.items():
            args = SFTConfig(str(tmp_path), report_to="none", bf16=False, max_length=64)
            data = datasets.Dataset.from_list(data)
            trainer = SFTTrainer(pocket_model("llama"), args, train_dataset=data, processing_class=tokenizer)
            rows = token_rows(data, tokenizer, max_length=64, packing=False)
            assert [list(row) for row in rows.rows] == list(trainer.train_dataset["input_ids"]), kind
            counted = [
                [place for place, label in enumerate(labels) if label != -100 and place > 0]
                for labels in trainer.train_dataset["labels"]
            ]
            assert [rows.predicted(index) for index in range(len(rows))] == counted, kind


def test_conversations_that_cannot_be_rendered_are_refused(tokenizer):
    talk = [{"messages": [{"role": "user", "content": "Hello"}]}]
    with pytest.raises(DataError, match="no chat template"):
        token_rows(talk, tokenizer, max_length=16)
    with pytest.raises(DataError, match="tokenizer is needed"):
        token_rows(talk, max_length=16)
    strict = pocket_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        token_rows(talk, strict, max_length=16)
    with pytest.raises(DataError, match="expected two texts"):
        token_rows([{"prompt": "a", "completion": 3}], tokenizer, max_length=16)


def test_a_processor_is_taken_for_its_tokenizer():
    class Processor:
        tokenizer = starting_tokenizer()
        chat_template = CHAT

    talk = [{"messages": [{"role": "user", "content": "Hello"}]}, {"text": "plain"}]
    Processor.tokenizer.chat_template = CHAT
    expected = token_rows(talk, Processor.tokenizer, max_length=16)
    assert token_rows(talk, Processor(), max_length=16) == expected


# Long documents


@pytest.mark.parametrize("adds", [pocket_tokenizer, starting_tokenizer, lambda: starting_tokenizer("<s>", "</s>")])
def test_long_documents_are_read_in_pieces_with_the_same_tokens(adds, monkeypatch: pytest.MonkeyPatch):
    from minitron_hf.data import documents

    texts = ["One short text.", "A long text of many words. " * 40, "x" * 500, "The last one."]
    whole = token_rows(texts, adds(), max_length=16, packing=False, overlap=1)
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 100)
    assert token_rows(texts, adds(), max_length=16, packing=False, overlap=1) == whole


def test_no_more_of_a_long_document_is_read_than_is_needed(tokenizer, monkeypatch: pytest.MonkeyPatch):
    from minitron_hf.data import documents

    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 1000)
    read = []

    class Watched:
        def __init__(self, tokenizer):
            self.tokenizer = self
            self.inner = tokenizer

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, **kwargs):
            read.append(len(text) if isinstance(text, str) else sum(map(len, text)))
            return self.inner(text, **kwargs)

    rows = token_rows(["word " * 100_000], Watched(tokenizer), max_length=100, num_rows=10)
    assert len(rows) == 10
    assert sum(read) < 6000
    measured = token_rows(["word " * 100_000], tokenizer, max_length=100, num_rows=10, packing=False, overlap=1)
    assert measured.num_predicted == measured.num_bytes < 3000


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
        (["fine", "\ud800 is no text"], r"Document 1 .*surrogates"),
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


def test_load_text_dataset_reads_the_folder_where_one_stands(tmp_path: Path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "the old"}\n')
    monkeypatch.chdir(tmp_path)
    assert list(load_text_dataset(".")["text"]) == ["the old"]


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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_has_slices_of_its_split(tmp_path: Path, streaming: bool):
    """As a file has them: the same rows."""
    texts = [f"text {number}" for number in range(10)]
    whole = datasets.Dataset.from_dict({"text": texts})
    whole.save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict({"text": texts}, split="test").save_to_disk(tmp_path / "named")
    whole.to_json(tmp_path / "file.jsonl")
    for split in ("train", "train[:2]", "train[2:4]", "train[-3:]", "train[:25%]", "train[:2]+train[8:]"):
        expected = load_text_dataset(str(tmp_path / "file.jsonl"), split=split)["text"]
        found = load_text_dataset(str(tmp_path / "saved"), split=split, streaming=streaming)
        assert [row["text"] for row in found] == list(expected)
    for split, expected in (("test", texts), ("train", texts), ("test[:3]", texts[:3])):
        found = load_text_dataset(str(tmp_path / "named"), split=split, streaming=streaming)
        assert [row["text"] for row in found] == expected
    for split in ("test", "test[:3]"):
        with pytest.raises(DataError, match="holds one dataset without splits"):
            load_text_dataset(str(tmp_path / "saved"), split=split, streaming=streaming)


def test_load_text_dataset_refuses(tmp_path: Path):
    (tmp_path / "a.pdf").write_text("?")
    with pytest.raises(DataError, match=r"cannot read a '\.pdf' file"):
        load_text_dataset(str(tmp_path / "a.pdf"))
    with pytest.raises(DataError, match="does not exist"):
        load_text_dataset(str(tmp_path / "gone.jsonl"))
    (tmp_path / "no.parquet").write_text("nothing")
    with pytest.raises(DataError, match="Cannot load the dataset"):
        load_text_dataset(str(tmp_path / "no.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', r"a\.jsonl, line 3, .*column 13: .*delimiter"),
        ("a.jsonl", '{"text": "a"}\n{"te', r"a\.jsonl, line 2, .*Unterminated string"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2, .*a list instead of an object"),
        ("a.json", '{"text": "a"}\n{"text": b}\n', r"a\.json, line 2, .*column 10"),
        ("a.json", '[{"text": "a"},\n{"text": b}]', r"a\.json, line 2"),
        ("a.csv", "text,other\na,b\nc,d,e\n", r"a\.csv.*line 3"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str, where: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=where):
        load_text_dataset(str(tmp_path / name))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (["a", None], r"Document 1 \(counted from 0\): .*NoneType"),
        ([{"text": "a"}, {"text": "b"}, {"other": "c"}], r"Document 2 .*columns \['other'\]"),
        (["a", "b\ud800"], "Document 1 .*not valid text"),
    ],
)
def test_a_document_that_cannot_be_read_is_named_by_its_number(data: list, words: str):
    with pytest.raises(DataError, match=words):
        token_rows(data, pocket_tokenizer(), max_length=8)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_one_name_are_not_confused(tmp_path, streaming):
    """Also where a README.md has `configs`, and after a change in place."""
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train-*.jsonl\n---\n"

    def write(folder, text):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(readme)
        (folder / "train-0.jsonl").write_text(json.dumps({"text": text}))
        return [row["text"] for row in load_text_dataset(str(folder), streaming=streaming)]

    assert write(tmp_path / "a" / "corpus", "one") == ["one"]
    assert write(tmp_path / "b" / "corpus", "two") == ["two"]
    assert write(tmp_path / "b" / "corpus", "three") == ["three"]


def test_folders_that_are_no_datasets_are_one_line(tmp_path):
    from pocket import pocket_model

    pocket_model("llama").save_pretrained(tmp_path / "model")
    pocket_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "stages").mkdir()
    (tmp_path / "mixed").mkdir()
    for name, value in (("a", {"x": {"y": 1}}), ("b", {"x": [1]})):
        (tmp_path / "mixed" / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("model", "the folder of a run, not of a dataset"),
        ("mixed", "do not have the same columns"),
        ("empty", "doesn't contain any data files"),
    ):
        with pytest.raises(DataError, match=words) as raised:
            load_text_dataset(str(tmp_path / name))
        assert len(str(raised.value).splitlines()) == 1
    (tmp_path / "model" / "stages").rmdir()
    with pytest.raises(DataError, match="the folder of a model, not of a dataset"):
        load_text_dataset(str(tmp_path / "model"))
