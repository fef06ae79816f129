"""Conversations and completions in every stage: calibration, repair and measurement read what training reads."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from minitron_hf import DistillationConfig, DistillationTrainer, PrunerConfig, evaluate_models, prune_model
from minitron_hf.data import token_rows
from minitron_hf.errors import DataError
from minitron_hf.files import read_json
from minitron_hf.recipe import runner
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.importance import estimate_importance
from pocket import pocket_model, pocket_tokenizer
from test_assistant_turns import CHATML
from test_cli import minitron

#: The same template with the marks that TRL reads.
MARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>\\n' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
#: Questions and answers like those of GSM8K, at pocket size.
GSM8K = [
    {"question": f"{a} + {b} = ?", "answer": f"{a}+{b}=<<{a + b}>>\n#### {a + b}"} for a in (1, 7) for b in (3, 5)
]


def turn(role, content):
    return {"role": role, "content": content}


def as_messages(row):
    return {"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]}


def as_sharegpt(row):
    talk = as_messages(row)["messages"]
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in talk]}


def as_completion(row):
    return {"prompt": [turn("user", row["question"])], "completion": [turn("assistant", row["answer"])]}


def as_text_completion(row):
    return {"prompt": row["question"], "completion": row["answer"]}


FORMATS = [as_messages, as_sharegpt, as_completion, as_text_completion]


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer(chat_template=CHATML)


def rendered(row, tokenizer):
    """Token ids of a row of GSM8K, written by hand; and how many of them are the prompt's."""
    before = f"<s>user\n{row['question']}</s>\n<s>assistant\n"
    ids = [tokenizer(text)["input_ids"] for text in (before, f"{before}{row['answer']}</s>\n")]
    return ids[1], len(ids[0])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_scores_repair_and_measurement_are_of_the_rendered_rows(teacher, tokenizer, form):
    """Equal to those of token ids that were rendered by hand; of completions, the prompt is context."""
    data = Dataset.from_list([form(row) for row in GSM8K])
    if form is as_text_completion:
        ids = [tokenizer(row["question"] + row["answer"] + "</s>")["input_ids"] for row in GSM8K]
    else:
        ids = [rendered(row, tokenizer)[0] for row in GSM8K]
    arguments = {"num_rows": 3, "max_length": 60, "packing": False}
    found = estimate_importance(teacher, data, processing_class=tokenizer, show_progress=False, **arguments)
    if form in (as_messages, as_sharegpt):
        expected = estimate_importance(teacher, ids, show_progress=False, **arguments)
        for name, values in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], values, equal_nan=True)
    config = PrunerConfig(intermediate_size=0.5, repair="least_squares")
    student = prune_model(teacher, config, calibration_data=data, processing_class=tokenizer)
    measured = evaluate_models(
        {"teacher": teacher, "student": student}, data, processing_class=tokenizer, speed=False, show_progress=False
    )
    predicted = [len(row) - 1 for row in ids]
    if form is as_completion:
        predicted = [len(row) - rendered(one, tokenizer)[1] for row, one in zip(ids, GSM8K)]
    elif form is as_text_completion:
        predicted = [len(one["answer"]) + 1 for one in GSM8K]
    assert measured["data"]["num_tokens"] == sum(predicted)


