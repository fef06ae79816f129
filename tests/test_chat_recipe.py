"""A chat teacher from generated answers to the card: recipe and command line."""

from __future__ import annotations

import json

import pytest
import torch

from minitron_hf.errors import DataError
from minitron_hf.files import read_json
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.runner import run_recipe
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_model, pocket_tokenizer
from test_cli import minitron
from test_generation import CHAT, QUESTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat teacher, and questions."""
    folder = tmp_path_factory.mktemp("chat")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer(chat_template=CHAT).save_pretrained(folder / "teacher")
    lines = [json.dumps({"question": question}) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def values(folder, **changes):
    return {
        "teacher": str(folder / "teacher"),
        "data": {"train": str(folder / "generated"), "eval": str(folder / "generated")},
        "output_dir": str(folder / "run"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 4, "max_length": 16},
        "distill": {"max_steps": 1, "max_length": 60, "packing": False, "assistant_only_loss": True},
        "evaluate": {
            "speed": False,
            "num_rows": 4,
            "chat": {
                "prompts": {"source": str(folder / "questions.jsonl"), "text_field": "question"},
                "max_new_tokens": 6,
                "num_prompts": 3,
            },
        },
        **changes,
    }


def test_the_whole_path(folder):
    done = minitron(
        *("generate", folder / "teacher", "--prompts", folder / "questions.jsonl", "--text-field", "question"),
        *("-o", folder / "generated", "--set", "max_new_tokens=12"),
    )
    assert done.returncode == 0, done.stderr
    assert f"Wrote {folder / 'generated'}: {len(QUESTIONS)} rows" in done.stdout
    made = run_recipe(Recipe.from_dict(values(folder)), show_progress=False, report=lambda line: None)
    evaluation = read_json(made / "evaluation.json")
    assert evaluation["chat"]["num_prompts"] == 3
    for name in ("teacher", "pruned", "student"):
        assert set(evaluation["models"][name]["chat"]) >= {"perplexity", "stopping", "format"}
    card = (made / "README.md").read_text()
    assert "### Chat" in card
    assert "Every model answered 3 prompts" in card
    done = minitron(
        *("evaluate", f"teacher={folder / 'teacher'}", f"student={made}", "--data", folder / "generated"),
        *("--chat-prompts", folder / "questions.jsonl", "-o", folder / "measured", "--set", "text_field=question"),
        *("--set", "chat_max_new_tokens=6", "--set", "num_chat_prompts=3", "--set", "speed=false"),
    )
    assert done.returncode == 0, done.stderr
    assert "Answers to 3 prompts, at most 6 tokens each" in done.stdout
    again = read_json(folder / "measured" / "evaluation.json")["models"]["student"]["chat"]
    assert again["kl_divergence"] == pytest.approx(evaluation["models"]["student"]["chat"]["kl_divergence"])


@pytest.mark.parametrize(("length", "warns"), [(31, True), (32, False)])
def test_the_plan_warns_of_rows_far_shorter_than_the_context(folder, length, warns):
    data = {key: {"source": str(folder / "questions.jsonl"), "text_field": "question"} for key in ("train", "eval")}
    plan = values(folder, data=data, distill={"max_steps": 1, "max_length": length})
    notes = check_recipe(Recipe.from_dict(plan))["notes"]
    text = (
        f"Training rows have at most {length} tokens of a context of 64: positions from {length} on are not trained."
    )
    assert any(text in note for note in notes) == warns


def test_templates_whose_turns_cannot_be_found_are_refused_before_the_run(folder, tmp_path):
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    rewriting = CHAT.replace("m['content']", "(m['content'] if loop.last else '...')")
    pocket_tokenizer(chat_template=rewriting).save_pretrained(tmp_path / "teacher")
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}))
    data = dict.fromkeys(("train", "eval"), str(tmp_path / "talks.jsonl"))
    recipe = values(folder, teacher=str(tmp_path / "teacher"), data=data, evaluate={})
    with pytest.raises(DataError, match="differently when a turn follows"):
        check_recipe(Recipe.from_dict(recipe))


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ({"prompts": "nowhere.jsonl", "max_new_tokens": 4}, "nowhere.jsonl does not exist"),
        (
            {"prompts": "{questions}", "max_new_tokens": 4},
            "evaluate.chat.prompts: .* and no 'text'",
        ),
        ({"prompts": {"source": "{questions}", "text_field": "question"}, "max_new_tokens": 64}, "context has 64"),
        ({"prompts": "{questions}", "num_prompts": 0}, "num_prompts=0: expected at least 1"),
        ({"max_new_tokens": 4}, "evaluate.chat lacks"),
    ],
)
def test_chat_prompts_that_cannot_be_answered_are_refused_before_the_run(folder, chat, words):
    questions = str(folder / "questions.jsonl")
    text = json.dumps(chat).replace("{questions}", questions)
    data = {key: {"source": questions, "text_field": "question"} for key in ("train", "eval")}
    distill = {"max_steps": 1, "max_length": 60}
    with pytest.raises(DataError, match=words):
        check_recipe(Recipe.from_dict(values(folder, data=data, distill=distill, evaluate={"chat": json.loads(text)})))
