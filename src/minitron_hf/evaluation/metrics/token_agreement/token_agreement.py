"""Agreement of two models' most probable tokens, as a metric of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from minitron_hf.evaluation.quality import mean_and_error

_DESCRIPTION = "Share of positions at which two models find the same token most probable (top-1 agreement)."

_INPUTS = """
Args:
    predictions: per document, the model's most probable tokens, int [T].
    references: per document, the reference model's, int [T].

Returns:
    token_agreement, between 0 and 1, and its standard error over documents, token_agreement_stderr.
"""


class TokenAgreement(evaluate.Metric):
    """Compares documents of token ids."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float | None]:
        pairs = list(zip(predictions, references, strict=True))
        equal = [sum(a == b for a, b in zip(ours, theirs, strict=True)) for ours, theirs in pairs]
        value, stderr = mean_and_error(equal, [len(ours) for ours, _ in pairs])
        return {"token_agreement": value, "token_agreement_stderr": stderr}
