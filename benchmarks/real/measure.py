"""Measures a student on fixed held-out rows, row by row, so that arms can be compared in pairs.

Shapes: N predicted tokens of a row, H hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_hf import token_rows
from minitron_hf.data import TokenRows, padded_batches
from minitron_hf.evaluation.means import mean_and_error
from minitron_hf.evaluation.quality import token_divergences, token_log_probabilities
from minitron_hf.files import replacing_file
from minitron_hf.losses.heads import OutputHead, backbone_output, head_logits, output_head
from minitron_hf.models import evaluating
from minitron_hf.weights import input_device

from .arms import key
from .corpora import read_texts

#: What is summed over the tokens of each row. `agree` counts tokens.
VALUES = ("loss", "kl", "agree")

#: Row sums by value: `{"loss": [R], "kl": [R], "agree": [R]}`.
RowSums = dict[str, list[float]]


@dataclass(frozen=True)
class Domain:
    """Held-out rows: every document begins a row, and every token after its first is predicted exactly once."""

    name: str
    rows: TokenRows

    @classmethod
    def read(cls, name: str, source: str, tokenizer: Any, num_rows: int, max_length: int) -> Domain:
        """The rows that `evaluate_models(num_rows=…, max_length=…)` reads."""
        rows = token_rows(
            read_texts(source), tokenizer, max_length=max_length, num_rows=num_rows, packing=False, overlap=1
        )
        return cls(name, rows)

    @property
    def counts(self) -> list[int]:
        """Predicted tokens of each row."""
        return [len(self.rows.predicted(index)) for index in range(len(self.rows))]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the tokens."""
        return {
            "digest": self.rows.digest,
            "num_rows": len(self.rows),
            "num_tokens": self.rows.num_predicted,
            "num_bytes": self.rows.num_bytes,
            "tokens": packed(self.counts),
        }


class Reference:
    """The teacher on one domain: its hidden states, computed once, and its loss on every row."""

    def __init__(self, states: list[Tensor], loss: list[float], head: OutputHead) -> None:
        self.states, self.loss, self.head = states, loss, head

    @classmethod
    def of(cls, teacher: Any, digest: str, domain: Domain, folder: Path, check: Callable[[], None]) -> Reference:
        """Read it from a folder, or compute it and write it there."""
        head = output_head(teacher)
        path = folder / f"teacher-{domain.name}-{key(digest, str(teacher.dtype), domain.rows.digest)}.pt"
        if not path.is_file():
            states = hidden_states(teacher, domain.rows, check)
            targets = _targets(domain.rows)
            loss = [
                -token_log_probabilities(head_logits(h_NH, head), t_N).sum().item()
                for h_NH, t_N in zip(states, targets)
            ]
            with replacing_file(path) as temporary:
                torch.save({"states": [one.cpu() for one in states], "loss": loss}, temporary)
        stored = torch.load(path, weights_only=True)
        return cls(stored["states"], stored["loss"], head)


@torch.no_grad()
def hidden_states(
    model: Any, rows: TokenRows, check: Callable[[], None] = lambda: None, batch_size: int = 8
) -> list[Tensor]:
    """Hidden states [N, H] that predict the measured tokens of every row.

    Args:
        model: in evaluation mode afterwards as before.
        rows: to be read.
        check: called before every batch; may raise, to stop.
        batch_size: rows at a time.
    """
    found = []
    with evaluating([model]):
        for index, batch in enumerate(padded_batches(rows, batch_size)):
            check()
            # Padding is on the right, where causal attention never looks.
            h_BTH = backbone_output(
                model, input_ids=batch["input_ids"].to(input_device(model)), use_cache=False
            ).last_hidden_state
            for offset, h_TH in enumerate(h_BTH):
                places = torch.tensor(rows.predicted(index * batch_size + offset)) - 1
                found.append(h_TH[places.to(h_TH.device)])
    return found


@torch.no_grad()
def row_sums(model: Any, domain: Domain, reference: Reference, check: Callable[[], None] = lambda: None) -> RowSums:
    """Loss, KL(teacher ‖ model) and top-1 agreement of a model, summed over the tokens of each row."""
    head = output_head(model)
    sums: RowSums = {name: [] for name in VALUES}
    targets = _targets(domain.rows)
    for h_NH, r_NH, t_N in zip(hidden_states(model, domain.rows, check), reference.states, targets, strict=True):
        logits_NV = head_logits(h_NH, head)
        reference_NV = head_logits(r_NH.to(reference.head.weight.device), reference.head)
        sums["loss"].append(-token_log_probabilities(logits_NV, t_N).sum().item())
        sums["kl"].append(token_divergences(logits_NV, reference_NV).sum().item())
        sums["agree"].append((logits_NV.argmax(-1) == reference_NV.argmax(-1).to(logits_NV.device)).sum().item())
    return sums


def _targets(rows: TokenRows) -> list[Tensor]:
    return [torch.tensor([rows.rows[index][place] for place in rows.predicted(index)]) for index in range(len(rows))]


# ---- Storage ----


def packed(values: list[float] | list[int]) -> str:
    """Pack numbers with six digits into one string, so that the values of all rows are one line of JSON.

    >>> packed([511, 1234.5678]), unpacked("511 1234.57")
    ('511 1234.57', [511.0, 1234.57])
    """
    return " ".join(f"{value:.6g}" for value in values)


def unpacked(text: str) -> list[float]:
    """The reverse of `packed`."""
    return [float(value) for value in text.split()]


def summary(sums: Mapping[str, list[float]], counts: list[int], num_bytes: int | None) -> dict[str, Any]:
    """Means per token, and bits per byte, with standard errors over rows; names as in `evaluate_models`."""

    def entry(name: str, scale: float = 1.0) -> dict[str, float | None]:
        value, error = mean_and_error(sums[name], counts)
        return {"value": round(value * scale, 6), "stderr": None if error is None else round(error * scale, 6)}

    found = {"loss": entry("loss")}
    if num_bytes:
        found["bits_per_byte"] = entry("loss", bits_per_byte(counts, num_bytes))
    names = {"kl": "kl_divergence", "agree": "top1_agreement"}
    return found | {names[name]: entry(name) for name in names if name in sums}


def bits_per_byte(counts: list[int], num_bytes: int) -> float:
    """Factor from nats per token to bits per byte."""
    return sum(counts) / (num_bytes * math.log(2))