TALKS = [
    {"messages": [turn("assistant", "hi"), turn("user", "b"), turn("assistant", "c")]},
    {"messages": [turn("system", "be"), turn("user", "ab"), turn("assistant", "xyz"), turn("user", "c"),
                  turn("assistant", "q")]},
    {"messages": [turn("user", "one"), turn("assistant", "two")]},
]  # fmt: skip
PROMPTED = [
    {"prompt": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "completion": [turn("assistant", "d")]}
]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turn by turn", "marked"])
@pytest.mark.parametrize("rows", [TALKS, PROMPTED], ids=["messages", "prompts"])
def test_measured_tokens_are_those_that_training_counts(teacher, tmp_path, template, rows):
    """The labels of the trainer's rows say which."""
    tokenizer = pocket_tokenizer(chat_template=template)
    args = DistillationConfig(str(tmp_path), assistant_only_loss=True, max_steps=1, report_to="none", bf16=False)
    student = pocket_model("llama", dtype=torch.float32, seed=1)
    trained = DistillationTrainer(
        student, teacher, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset
    found = token_rows(rows, tokenizer, max_length=64, packing=False, overlap=1, assistant_only=True)
    assert [list(row) for row in found.rows] == [list(row) for row in trained["input_ids"]]
    expected = [[place for place, label in enumerate(labels) if label != -100] for labels in trained["labels"]]
    assert [found.predicted(index) for index in range(len(found))] == expected
    measured = evaluate_models(
        {"teacher": teacher}, rows, processing_class=tokenizer, speed=False, assistant_only=True, show_progress=False
    )
    assert measured["data"]["num_tokens"] == sum(map(len, expected))
    assert measured["settings"]["assistant_only"]
    naive = []
    for ids, places in zip(trained["input_ids"], expected):
        with torch.no_grad():
            log_probabilities = teacher(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        naive += [-log_probabilities[place - 1, ids[place]].item() for place in places]
    assert measured["models"]["teacher"]["metrics"]["loss"]["value"] == pytest.approx(
        sum(naive) / len(naive), rel=1e-5
    )


@pytest.mark.parametrize(("template", "turns"), [(CHATML, False), (CHATML, True), (MARKED, True)])
def test_a_prompt_beside_messages_is_left_out(teacher, tmp_path, template, turns):
    """Chat corpora repeat the first message there, and there is no completion."""
    tokenizer = pocket_tokenizer(chat_template=template)
    student = pocket_model("llama", dtype=torch.float32, seed=1)
    trained, found = [], []
    for name, rows in (("plain", TALKS), ("both", [{"prompt": "one", **row} for row in TALKS])):
        folder, settings = tmp_path / name, {"max_steps": 1, "report_to": "none", "bf16": False}
        args = DistillationConfig(str(folder), assistant_only_loss=turns, **settings)
        data = Dataset.from_list(rows)
        trainer = DistillationTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)
        trained.append(trainer.train_dataset[:])
        found.append(token_rows(rows, tokenizer, max_length=64, packing=False, assistant_only=turns))
    assert trained[0] == trained[1]
    assert found[0] == found[1]


def test_training_renders_the_roles_of_sharegpt(teacher, tmp_path, tokenizer):
    student = pocket_model("llama", dtype=torch.float32, seed=1)
    args = DistillationConfig(str(tmp_path), max_steps=1, report_to="none", bf16=False)
    rows = []
    for form in (as_messages, as_sharegpt):
        data = Dataset.from_list([form(row) for row in GSM8K])
        trainer = DistillationTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)
        rows.append(trainer.train_dataset["input_ids"][:])
    assert rows[0] == rows[1]


def test_templates_that_read_parts_alone_get_parts(tokenizer):
    """Those of many models with images leave out a content that is a text."""
    parts = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '</s>\\n' }}{% endfor %}"
    )
    both = [pocket_tokenizer(chat_template=template) for template in (parts, CHATML)]
    rows = [token_rows([as_messages(row) for row in GSM8K], one, max_length=64, packing=False) for one in both]
    assert rows[0].rows == rows[1].rows


def test_a_prompt_of_messages_needs_a_completion_of_messages(tokenizer):
    with pytest.raises(DataError, match=r"Document 0 .*expected two texts or two lists of messages"):
        token_rows([{"prompt": [turn("user", "a")], "completion": "b"}], tokenizer, max_length=32)


@pytest.mark.parametrize("data", [["a text"], [{"text": "a text"}], [[5, 6, 7]], [as_text_completion(GSM8K[0])]])
def test_only_conversations_have_turns(tokenizer, data):
    with pytest.raises(DataError, match=r"Document 0 .*expected 'messages'"):
        token_rows(data, tokenizer, max_length=16, assistant_only=True)


def test_rows_that_were_made_without_turns_are_refused(tokenizer):
    rows = token_rows(TALKS, tokenizer, max_length=64)
    with pytest.raises(DataError, match="tokenised without it"):
        token_rows(rows, tokenizer, max_length=64, assistant_only=True)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, teacher, tokenizer):
    folder = tmp_path_factory.mktemp("conversations")
    for name, one in (("teacher", tokenizer), ("mute", pocket_tokenizer())):
        teacher.save_pretrained(folder / name)
        one.save_pretrained(folder / name)
    for form in FORMATS:
        lines = "\n".join(json.dumps({**form(row), "text": "beside"}) for row in GSM8K * 3)
        (folder / f"{form.__name__}.jsonl").write_text(lines)
    return folder


def recipe(workshop, tmp_path, name, teacher="teacher", **distill):
    return {
        "teacher": str(workshop / teacher),
        "data": dict.fromkeys(("train", "eval"), str(workshop / f"{name}.jsonl")),
        "output_dir": str(tmp_path / "run"),
        "prune": {"intermediate_size": 0.5, "repair": "least_squares"},
        "scores": {"num_rows": 4, "max_length": 48},
        "distill": {"max_steps": 2, "max_length": 60, "packing": False, "eval_strategy": "no", **distill},
        "evaluate": {"speed": False, "num_rows": 4},
    }


