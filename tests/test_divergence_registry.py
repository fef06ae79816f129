"""Registered divergences: the guide's example against a naive reference, a built-in one against itself."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minitron_hf import DistillationConfig, register_divergence
from minitron_hf.errors import DataError
from minitron_hf.losses import divergences
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import head_logits
from test_losses import problem, top_k_signal

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "add-a-divergence.md"


@pytest.fixture(autouse=True)
def _registry():
    before = dict(divergences.DIVERGENCES), dict(divergences.REGISTERED)
    yield
    for known, old in zip((divergences.DIVERGENCES, divergences.REGISTERED), before):
        known.clear()
        known.update(old)


def losses(name, signal=None, **options):
    """Values and gradients of 0.37 times the total."""
    hidden, head, teacher, labels = problem(bias=True, scale=0.4, softcap=4.0)
    found = distillation_loss(hidden, head, signal or teacher, labels, divergence=name, chunk_size=5, **options)
    return found.divergence, torch.autograd.grad(0.37 * found.total, [hidden, head.weight, head.bias])


def test_the_example_of_the_guide_equals_its_naive_reference():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "guide", "exec"), names)
    assert names["args"].divergence == "hellinger"
    hidden, head, teacher, labels = problem(bias=True, scale=0.4, softcap=4.0)
    p = (head_logits(teacher.hidden, teacher.head) / 2).softmax(-1).detach()
    q = (head_logits(hidden, head) / 2).softmax(-1)
    value = 1 - (p * q).sqrt().sum(-1)
    counts = labels != -100
    references = torch.autograd.grad(0.37 * 0.7 * 4 * value[counts].sum(), [hidden, head.weight, head.bias])
    found, gradients = losses("hellinger", temperature=2.0, kd_weight=0.7)
    torch.testing.assert_close(found, value.detach(), rtol=1e-11, atol=1e-13)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["recorded", *divergences.DIVERGENCES])
def test_evaluation_computes_values_and_no_gradients(name):
    """The same values as in training; the products are those of the two heads alone, and autograd records nothing."""
    recorded = []

    @register_divergence("recorded")
    def reverse(teacher, student):
        recorded.append(student.requires_grad)
        return (student.exp() * (student - teacher)).sum(-1)

    hidden, head, teacher, labels = problem(bias=True, scale=0.4, softcap=4.0)
    trained = distillation_loss(hidden, head, teacher, labels, divergence=name, ce_weight=0.4)
    assert head.weight.requires_grad
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        evaluated = distillation_loss(hidden, head, teacher, labels, divergence=name, ce_weight=0.4)
    assert counter.get_total_flops() == 2 * len(hidden) * (head.weight.numel() + teacher.head.weight.numel())
    for name_of, value in vars(evaluated).items():
        expected = getattr(trained, name_of)
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)
    if name == "recorded":
        half = len(recorded) // 2
        assert recorded == [True] * half + [False] * half


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_a_registered_copy_equals_the_built_in_divergence(temperature, k, ce_weight):
    @register_divergence("copy")
    def copy(teacher, student):
        return (student.exp() * (student - teacher)).sum(-1)

    signal = None if k is None else top_k_signal(problem(bias=True, scale=0.4, softcap=4.0)[2], k, temperature)
    options = {"signal": signal, "temperature": temperature, "ce_weight": ce_weight}
    (mine, gradients), (shipped, references) = losses("copy", **options), losses("reverse_kl", **options)
    torch.testing.assert_close(mine, shipped, rtol=1e-10, atol=1e-12)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_entry_points_are_known_by_name(monkeypatch, tmp_path):
    (tmp_path / "their_losses.py").write_text(
        "from minitron_hf import register_divergence\n\n"
        "@register_divergence('theirs')\ndef theirs(teacher, student):\n    return (teacher - student).amax(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("theirs", "their_losses:theirs", divergences.ENTRY_POINTS)
    monkeypatch.setattr(divergences, "entry_points", lambda group: [entry])
    assert DistillationConfig(str(tmp_path), divergence="theirs").divergence == "theirs"


def test_mistakes_are_named(tmp_path):
    def whole(teacher, student):
        return (teacher - student).abs().sum()

    for name in ("jsd", "forward_kl"):
        with pytest.raises(DataError, match=f"{name}.*already"):
            register_divergence(name)(whole)
    register_divergence("whole")(whole)
    register_divergence("whole")(whole)  # a notebook cell that is run again
    with pytest.raises(DataError, match=r"divergence='whole' returned \[\]; expected one value per token"):
        losses("whole")
    with pytest.raises(ValueError, match=r"reverse_k'.*Did you mean 'reverse_kl'"):
        DistillationConfig(str(tmp_path), divergence="reverse_k")
