"""Distillation on the teacher's k most likely tokens without a cache, and the translation of TRL's losses."""

from __future__ import annotations

import copy

import pytest
import torch
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.errors import MismatchError
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import OutputHead
from minitron_hf.losses.signals import DenseSignal
from pocket import VOCAB
from test_teacher_cache import trained, write_cache
from test_trainer import float64, make_trainer, models, token_dataset  # noqa: F401


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_step_is_that_from_a_cache_of_the_same_tokens(tmp_path, divergence):
    student, teacher = models()
    data = token_dataset(labels=True)
    args = {"temperature": 2.0, "ce_weight": 0.3, "divergence": divergence}
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, top_k=5, **args))
    expected = trained(tmp_path / "cached", copy.deepcopy(student), None, cache, **args)
    found = trained(tmp_path / "online", copy.deepcopy(student), teacher, data, top_k=5, **args)
    logged = {name for name in expected[1] if not name.startswith("eval_")}
    assert {"loss", "kl", "agreement"} <= logged
    for name in logged:
        assert found[1][name] == pytest.approx(expected[1][name], rel=1e-6), name
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-7)
    whole = make_trainer(tmp_path / "whole", copy.deepcopy(student), teacher, data, data, **args).evaluate()
    for name in ("eval_kl", "eval_loss"):  # evaluation compares whole distributions
        assert found[1][name] == pytest.approx(whole[name], rel=1e-12)
        assert found[1][name] != pytest.approx(expected[1][name], rel=1e-3)


def outcomes(z, tokens):
    """Logarithms of the probabilities of `tokens` and of all others together."""
    p = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    others = torch.ones_like(p).scatter(-1, tokens, 0.0)
    return torch.cat([p.gather(-1, tokens), (p * others).sum(-1, keepdim=True)], -1).log()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("top_k", [1, 5])
def test_the_gradient_is_the_naive_one_over_k_and_one_outcomes(tmp_path, divergence, top_k):
    student, teacher = models()
    data = token_dataset()
    total = count = 0
    for row in data:
        ids = torch.tensor(row["input_ids"])[None]
        z_s = student(ids, use_cache=False).logits[0, :-1] / 2
        z_t = teacher(ids, use_cache=False).logits[0, :-1].detach() / 2
        tokens = z_t.argsort(-1, descending=True)[:, :top_k]
        p, q = outcomes(z_t, tokens), outcomes(z_s, tokens)
        p, q = (p, q) if divergence == "forward_kl" else (q, p)
        total = total + (p.exp() * (p - q)).sum()
        count += len(z_s)
    parameters = dict(student.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(4 * total / count, list(parameters.values())), strict=True))
    args = {"temperature": 2.0, "divergence": divergence, "top_k": top_k, "per_device_train_batch_size": 8}
    found, logged, _ = trained(tmp_path, student, teacher, data, max_steps=1, **args)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11)
    assert logged.get("divergence", logged["kl"]) == pytest.approx(total.item() / count, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": 0}, "top_k=0"), ({"top_k": 3, "divergence": "mse"}, "divergence='mse' compares logits")],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), **arguments)


def test_a_cache_and_too_many_tokens_are_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    data = token_dataset()
    with pytest.raises(MismatchError, match=f"top_k={VOCAB + 1}: the vocabulary has {VOCAB} tokens"):
        make_trainer(tmp_path / "run", student, teacher, data, top_k=VOCAB + 1)
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, top_k=2))
    with pytest.raises(MismatchError, match="cache has a top_k of its own"):
        make_trainer(tmp_path / "run", student, None, cache, top_k=2)


# ---- TRL ----


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("beta", "ours"),
    [
        (0.0, {"divergence": "forward_kl"}),
        (1.0, {"divergence": "reverse_kl"}),
        (0.5, {"divergence": "jsd", "jsd_beta": 0.5}),
        (0.3, {"divergence": "jsd", "jsd_beta": 0.3}),
    ],
)
def test_the_table_of_the_docs_translates_the_losses_of_trl(beta, ours, temperature):
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (7, 4), (31, 5), (31, 4))
    h_s, h_t, w_s, w_t = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    w_s.requires_grad_()

    def losses():
        z_s, z_t = h_s @ w_s.T, h_t @ w_t.T
        gkd = GKDTrainer.generalized_jsd_loss(z_s[None], z_t[None], beta=beta, temperature=temperature)
        yield gkd / len(h_s)  # its mean is over sequences, or over num_items_in_batch
        mask = torch.ones(1, len(h_s))
        yield _chunked_divergence_loss(h_s[None], h_t[None], w_s, w_t, mask, beta, temperature=temperature)[0]

    teacher, labels = DenseSignal(h_t, OutputHead(w_t)), torch.zeros(len(h_s), dtype=torch.long)
    options = {**ours, "temperature": temperature, "kd_weight": 1 / temperature**2}
    total = distillation_loss(h_s, OutputHead(w_s), teacher, labels, **options).total / len(h_s)
    (gradient,) = torch.autograd.grad(total, w_s)
    for loss in losses():
        torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-7)
        (expected,) = torch.autograd.grad(loss, w_s)
        torch.testing.assert_close(expected, gradient, rtol=1e-4, atol=1e-6)
