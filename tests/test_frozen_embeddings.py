"""`freeze_embeddings`: the other gradients are those of a plain loop, the frozen tables stay, and refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from minitron_hf.distillation.checks import freeze_embeddings
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.fake_runs import Setup
from minitron_hf.errors import DataError, PlanError, UnsupportedModelError
from pocket import pocket_model
from test_trainer import Gradients, make_trainer, naive_sums, token_dataset

CHECKPOINTING = [{}, {"activation_checkpointing": True}]


def models(tied):
    teacher, student = (
        pocket_model("llama", dtype=torch.float32, seed=seed, tie_word_embeddings=tied) for seed in (0, 1)
    )
    return student, teacher


def tables(model):
    return {"model.embed_tokens.weight", *([] if model.config.tie_word_embeddings else ["lm_head.weight"])}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["plain", "checkpointing"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_other_gradients_are_those_of_a_plain_loop(tmp_path, tied, checkpointing):
    student, teacher = models(tied)
    by_hand, before = copy.deepcopy(student), copy.deepcopy(student.state_dict())
    data, gradients = token_dataset(), Gradients()
    trainer = make_trainer(
        tmp_path, student, teacher, data, callbacks=[gradients], max_steps=1, per_device_train_batch_size=8,
        freeze_embeddings=True, bf16=False, max_grad_norm=1e9, learning_rate=1e-2, **checkpointing,
    )  # fmt: skip
    trainer.train()
    kl, _, _, count = naive_sums(by_hand, teacher, data)
    (kl / count).backward()
    expected = {name: one.grad for name, one in by_hand.named_parameters() if name not in tables(student)}
    found = {name: gradients.values[name] for name in expected}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    for name, value in student.state_dict().items():
        stays = name in tables(student) or name == "lm_head.weight"
        assert torch.equal(value, before[name]) == stays, name
    trained = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert trained == {id(one) for name, one in student.named_parameters() if name in expected}


def test_every_table_of_tokens_is_frozen():
    student = pocket_model("gemma3n_text", dtype=torch.float32)
    freeze_embeddings(student)
    frozen = {name for name, one in student.named_parameters() if not one.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"}


def test_a_resumed_run_ends_like_one_without_a_stop(tmp_path):
    """The student is given as a path."""
    student, teacher = models(tied=False)
    student.save_pretrained(tmp_path / "student")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "freeze_embeddings": True}
    results = []
    for resume in (False, True):
        trainer = make_trainer(tmp_path, str(tmp_path / "student"), teacher, token_dataset(), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        results.append(trainer.model.state_dict())
        assert torch.equal(results[-1]["lm_head.weight"], student.lm_head.weight)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_what_would_train_nothing_is_refused(tmp_path):
    student, teacher = models(tied=True)
    with pytest.raises(UnsupportedModelError, match="freeze_embeddings with an adapter"):
        make_trainer(
            tmp_path / "run", student, teacher, token_dataset(), freeze_embeddings=True, peft_config=LoraConfig(r=2)
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="freeze_embeddings does not train"):
        DistillationConfig(str(tmp_path), freeze_embeddings=True, embedding_loss="mse")
    with pytest.raises(PlanError, match="leaves embeddings and head alone"):
        replace(Setup(freeze_embeddings=True), lora_rank=4)
