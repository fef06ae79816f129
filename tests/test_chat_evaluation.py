"""Chat ability and quality by position, against naive loops."""

from __future__ import annotations

import math

import pytest
import torch

from minitron_hf import evaluate_models
from minitron_hf.errors import DataError
from minitron_hf.evaluation.positions import PositionSums, bucket_of, bucket_range, by_position
from minitron_hf.files import read_json
from pocket import pocket_model, pocket_tokenizer
from test_generation import CHAT, QUESTIONS, naive


@pytest.fixture(scope="module")
def models():
    return {"teacher": pocket_model("llama"), "student": pocket_model("llama", seed=1)}


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer(chat_template=CHAT)


def chat_of(models, tokenizer, prompts, **settings):
    settings = {"chat_max_new_tokens": 9, "num_rows": 2, "speed": False, "show_progress": False, **settings}
    return evaluate_models(
        models, ["the old man", "the new man"], processing_class=tokenizer, chat_prompts=prompts, **settings
    )


def without_end(answer):
    return answer[:-1] if answer[-1] == 2 else answer


def mean(values):
    value = sum(values) / len(values)
    return value, math.sqrt(sum((one - value) ** 2 for one in values) / (len(values) - 1) / len(values))


def test_answers_are_measured_as_a_naive_loop_does(models, tokenizer, tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "left out"}]}
        for text in QUESTIONS
    ]
    result = chat_of(models, tokenizer, talks, output_path=tmp_path, batch_size=4)
    assert result["chat"]["num_prompts"] == len(talks)
    answers, prompts = {}, []
    for text in QUESTIONS:
        prompts.append(tokenizer(f"<s>user: {text}</s><s>assistant: ", add_special_tokens=False)["input_ids"])
    for name, model in models.items():
        answers[name] = [naive(model, ids, 9) for ids in prompts]
        found = result["models"][name]["chat"]
        for key, values in (
            ("stopping", [answer[-1] == 2 for answer in answers[name]]),
            ("format", [bool(text) and not {0, 1, 2, 3} & set(text) for text in map(without_end, answers[name])]),
            ("answer_tokens", [len(answer) for answer in answers[name]]),
        ):
            assert (found[key]["value"], found[key]["stderr"]) == pytest.approx(mean(values), abs=1e-12), key
    loss, kl, agree, count = 0.0, 0.0, 0, 0
    for ids, answer in zip(prompts, answers["teacher"]):
        with torch.no_grad():
            rows = [model(torch.tensor([[*ids, *answer]])).logits[0].double() for model in models.values()]
        for place, token in enumerate(answer, len(ids) - 1):
            teacher, student = (row[place].log_softmax(-1) for row in rows)
            loss -= student[token].item()
            kl += (teacher.exp() * (teacher - student)).sum().item()
            agree += int(teacher.argmax() == student.argmax())
            count += 1
    found = result["models"]["student"]["chat"]
    assert found["loss"]["value"] == pytest.approx(loss / count, rel=1e-6)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(loss / count), rel=1e-6)
    assert found["kl_divergence"]["value"] == pytest.approx(kl / count, rel=1e-6)
    assert found["top1_agreement"]["value"] == pytest.approx(agree / count)
    assert result["models"]["teacher"]["chat"]["kl_divergence"] is None
    assert read_json(tmp_path / "evaluation.json")["models"]["student"]["chat"] == found


def test_a_copy_of_the_teacher_chats_like_it(models, tokenizer):
    result = chat_of({"teacher": models["teacher"], "student": pocket_model("llama")}, tokenizer, QUESTIONS)
    teacher, student = (result["models"][name]["chat"] for name in ("teacher", "student"))
    assert student["kl_divergence"]["value"] == pytest.approx(0, abs=1e-9)
    assert student["top1_agreement"]["value"] == 1
    for key in ("stopping", "format", "answer_tokens", "loss"):
        assert student[key] == pytest.approx(teacher[key])


def test_what_cannot_be_asked_is_refused(models, tokenizer):
    with pytest.raises(DataError, match="no chat template"):
        chat_of(models, pocket_tokenizer(), QUESTIONS)
    with pytest.raises(DataError, match="no prompts that leave room"):
        chat_of(models, tokenizer, ["a" * 60])
    with pytest.raises(DataError, match="chat_max_new_tokens=64"):
        chat_of(models, tokenizer, QUESTIONS, chat_max_new_tokens=64)


def test_buckets_hold_the_positions_that_they_name():
    for position in [*range(300), 511, 512, 4095, 4096, 8191]:
        begin, end = bucket_range(bucket_of(position))
        assert begin <= position < end
    one = PositionSums()
    one.add([1, 127, 128, 300], torch.tensor([1.0, 3.0, 5.0, 7.0]))
    one.add([2, 130], torch.tensor([2.0, 7.0]))
    found = [(part["begin"], part["end"], part["num_tokens"], part["loss"]["value"]) for part in by_position(loss=one)]
    assert found == [(0, 128, 3, 2.0), (128, 256, 2, 6.0), (256, 512, 1, 7.0)]
    short = PositionSums()
    short.add([1, 2], torch.tensor([1.0, 1.0]))
    assert by_position(loss=short) == by_position(loss=PositionSums()) == []


def test_loss_and_divergence_by_position_are_those_of_a_naive_loop(tokenizer):
    models = {
        name: pocket_model("llama", seed=seed, max_position_embeddings=512)
        for name, seed in (("teacher", 0), ("student", 1))
    }
    texts = ["ab c" * 50, "the old man " * 30, "short"]
    result = evaluate_models(models, texts, processing_class=tokenizer, speed=False, show_progress=False)
    sums = {}
    for text in texts:
        ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            teacher, student = (model(ids).logits[0].double().log_softmax(-1) for model in models.values())
        for place in range(1, ids.shape[1]):
            part = sums.setdefault(place // 128 if place < 256 else 2, [0, 0.0, 0.0])
            part[0] += 1
            part[1] -= student[place - 1, ids[0, place]].item()
            part[2] += (teacher[place - 1].exp() * (teacher[place - 1] - student[place - 1])).sum().item()
    found = result["models"]["student"]["positions"]
    assert [part["begin"] for part in found] == [0, 128, 256]
    for bucket, part in enumerate(found):
        count, loss, kl = sums[bucket]
        assert part["num_tokens"] == count
        assert part["loss"]["value"] == pytest.approx(loss / count, rel=1e-6)
        assert part["kl_divergence"]["value"] == pytest.approx(kl / count, rel=1e-6)
    assert "kl_divergence" not in result["models"]["teacher"]["positions"][0]
