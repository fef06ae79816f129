"""Teacher signals: dense logits, or the top-k log-probabilities and the probability of all other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import default_chunk_size, even_slices
from .heads import OutputHead, head_logits


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole distribution, as the hidden states and the head that make it.

    Attributes:
        hidden: [N, H_t], hidden states after the final norm.
        head: the teacher's output head.
    """

    hidden: Tensor
    head: OutputHead

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """V of the teacher."""
        return self.head.vocab_size


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's most likely tokens, and how likely all others are together.

    What is compared are k + 1 outcomes: the k tokens, and "another one". By the data-processing inequality no
    divergence of them exceeds that of the whole distributions; it does not fall as k grows, and is the same at k = V.

    Attributes:
        tokens: int64 [N, k], distinct in every row, the most likely one first.
        log_probs: [N, k], their log-probabilities at the temperature of the loss.
        log_tail: [N], log-probability of all other tokens together.
        vocab_size: V of the teacher.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocab_size: int

    def __len__(self) -> int:
        return self.tokens.shape[0]


#: What the student learns from. Everything that looks inside a signal is in `top_k_signal` and `_Rows`.
TeacherSignal = DenseSignal | TopKSignal


@torch.no_grad()
def top_k_signal(
    signal: DenseSignal, top_k: int, *, temperature: float = 1.0, chunk_size: int | None = None
) -> TopKSignal:
    """What `signal` says of its most likely tokens, with the head applied to a chunk of tokens at a time.

    Args:
        signal: N hidden states of the teacher, and its head.
        top_k: tokens to keep, V at most.
        temperature: T of the log-probabilities.
        chunk_size: tokens whose logits exist at one time.

    Returns:
        Log-probabilities in float32, or float64 for float64 states.
    """
    hidden, head = signal.hidden, signal.head
    size = default_chunk_size(hidden.shape[0], head.vocab_size, hidden.device) if chunk_size is None else chunk_size
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tokens = torch.empty((len(signal), top_k), dtype=torch.long, device=hidden.device)
    log_probs = torch.empty((len(signal), top_k), dtype=dtype, device=hidden.device)
    log_tail = torch.empty(len(signal), dtype=dtype, device=hidden.device)
    for chunk in even_slices(len(signal), size):
        logits = head_logits(hidden[chunk], head).to(dtype) / temperature
        normaliser = logits.logsumexp(-1, keepdim=True)
        values, tokens[chunk] = logits.topk(top_k)
        log_probs[chunk] = values - normaliser
        # Of the others themselves: one minus the sum of the k would be rounding where the k are nearly all.
        log_tail[chunk] = logits.scatter_(-1, tokens[chunk], -torch.inf).logsumexp(-1) - normaliser[:, 0]
    return TopKSignal(tokens, log_probs, log_tail, head.vocab_size)
