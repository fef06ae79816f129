"""Per-token values, their standard errors, and the metrics of the `evaluate` library, against algebraic laws."""

from __future__ import annotations

import math

import pytest
import torch

from minitron_hf.errors import DataError, MismatchError
from minitron_hf.evaluation import quality
from minitron_hf.evaluation.quality import load_metric, mean_and_error


def test_divergence_of_a_sharpened_model_has_a_closed_form():
    """KL between softmax(x) and softmax(βx) by the log-partition function: ln Z(β) − ln Z(1) + (1−β) E_p[x]."""
    x = torch.randn(50, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    beta = 1.7
    mean = (torch.softmax(x, -1) * x).sum(-1)
    expected = torch.logsumexp(beta * x, -1) - torch.logsumexp(x, -1) + (1 - beta) * mean
    torch.testing.assert_close(quality.token_divergences(beta * x, x), expected, rtol=1e-12, atol=1e-12)


def test_impossible_outcomes_add_nothing_to_the_divergence():
    reference = torch.tensor([[0.3, -0.2, -math.inf]])
    model = torch.tensor([[0.1, 0.5, -math.inf]])
    expected = quality.token_divergences(model[:, :2], reference[:, :2])
    torch.testing.assert_close(quality.token_divergences(model, reference), expected)
    # The model excludes what the reference finds possible.
    assert quality.token_divergences(reference, torch.zeros(1, 3)).item() == math.inf


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(23, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(7, (23,), generator=generator)
    whole = quality.token_divergences(logits, other), quality.token_log_probabilities(logits, tokens)
    monkeypatch.setattr(quality, "CHUNK_ELEMENTS", 20)
    parts = quality.token_divergences(logits, other), quality.token_log_probabilities(logits, tokens)
    for one, two in zip(whole, parts):
        assert one.dtype == two.dtype == torch.float64
        assert one.shape == (23,)
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_half_precision_logits_are_read_in_float32():
    logits = torch.linspace(-20, 20, 64).half().unsqueeze(0)
    tokens = torch.tensor([3])
    expected = torch.log_softmax(logits.double(), -1)[0, 3]
    assert quality.token_log_probabilities(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_error_of_documents_of_one_length_is_the_usual_one():
    means = [1.0, 4.0, 2.5, 3.0]
    value, stderr = mean_and_error([10 * mean for mean in means], [10] * 4)
    assert value == pytest.approx(torch.tensor(means).mean().item())
    assert stderr == pytest.approx(torch.tensor(means).std().item() / 2)


def test_the_error_predicts_the_spread_of_repeated_samples():
    """Documents of random length whose loss depends on their length: the ratio estimator's spread, by simulation."""
    generator = torch.Generator().manual_seed(0)
    estimates, errors = [], []
    for _ in range(400):
        counts = torch.randint(1, 60, (200,), generator=generator)
        sums = counts * (2 + 0.02 * counts + torch.randn(200, generator=generator))
        value, stderr = mean_and_error(sums.tolist(), counts.tolist())
        estimates.append(value)
        errors.append(stderr)
    spread = torch.tensor(estimates).std().item()
    # 400 repetitions know their own spread to 1/√800 = 3.5 %.
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.12)


def test_metrics_stream_and_load_without_a_network(monkeypatch: pytest.MonkeyPatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    generator = torch.Generator().manual_seed(0)
    logits, other = ([torch.randn(n, 9, generator=generator) for n in (5, 1, 8)] for _ in range(2))
    tokens = [torch.randint(9, (n,), generator=generator) for n in (5, 1, 8)]
    best = [[row.argmax(-1).tolist() for row in rows] for rows in (logits, other)]
    inputs = {
        "causal_lm_loss": (logits, tokens),
        "kl_divergence": (logits, other),
        "token_agreement": tuple(best),
    }
    expected = {
        "loss": -sum(torch.log_softmax(r, -1)[torch.arange(len(t)), t].sum() for r, t in zip(logits, tokens)) / 14,
        "kl_divergence": sum(
            torch.nn.functional.kl_div(
                torch.log_softmax(q, -1), torch.log_softmax(p, -1), reduction="sum", log_target=True
            )
            for q, p in zip(logits, other)
        )
        / 14,
        "token_agreement": sum(int((q.argmax(-1) == p.argmax(-1)).sum()) for q, p in zip(logits, other)) / 14,
    }
    assert set(inputs) == set(quality.METRICS)
    for name, (predictions, references) in inputs.items():
        at_once = load_metric(name).compute(predictions=predictions, references=references)
        streamed = load_metric(name)
        streamed.add_batch(predictions=predictions[:2], references=references[:2])
        streamed.add(prediction=predictions[2], reference=references[2])
        result = streamed.compute()
        assert result == at_once
        key = "loss" if name == "causal_lm_loss" else name
        assert result[key] == pytest.approx(float(expected[key]), rel=1e-5)
        assert result[f"{key}_stderr"] > 0


def test_many_metrics_at_once_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    """`evaluate` would lock one cache file for all instances of a metric, in all processes of a user."""
    import evaluate.module

    metrics = [load_metric("token_agreement") for _ in range(3)]
    monkeypatch.delattr(evaluate.module, "FileLock")
    for index, metric in enumerate(metrics):
        metric.add_batch(predictions=[[1, 2]], references=[[1, 2 if index else 3]])
    assert [metric.compute()["token_agreement"] for metric in metrics] == [0.5, 1.0, 1.0]


def test_metrics_refuse_what_does_not_fit():
    with pytest.raises(DataError, match="no metric 'accuracy'"):
        load_metric("accuracy")
    with pytest.raises(MismatchError, match="7 tokens and the reference 8"):
        load_metric("kl_divergence").compute(predictions=[torch.zeros(3, 7)], references=[torch.zeros(3, 8)])
    with pytest.raises(ValueError, match="zip"):
        load_metric("token_agreement").compute(predictions=[[1, 2]], references=[[1]])
