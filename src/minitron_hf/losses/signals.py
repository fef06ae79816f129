"""Teacher signals: dense logits, or the top-k log-probabilities and the probability of all other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import default_chunk_size, even_slices
from .heads import OutputHead, head_logits


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole distribution, as hidden states and output head.

    Attributes:
        hidden: [N, H_t], hidden states after the final norm.
        head: the teacher's output head.
        kept: int64 [V], the teacher's id of every token of a student that lacks some; None: it has all.
    """

    hidden: Tensor
    head: OutputHead
    kept: Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that are compared."""
        return self.head.vocab_size if self.kept is None else len(self.kept)


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's k most likely tokens, and the total probability of all other tokens.

    The loss compares k + 1 outcomes: the k tokens, and "another token". By the data-processing inequality their
    divergence is at most the divergence of the whole distributions; it grows with k, up to equality at k = V.

    Attributes:
        tokens: int64 [N, k], distinct in every row, the most likely one first.
        log_probs: [N, k], their log-probabilities at the temperature of the loss.
        log_tail: [N], log of the total probability of all other tokens.
        vocab_size: V, size of the teacher's vocabulary.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocab_size: int

    def __len__(self) -> int:
        return self.tokens.shape[0]


#: What the student learns from. Only `top_k_signal` and `fused._Rows` depend on the kind of signal.
TeacherSignal = DenseSignal | TopKSignal


@torch.no_grad()
def top_k_signal(
    signal: DenseSignal, top_k: int, *, temperature: float = 1.0, chunk_size: int | None = None
) -> TopKSignal:
    """Reduce a signal to its k most likely tokens, with the head applied to a chunk of tokens at a time.

    Args:
        signal: N hidden states of the teacher, and its head.
        top_k: tokens to keep, V at most.
        temperature: T of the log-probabilities.
        chunk_size: tokens whose logits are in memory at one time; by default chosen from the vocabulary size.

    Returns:
        The top-k signal, in float32, or float64 for float64 states.
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
        # Summed over the other tokens: one minus the sum of the k is only rounding error where that sum is nearly 1.
        log_tail[chunk] = logits.scatter_(-1, tokens[chunk], -torch.inf).logsumexp(-1) - normaliser[:, 0]
    return TopKSignal(tokens, log_probs, log_tail, head.vocab_size)
