"""KL divergence of a causal language model from a reference model, as a metric of the `evaluate` library."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import torch

from minitron_hf.evaluation.quality import mean_and_error, token_divergences

_DESCRIPTION = "KL(references ‖ predictions) of the next-token distributions, in nats per token."

_INPUTS = """
Args:
    predictions: per document, the logits [T, V] of the model.
    references: per document, the logits [T, V] of the reference model (the teacher) at the same tokens.

Returns:
    kl_divergence and its standard error over documents, kl_divergence_stderr.
"""


class KLDivergence(evaluate.Metric):
    """Streams: a batch of logits is reduced to one divergence per token when it is added."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            # Stored per document: the divergence at each of its tokens.
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add documents."""
        kept = [
            token_divergences(torch.as_tensor(logits), torch.as_tensor(reference)).numpy()
            for logits, reference in zip(predictions, references, strict=True)
        ]
        self.add_values(kept)

    def add_values(self, values: Any) -> None:
        """Add documents whose divergences are known: float64 [T] each."""
        evaluate.Metric.add_batch(self, predictions=values)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Add one document."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None) -> Any:
        """Compute over all documents added so far."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        return evaluate.Metric.compute(self)

    def _compute(self, *, predictions: Any) -> dict[str, float | None]:
        value, stderr = mean_and_error(
            [math.fsum(document) for document in predictions], [len(d) for d in predictions]
        )
        return {"kl_divergence": value, "kl_divergence_stderr": stderr}