def test_a_recipe_measures_the_turns_that_it_trains(workshop, tmp_path, tokenizer):
    given = recipe(workshop, tmp_path, "as_messages", assistant_only_loss=True)
    folder = runner.run_recipe(Recipe.from_dict(given), show_progress=False, report=lambda line: None)
    evaluation = read_json(folder / "evaluation.json")
    assert evaluation["settings"]["assistant_only"]
    answers = [len(ids) - before for ids, before in (rendered(row, tokenizer) for row in GSM8K)]
    assert evaluation["data"]["num_tokens"] == sum(answers)
    assert "tokens of the assistant's turns" in (folder / "README.md").read_text()


@pytest.mark.parametrize("form", ["as_messages", "as_sharegpt", "as_completion"])
def test_conversations_without_a_template_are_refused_early(workshop, tmp_path, form):
    with pytest.raises(DataError, match=r"data\.train: .* holds conversations, .* no chat template"):
        check_recipe(Recipe.from_dict(recipe(workshop, tmp_path, form, teacher="mute")))
    from minitron_hf import load_text_dataset

    args = DistillationConfig(str(tmp_path), max_steps=1, report_to="none", bf16=False)
    models = [pocket_model("llama", dtype=torch.float32, seed=seed) for seed in (0, 1)]
    data = load_text_dataset(str(workshop / f"{form}.jsonl"))
    with pytest.raises(DataError, match="train dataset holds conversations, and the tokenizer has no chat template"):
        DistillationTrainer(*models, args, train_dataset=data, processing_class=pocket_tokenizer())


def test_a_template_of_the_recipe_is_used_by_all_stages(workshop, tmp_path, tokenizer):
    """The teacher's tokenizer has none, and scores come before training."""
    (tmp_path / "chat.jinja").write_text(CHATML)
    changes = {"chat_template_path": str(tmp_path / "chat.jinja")}
    given = recipe(workshop, tmp_path, "as_messages", teacher="mute", **changes)
    made = Recipe.from_dict(given)
    folder = runner.run_recipe(made, until="evaluate", show_progress=False, report=lambda line: None)
    tokens = read_json(folder / "evaluation.json")["data"]["num_tokens"]
    assert tokens == sum(len(rendered(row, tokenizer)[0]) - 1 for row in GSM8K)
    before = runner.stage_digests(made)
    (tmp_path / "chat.jinja").write_text(MARKED)
    after = runner.stage_digests(made)
    assert not [name for name in before if before[name] == after[name]]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_the_commands_read_conversations(workshop, tmp_path, form, tokenizer):
    data = workshop / f"{form.__name__}.jsonl"
    done = minitron(
        *("score", workshop / "teacher", "--data", data, "-o", tmp_path / "scores"),
        *("--set", "num_rows=4", "--set", "max_length=32"),
    )
    assert done.returncode == 0, done.stderr
    if form is not as_messages:
        return
    done = minitron(
        *("evaluate", f"teacher={workshop / 'teacher'}", "--data", data, "-o", tmp_path / "measured"),
        *("--set", "speed=false", "--set", "num_rows=4", "--set", "assistant_only=true"),
    )
    assert done.returncode == 0, done.stderr
    answers = [len(ids) - before for ids, before in (rendered(row, tokenizer) for row in GSM8K)]
    assert read_json(tmp_path / "measured" / "evaluation.json")["data"]["num_tokens"] == sum(answers)


def test_gsm8k_calibrates_repairs_and_measures(data_folder):
    """Real questions and answers, under a template of the stories' tokenizer."""
    path = data_folder / "bench" / "gsm8k.jsonl"
    if not path.is_file():
        pytest.skip("no GSM8K here")
    from minitron_hf.models import load_model, load_tokenizer

    folder = data_folder / "models" / "stories260K"
    model, tokenizer = load_model(folder).float(), load_tokenizer(folder)
    tokenizer.chat_template = CHATML
    with path.open() as file:
        rows = [as_messages(json.loads(line)) for line, _ in zip(file, range(24))]
    held_out, calibration = rows[:4], rows[4:]
    config = PrunerConfig(intermediate_size=0.75, repair="least_squares")
    arguments = {"processing_class": tokenizer, "num_rows": 16, "max_length": 128}
    student = prune_model(model, config, calibration_data=calibration, **arguments)
    measured = {}
    for turns in (False, True):
        found = evaluate_models(
            {"teacher": model, "student": student},
            held_out,
            processing_class=tokenizer,
            speed=False,
            assistant_only=turns,
            show_progress=False,
        )
        measured[turns] = found["data"]["num_tokens"]
        assert found["models"]["student"]["metrics"]["kl_divergence"]["value"] > 0
    answers = [tokenizer(row["messages"][1]["content"])["input_ids"] for row in held_out]
    assert sum(map(len, answers)) <= measured[True] < measured[False]
