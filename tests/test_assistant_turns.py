"""Assistant-only loss under any chat template: masks counted by hand, and those of TRL's own templates."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from trl import chat_template_utils

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    cache_teacher_logits,
    load_teacher_cache,
    load_tokenizer,
)
from minitron_hf.distillation.assistant_turns import labelled_turns
from minitron_hf.errors import DataError
from minitron_hf.saving import save_model
from pocket import pocket_model, pocket_tokenizer

#: ChatML, as SmolLM2 has it: without markers, and unknown to TRL.
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
USER, REPLY = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}


@pytest.fixture
def tokenizer():
    return pocket_tokenizer(chat_template=CHATML)


def trainer_with(tmp_path, tokenizer, data, teacher, **options):
    args = DistillationConfig(
        str(tmp_path),
        assistant_only_loss=True,
        report_to="none",
        disable_tqdm=True,
        **{"max_steps": 1, "logging_steps": 1, **options},
    )
    student = pocket_model("llama", dtype=torch.float32, seed=1)
    return DistillationTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)


def counted(trainer):
    """The text of the tokens that count, of every row."""
    rows = trainer.train_dataset
    return [trainer.processing_class.decode([token for token in labels if token != -100]) for labels in rows["labels"]]


def test_the_assistants_turns_count_with_their_ends(tmp_path, tokenizer):
    data = Dataset.from_dict({"messages": [[USER, REPLY, USER, {**REPLY, "content": "q"}], [USER, REPLY]]})
    trainer = trainer_with(tmp_path, tokenizer, data, pocket_model("llama", dtype=torch.float32))
    assert counted(trainer) == ["xyz</s>\nq</s>\n", "xyz</s>\n"]
    labels = trainer.train_dataset[1]["labels"]
    before = (1 + 4 + 1) + 2 + 2 + (1 + 9 + 1)  # "<s>user\n", "ab", "</s>\n", "<s>assistant\n"
    assert labels[:before] == [-100] * before
    assert len(labels) == before + 3 + 2
    trainer.train()
    assert trainer.args.assistant_only_loss
    assert trainer.state.log_history[0]["num_tokens"] > 0


@pytest.mark.parametrize("completion_only", [True, False, None])
def test_turns_of_the_prompt_count_where_it_is_asked(tmp_path, tokenizer, completion_only):
    data = Dataset.from_dict({"prompt": [[USER, REPLY, USER]], "completion": [[{**REPLY, "content": "q"}]]})
    teacher = pocket_model("llama", dtype=torch.float32)
    trainer = trainer_with(tmp_path, tokenizer, data, teacher, completion_only_loss=completion_only)
    assert counted(trainer) == ["xyz</s>\nq</s>\n" if completion_only is False else "q</s>\n"]


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3", "lfm2", "cohere"])
def test_the_masks_equal_those_of_trls_template(name):
    """TRL knows these templates with markers; the turns found without them are the same."""
    tokenizer = pocket_tokenizer(chat_template=getattr(chat_template_utils, f"{name}_chat_template"))
    ends = ["<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]  # of phi3, which closes the last turn
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    marked = chat_template_utils.get_training_chat_template(tokenizer)
    talk = [USER, REPLY, USER, {**REPLY, "content": "q r"}]
    for messages in (talk, talk[:2], talk[:3]):
        found = tokenizer.apply_chat_template(
            messages, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        expected = [
            token if mask else -100 for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)
        ]
        assert labelled_turns({"messages": messages}, tokenizer, False) == {
            "input_ids": found["input_ids"],
            "labels": expected,
        }


@pytest.mark.parametrize("packing", [False, True])
def test_a_cache_counts_the_same_tokens(tmp_path, tokenizer, packing):
    data = Dataset.from_dict({"messages": [[USER, REPLY, USER, {**REPLY, "content": "q"}], [USER, REPLY]] * 3})
    teacher = pocket_model("llama", dtype=torch.float32)
    options = {"max_length": 32, "packing": packing, "packing_strategy": "wrapped", "padding_free": False}
    online = trainer_with(tmp_path / "online", tokenizer, data, teacher, **options)
    folder = cache_teacher_logits(
        teacher, data, tmp_path / "cache", top_k=97, args=online.args, processing_class=tokenizer, dtype="float32"
    )
    cached = trainer_with(tmp_path / "cached", tokenizer, load_teacher_cache(folder), None, **options)
    for column in ("input_ids", "labels"):
        one, other = ([list(row[column]) for row in trainer.train_dataset] for trainer in (online, cached))
        assert one == other
    losses = []
    for trainer in (online, cached):
        trainer.train()
        losses.append(trainer.state.log_history[0]["kl"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_templates_that_rewrite_earlier_turns_and_other_data_are_refused(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else '...')")
    teacher = pocket_model("llama", dtype=torch.float32)
    data = Dataset.from_dict({"messages": [[USER, REPLY, USER]]})
    with pytest.raises(DataError, match=r"differently when a turn follows.+message 2.+generation"):
        trainer_with(tmp_path / "a", tokenizer, data, teacher)
    with pytest.raises(DataError, match="has the columns text, expected conversations"):
        trainer_with(tmp_path / "b", tokenizer, Dataset.from_dict({"text": ["abc"]}), teacher)
    data = Dataset.from_dict({"messages": [[USER, REPLY]]})
    with pytest.raises(DataError, match="No token counts in the first 8 tokens"):
        trainer_with(tmp_path / "d", pocket_tokenizer(chat_template=CHATML), data, teacher, max_length=8)
    with pytest.raises(DataError, match="No token counts"):
        trainer_with(tmp_path / "c", tokenizer, Dataset.from_dict({"messages": [[USER]]}), teacher)


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_gsm8k_as_conversations_and_as_completions(tmp_path, data_folder, form):
    """Real questions and answers, with a real model: the counted text is the answers."""
    path = data_folder / "bench" / "gsm8k.jsonl"
    if not path.is_file():
        pytest.skip("no GSM8K")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:6]]
    tokenizer = load_tokenizer(data_folder / "models" / "stories260K")
    if form == "messages":
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
            + ("{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
        )
        talk = [
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            for row in rows
        ]
        data, end = Dataset.from_dict({"messages": talk}), "\n"
    else:
        columns = {"prompt": [row["question"] + " " for row in rows], "completion": [row["answer"] for row in rows]}
        data, end = Dataset.from_dict(columns), ""
    args = DistillationConfig(
        str(tmp_path),
        max_steps=1,
        logging_steps=1,
        assistant_only_loss=form == "messages",
        report_to="none",
        disable_tqdm=True,
    )
    model = str(data_folder / "models" / "stories260K")
    trainer = DistillationTrainer(model, model, args, train_dataset=data, processing_class=tokenizer)
    for row, labels in zip(rows, trainer.train_dataset["labels"], strict=True):
        text = tokenizer.decode([token for token in labels if token != -100], skip_special_tokens=True)
        assert text.strip() == (row["answer"] + end).strip()
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_template_of_a_file_and_a_tokenizer_of_the_students_folder(tmp_path, tokenizer):
    data = Dataset.from_dict({"messages": [[USER, REPLY]]})
    teacher, student = (pocket_model("llama", dtype=torch.float32, seed=seed) for seed in (0, 1))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    options = {"chat_template_path": str(tmp_path / "chatml.jinja")}
    assert counted(trainer_with(tmp_path / "a", pocket_tokenizer(), data, teacher, **options)) == ["xyz</s>\n"]
    for model, folder in ((student, "student"), (teacher, "teacher")):
        save_model(model, tmp_path / folder, tokenizer)
    args = DistillationConfig(str(tmp_path / "b"), assistant_only_loss=True, report_to="none", max_steps=1)
    trainer = DistillationTrainer(str(tmp_path / "student"), str(tmp_path / "teacher"), args, train_dataset=data)
    assert counted(trainer) == ["xyz</s>\n"]


def test_a_template_that_is_not_there_is_refused(tmp_path, tokenizer):
    data = Dataset.from_dict({"messages": [[USER, REPLY]]})
    with pytest.raises(DataError, match=r"chat_template_path.*does not exist"):
        trainer_with(tmp_path, tokenizer, data, pocket_model("llama"), chat_template_path="./none.jinja")
    (tmp_path / "chatml.txt").write_text(CHATML)
    with pytest.raises(DataError, match=r"files that end with \.jinja or \.j2"):
        trainer_with(tmp_path, tokenizer, data, pocket_model("llama"), chat_template_path=str(tmp_path / "chatml.txt"))
