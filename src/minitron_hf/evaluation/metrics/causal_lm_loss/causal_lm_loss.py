"""Loss, perplexity and bits per byte of a causal language model, as a metric of the `evaluate` library."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import torch

from minitron_hf.evaluation.quality import mean_and_error, token_log_probabilities

_DESCRIPTION = "Mean negative log-likelihood per token, with perplexity, bits per byte and standard errors."

_INPUTS = """
Args:
    predictions: per document, the logits [T, V] that predict its tokens.
    references: per document, the predicted tokens, int [T].
    num_bytes: UTF-8 bytes of all documents together, for bits per byte.

Returns:
    loss (nats per token), perplexity, bits_per_byte (None without num_bytes), each with its standard error over
    documents as <name>_stderr.
"""


class CausalLMLoss(evaluate.Metric):
    """Streams: a batch of logits is reduced to log-probabilities when it is added."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            # Stored per document: the log-probability of each of its tokens.
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add documents."""
        kept = [
            token_log_probabilities(torch.as_tensor(logits), torch.as_tensor(tokens)).numpy()
            for logits, tokens in zip(predictions, references, strict=True)
        ]
        self.add_values(kept)

    def add_values(self, values: Any) -> None:
        """Add documents whose log-probabilities are known: float64 [T] each."""
        evaluate.Metric.add_batch(self, predictions=values)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Add one document."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None, num_bytes: int | None = None) -> Any:
        """Compute over all documents added so far."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        return evaluate.Metric.compute(self, num_bytes=num_bytes)

    def _compute(self, *, predictions: Any, num_bytes: int | None = None) -> dict[str, float | None]:
        counts = [len(document) for document in predictions]
        value, stderr = mean_and_error([-math.fsum(document) for document in predictions], counts)
        try:
            perplexity = math.exp(value)
        except OverflowError:
            perplexity = math.inf
        per_byte = sum(counts) / (num_bytes * math.log(2)) if num_bytes else None
        return {
            "loss": value,
            "loss_stderr": stderr,
            "perplexity": perplexity,
            "perplexity_stderr": None if stderr is None else perplexity * stderr,
            "bits_per_byte": None if per_byte is None else value * per_byte,
            "bits_per_byte_stderr": None if per_byte is None or stderr is None else stderr * per_byte,
        }
