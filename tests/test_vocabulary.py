"""Tokenizers of equal size whose ids mean other tokens are refused wherever they meet models."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from minitron_hf.data.vocabulary import refuse_other_tokenizers
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import MismatchError
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.scoring.importance import estimate_importance
from pocket import pocket_model, pocket_tokenizer

TEXTS = ["Once upon a time there was a model.", "It read books."]


def other_tokenizer():
    """As many tokens, of which two letters have changed places."""
    tokenizer = pocket_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def folder(tmp_path):
    """A saved model with its tokenizer."""
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    pocket_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_ids_of_other_tokens_are_refused_everywhere(folder, tmp_path):
    wrong, data = other_tokenizer(), Dataset.from_dict({"text": TEXTS})
    args = DistillationConfig(str(tmp_path / "run"), report_to="none", bf16=False, max_length=16)
    ways = {
        "scores": lambda: estimate_importance(load(folder), TEXTS, processing_class=wrong, max_length=16),
        "evaluation": lambda: evaluate_models({"model": folder}, TEXTS, processing_class=wrong, speed=False),
        "trainer": lambda: DistillationTrainer(
            pocket_model("llama", seed=1), folder, args, train_dataset=data, processing_class=wrong
        ),
        "cache": lambda: cache_teacher_logits(folder, data, tmp_path / "cache", args=args, processing_class=wrong),
        "correction": lambda: correct_teacher(
            folder, data, tmp_path / "c", original_learning_rate=1e-3, num_tokens=9, processing_class=wrong
        ),
    }
    for way in ways.values():
        with pytest.raises(MismatchError, match=r"2 mean different tokens; 4 is 'b' and 'a'"):
            way()


def test_a_student_that_brings_another_tokenizer_than_the_teacher_is_refused(folder, tmp_path):
    pocket_model("llama", dtype=torch.float32, seed=1).save_pretrained(tmp_path / "student")
    other_tokenizer().save_pretrained(tmp_path / "student")
    args = DistillationConfig(str(tmp_path / "run"), report_to="none", bf16=False, max_length=16)
    with pytest.raises(MismatchError, match=r"of the student .* and the tokenizer of the teacher .* differ"):
        DistillationTrainer(str(tmp_path / "student"), folder, args, train_dataset=Dataset.from_dict({"text": TEXTS}))


def test_added_and_unknown_tokens_may_differ(folder, tmp_path):
    tokenizer = pocket_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    refuse_other_tokenizers(tokenizer, model=folder, other=tmp_path)
    refuse_other_tokenizers(None, model=folder)
    refuse_other_tokenizers(pocket_tokenizer(), model=pocket_model("llama"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)
