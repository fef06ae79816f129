"""Continuations against a greedy loop without a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from minitron_hf.evaluation.samples import generate_samples
from pocket import pocket_model, pocket_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer()


@pytest.fixture(scope="module")
def models():
    return {"student": pocket_model("llama", seed=1), "teacher": pocket_model("llama")}


def test_samples_are_the_greedy_continuation(models, tokenizer):
    prompts = ["Once", "The end of"]
    samples = generate_samples(models, tokenizer, prompts, max_new_tokens=9)
    assert [sample["prompt"] for sample in samples] == prompts
    for sample in samples:
        assert list(sample["completions"]) == list(models)
        for name, model in models.items():
            ids = [1, *tokenizer(sample["prompt"])["input_ids"]]
            prompt_length = len(ids)
            with torch.no_grad():
                while len(ids) < prompt_length + 9 and ids[-1] != 2:  # without a cache, until the end token
                    ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            expected = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True)
            assert sample["completions"][name] == expected


def test_penalties_of_the_models_do_not_apply(models, tokenizer):
    expected = generate_samples(models, tokenizer, ["Once"], max_new_tokens=9)
    before = {name: model.generation_config for name, model in models.items()}
    for model in models.values():
        model.generation_config = GenerationConfig(repetition_penalty=50.0)
    found = generate_samples(models, tokenizer, ["Once"], max_new_tokens=9)
    for name, model in models.items():
        model.generation_config = before[name]
    assert found == expected


def test_sampling_depends_on_the_seed_alone(models, tokenizer):
    model = {"model": models["teacher"]}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, again, other = (
        generate_samples(model, tokenizer, ["Once"], max_new_tokens=20, do_sample=True, seed=seed)
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one == again != other


# lm-evaluation-harness
