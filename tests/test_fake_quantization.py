"""Quantisation-aware distillation: the rounding by hand, the copy that is quantised afterwards, and refusals."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.errors import MissingDependencyError, UnsupportedModelError
from minitron_hf.quantization import quantize_checkpoint
from pocket import pocket_model, pocket_tokenizer, pocket_tokens
from test_quantization import SIZES, needs_torchao
from test_trainer import Gradients, make_trainer, naive_sums, token_dataset


def models():
    return pocket_model("llama", dtype=torch.float32, seed=1, **SIZES), pocket_model(
        "llama", dtype=torch.float32, **SIZES
    )


def projections(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"}


def rounded(weight, bits, group, *, clipped=False):
    """Symmetric, with a scale for every group of a row's inputs.

    The smallest weight of a group may lie halfway between two levels: torchao multiplies by 1 / scale.
    With `clipped`: which weights lie beyond the levels instead.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    levels = (groups * (1 / scale)).round()
    if clipped:
        return (levels != levels.clamp(low, high)).reshape(weight.shape)
    return (levels.clamp(low, high) * scale).reshape(weight.shape)


@needs_torchao
@pytest.mark.parametrize(("method", "bits", "group"), [("int8", 8, None), ("int4", 4, 32)])
def test_gradient_is_that_of_the_rounded_weights(tmp_path, method, bits, group):
    """Loss and gradients equal those of a stock student whose projections hold the rounded weights.

    Clipped weights get no gradient.
    """
    student, teacher = models()
    by_hand, no_gradient = copy.deepcopy(student), {}
    with torch.no_grad():
        for path, module in projections(by_hand).items():
            no_gradient[f"{path}.weight"] = rounded(module.weight, bits, group, clipped=True)
            module.weight.copy_(rounded(module.weight, bits, group))
    data, gradients = token_dataset(), Gradients()
    trainer = make_trainer(
        tmp_path, student, teacher, data, data, callbacks=[gradients], max_steps=1, per_device_train_batch_size=8,
        fake_quantization=method, bf16=False, max_grad_norm=1e9, learning_rate=1e-6,
    )  # fmt: skip
    kl, _, _, count = naive_sums(by_hand, teacher, data)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-4)
    trainer.train()
    (kl / count).backward()
    for name, parameter in by_hand.named_parameters():
        expected = parameter.grad.masked_fill(no_gradient.get(name, torch.tensor(False)), 0)
        torch.testing.assert_close(gradients.values[name], expected, rtol=1e-3, atol=1e-5)
    assert any(bool(clipped.any()) for clipped in no_gradient.values())


@needs_torchao
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_the_saved_student_is_stock_and_its_quantised_copy_is_what_was_trained(tmp_path, method):
    student, teacher = models()
    trainer = make_trainer(
        tmp_path / "run", student, teacher, token_dataset(), max_steps=2, fake_quantization=method, bf16=False
    )
    trainer.train()
    trainer.save_student(tmp_path / "student")
    pocket_tokenizer().save_pretrained(tmp_path / "student")
    tokens = pocket_tokens(2, 9)
    trained = trainer.model.eval()(tokens).logits
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert {type(module) for module in projections(stored).values()} == {nn.Linear}
    assert not torch.allclose(stored(tokens).logits, trained, atol=1e-4)
    for name, value in student.state_dict().items():
        assert torch.equal(value, stored.state_dict()[name]), name
    quantize_checkpoint(tmp_path / "student", tmp_path / "copy", method, device="cpu")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")(tokens).logits
    torch.testing.assert_close(found, trained, rtol=1e-3, atol=1e-4)


@needs_torchao
def test_a_resumed_run_goes_on_with_rounded_weights(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "fake_quantization": "int4", "bf16": False}
    results = []
    for resume in (False, True):
        student, teacher = models()
        trainer = make_trainer(tmp_path, student, teacher, token_dataset(), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        results.append(student.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@needs_torchao
def test_adapters_are_refused(tmp_path):
    student, teacher = models()
    with pytest.raises(UnsupportedModelError, match="fake_quantization='int8' with an adapter"):
        make_trainer(
            tmp_path, student, teacher, token_dataset(), fake_quantization="int8", peft_config=LoraConfig(r=2)
        )


def test_unknown_methods_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fake_quantization='nf4': expected one of int8, int4"):
        DistillationConfig(str(tmp_path), fake_quantization="nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchao" else sys)
    with pytest.raises(MissingDependencyError, match=r"minitron-hf\[quantize\]"):
        DistillationConfig(str(tmp_path), fake_quantization="int4")
