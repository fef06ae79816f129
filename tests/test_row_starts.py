"""Rows begin as the teacher expects, and what is added there is context alone: never scored, counted or a target."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from minitron_hf.data import TokenRows, token_rows
from minitron_hf.distillation.cache_writer import RowMaker, cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.correction import CorrectionTrainer
from minitron_hf.distillation.rows import StartTokensMixin
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.pruning.candidates import Candidate, Divergence
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.row_starts import warn_of_broken_starts
from minitron_hf.sizes.request import PrunerConfig
from pocket import float64_throughout, pocket_model, pocket_tokenizer, pocket_tokens, starting_tokenizer

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
@pytest.mark.parametrize("packing", [False, True])
def test_a_teacher_that_is_broken_on_later_rows_is_warned_about(packing: bool, adds: bool, caplog):
    documents = [list(range(first, first + 40)) for first in range(5, 45, 5)]
    settings = {"max_length": 12, "packing": packing, "overlap": int(not packing)}
    if adds:
        rows = token_rows(documents, starting_tokenizer(), **settings)
    else:
        rows = token_rows([[BOS, *ids] for ids in documents], **settings)
    with caplog.at_level(logging.WARNING):
        warn_of_broken_starts(Sensitive(), rows, "The teacher")  # type: ignore[arg-type]
    assert len(caplog.messages) == (0 if adds else 1)
    for message in caplog.messages:
        assert "add_bos_token" in message
        assert "behind the token 1" in message


def test_the_cost_of_looking_is_bounded(tmp_path):
    """Eight forward passes of 128 tokens and those in front, whatever the number and the length of the rows."""

    class Counted(Sensitive):
        lengths: list[int] = []  # noqa: RUF012

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> types.SimpleNamespace:
            self.lengths.append(input_ids.numel())
            return super().forward(input_ids)

    rows = token_rows([[BOS, *[5, 6, 7, 8] * 2000] for _ in range(3)], max_length=500)
    assert len(rows) > 40
    warn_of_broken_starts(Counted(), rows, "The teacher")  # type: ignore[arg-type]
    assert sorted(Counted.lengths) == [128] * 4 + [129] * 4


@pytest.mark.parametrize("first", [[], [BOS]])
def test_a_teacher_that_reads_later_rows_as_well_is_not_warned_about(first: list[int], caplog):
    """Nor one whose documents have easy beginnings."""

    class Easy(Sensitive):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> types.SimpleNamespace:
            easy = 8.0 * (input_ids < 15)[:, :, None]
            return types.SimpleNamespace(logits=easy * nn.functional.one_hot((input_ids + 1) % 90, 90))

    documents = [[*first, *range(5, 45)] for _ in range(6)]
    with caplog.at_level(logging.WARNING):
        for model in (pocket_model("llama"), Easy()):
            for packing in (True, False):
                warn_of_broken_starts(model, token_rows(documents, max_length=12, packing=packing), "The teacher")
    assert not caplog.messages


def test_scoring_evaluation_and_training_look(caplog, tmp_path):
    from minitron_hf.distillation import rows as training
    from minitron_hf.evaluation import evaluate
    from minitron_hf.scoring import calibration

    text, model = ["Once upon a time there was a model."], pocket_model("llama")
    for module, run in (
        (calibration, lambda: estimate_importance(model, text, processing_class=pocket_tokenizer(), max_length=16)),
        (evaluate, lambda: evaluate_models({"m": model}, text, processing_class=pocket_tokenizer(), speed=False)),
        (training, lambda: training_rows(tmp_path, pocket_tokenizer(), Dataset.from_dict({"text": text}))),
        (training, lambda: training_rows(tmp_path, starting_tokenizer(), Dataset.from_dict({"text": text}))),
    ):
        assert module.warn_of_broken_starts is warn_of_broken_starts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "warn_of_broken_starts", lambda *_: logging.getLogger().warning("looked at"))
            run()
    assert caplog.messages.count("looked at") == 3  # no need to where the tokenizer adds it


# Training


TALE = [
    "Once upon a time there was a model.",
    "It read.",
    "One day it met a teacher, large and slow, who knew it all.",
]


def training_rows(folder, tokenizer, data, **settings):
    """A trainer, for the rows that it makes."""
    student, teacher = pocket_model("llama", seed=1, num_hidden_layers=2), pocket_model("llama")
    defaults = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False, "max_length": 16}
    args = DistillationConfig(str(folder), **{**defaults, **settings})
    return DistillationTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("start", ["<s>", "<s> <unk>", "</s>"])
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": False},
        {"packing": False, "truncation_mode": "keep_end"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_rows_begin_as_the_teacher_expects_and_hold_every_target_once(tmp_path, start: str, settings: dict):
    tokenizer = starting_tokenizer(start)
    added = tokenizer.convert_tokens_to_ids(start.split())
    data = Dataset.from_dict({"text": TALE})
    trainer = training_rows(tmp_path, tokenizer, data, **settings)
    pieces = []
    for row in trainer.train_dataset:
        assert len(row["input_ids"]) <= 16
        place = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            pieces.append((row["input_ids"][place : place + length], row["labels"][place : place + length]))
            place += length
    for ids, labels in pieces:
        assert ids[: len(added)] == added
        assert all(label in (-100, token) for token, label in zip(ids, labels))
    targets = [label for _, labels in pieces for label in labels[1:] if label != -100]
    documents = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in TALE]
    room = 16 - len(added)
    if settings["packing"] and settings["packing_strategy"] != "bfd":
        expected = [token for ids in documents for token in ids]
    else:
        expected = [
            token for ids in documents for token in (ids[-room:] if "truncation_mode" in settings else ids[:room])
        ]
    assert sorted(targets) == sorted(expected)  # packing changes the order of documents


def test_a_wrapped_row_counts_no_token_that_the_tokenizer_adds_where_documents_meet(tmp_path):
    trainer = training_rows(
        tmp_path,
        starting_tokenizer(),
        Dataset.from_dict({"text": ["abc", "defgh"]}),
        packing=True,
        packing_strategy="wrapped",
        max_length=32,
    )
    [row] = trainer.train_dataset
    assert [place for place, token in enumerate(row["input_ids"]) if token == BOS] == [0, 5]
    assert [place for place, label in enumerate(row["labels"]) if label == -100] == [0, 5]


def test_tokenizers_that_add_nothing_keep_the_rows_of_trl(tmp_path):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": TALE * 3})
    for settings in (
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd_split", "shuffle_dataset": True},
        {"packing": False},
    ):
        ours = training_rows(tmp_path, pocket_tokenizer(), data, **settings).train_dataset
        args = SFTConfig(str(tmp_path), report_to="none", bf16=False, max_length=16, **settings)
        theirs = SFTTrainer(pocket_model("llama"), args, train_dataset=data, processing_class=pocket_tokenizer())
        for name in ("input_ids", "labels"):
            assert list(ours[name]) == list(theirs.train_dataset[name])


def test_streams_and_token_ids_begin_so_too(tmp_path):
    tokenizer = starting_tokenizer()
    data = Dataset.from_dict({"text": TALE})
    settings = {"packing": True, "packing_strategy": "wrapped", "max_steps": 1}
    expected = training_rows(tmp_path, tokenizer, data, **settings).train_dataset
    stream = training_rows(tmp_path, tokenizer, data.to_iterable_dataset(), **settings).train_dataset
    assert [row["input_ids"] for row in stream] == list(expected["input_ids"])
    ids = Dataset.from_dict({"input_ids": [[*tokenizer(t, add_special_tokens=False)["input_ids"], 2] for t in TALE]})
    assert list(training_rows(tmp_path, tokenizer, ids, **settings).train_dataset["input_ids"]) == list(
        expected["input_ids"]
    )


def test_a_conversation_begins_as_its_template_renders_it(tmp_path):
    tokenizer = starting_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}</s>{% endfor %}"
    data = Dataset.from_dict({"messages": [[{"role": "user", "content": "Hello, it is me."}]]})
    rows = training_rows(tmp_path, tokenizer, data, packing=True, packing_strategy="wrapped", max_length=8)
    joined = [token for row in rows.train_dataset["input_ids"] for token in row]
    assert joined == tokenizer("u: Hello, it is me.</s>", add_special_tokens=False)["input_ids"]


def test_the_cache_of_a_teacher_and_its_correction_have_the_same_rows(tmp_path):
    tokenizer, data = starting_tokenizer(), Dataset.from_dict({"text": TALE})
    settings = {"packing": True, "packing_strategy": "wrapped"}
    expected = training_rows(tmp_path / "run", tokenizer, data, **settings).train_dataset
    args = DistillationConfig(str(tmp_path), report_to="none", bf16=False, max_length=16, **settings)
    folder = cache_teacher_logits(
        pocket_model("llama"), data, tmp_path / "cache", args=args, processing_class=tokenizer, top_k=4
    )
    cached = load_teacher_cache(folder).dataset.with_format(None)
    for name in ("input_ids", "labels"):
        assert list(cached[name]) == list(expected[name])
    assert CorrectionTrainer._prepare_dataset is RowMaker._prepare_dataset is StartTokensMixin._prepare_dataset


def test_rows_without_a_target_are_left_out_or_refused(tmp_path, caplog: pytest.LogCaptureFixture):
    mixed = Dataset.from_dict({"input_ids": [[5], [6, 7, 8], [9]]})
    with caplog.at_level(logging.WARNING):
        trainer = training_rows(tmp_path, pocket_tokenizer(), mixed)
    assert list(trainer.train_dataset["input_ids"]) == [[6, 7, 8]]
    assert "2 rows of the train dataset hold no target" in caplog.text
    for rows in ([[5]] * 8, []):
        with pytest.raises(DataError, match=r"No token counts|holds no rows"):
            training_rows(tmp_path, pocket_tokenizer(), Dataset.from_dict({"input_ids": rows}))


# Context


def test_rows_are_cut_to_the_context_of_the_models(tmp_path, caplog: pytest.LogCaptureFixture):
    """TRL's default of 1,024 tokens on models of 64."""
    text = Dataset.from_dict({"text": ["word " * 60]})
    with caplog.at_level(logging.WARNING):
        trainer = training_rows(tmp_path, pocket_tokenizer(), text, max_length=1024)
    context = pocket_model("llama").config.max_position_embeddings
    assert context < 300
    assert trainer.args.max_length == max(map(len, trainer.train_dataset["input_ids"])) == context
    assert f"max_length is 1024, and the context of the student has {context} tokens" in caplog.text
    longer = Dataset.from_dict({"input_ids": [list(range(3, 80)) * 5], "labels": [list(range(3, 80)) * 5]})
    trainer = training_rows(tmp_path, pocket_tokenizer(), longer, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(DataError, match=rf"A row has 385 tokens, and the context of the models is {context}"):
        trainer.train()


def test_scores_are_not_taken_beyond_the_context(caplog: pytest.LogCaptureFixture):
    model = pocket_model("llama")
    context = model.config.max_position_embeddings
    with caplog.at_level(logging.WARNING):
        scores = estimate_importance(
            model, ["word " * 200], processing_class=pocket_tokenizer(), max_length=context + 1
        )
    assert scores.settings["max_length"] == context
    assert f"max_length={context + 1} exceeds the model's context of {context}" in caplog.text
    longer = TokenRows((tuple(pocket_tokens(context + 1).tolist()),), None)
    for data in (longer, DataLoader([{"input_ids": torch.tensor(longer.rows[0])}])):
        with pytest.raises(DataError, match=f"{context + 1} tokens.* context of {context}"):
            estimate_importance(model, data, show_progress=False)
