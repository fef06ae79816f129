"""The tokens of the teacher that the student lacks: their probability is the weight that a position loses.

With p over the teacher's tokens, K those that the student has, and m = Σ_K p, a position contributes m·D(p / m, q).
For the forward KL this is Σ_K p (log p - log q), up to a constant: all other tokens are one more outcome. The student
can place no probability on it, so its part of the divergence cannot be learnt, and is left out. Where the teacher
expects a dropped token, the position counts little: the student's text goes on with shorter tokens there.

Shapes: n rows of a chunk, V_t tokens of the teacher, V of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import even_slices
from .products import scaled_logits
from .signals import DenseSignal, TeacherSignal


class DroppedTokens:
    """Log-sum and maximum of the teacher's logits over T at the tokens that the student lacks.

    Args:
        signal: the teacher's, with `kept`.
        temperature: T.
        like: a tensor of the dtype and device of the sums.
        block: rows at a time.
    """

    def __init__(self, signal: DenseSignal, temperature: float, like: Tensor, block: int) -> None:
        assert signal.kept is not None
        self.kept, self.head = signal.kept.to(like.device), signal.head
        self.temperature, self.block = temperature, block
        self.scratch = like.new_empty((min(block, len(signal)), self.head.vocab_size))
        self.log_sum, self.largest = like.new_empty(len(signal)), like.new_empty(len(signal))

    def split(self, chunk: slice, product: Tensor) -> Tensor:
        """Keep sums of the dropped tokens of a chunk; return its raw logits at the kept ones.

        Args:
            chunk: rows of all tokens.
            product: raw logits [n, V_t]; may be overwritten.

        Returns:
            [n, V].
        """
        kept = product.index_select(1, self.kept)
        for block in even_slices(len(product), self.block):
            part = product[block]
            scratch = self.scratch[: len(part)]
            logits = scaled_logits(part, self.head.scale, self.head.softcap, self.temperature, scratch)
            logits.index_fill_(1, self.kept, -torch.inf)
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            self.log_sum[rows], self.largest[rows] = logits.logsumexp(-1), logits.amax(-1)
        return kept

    def share_kept(self, where: slice, log_sum: Tensor) -> Tensor:
        """The teacher's probability of all kept tokens [n, 1], from the log-sum of their logits over T [n, 1]."""
        return torch.sigmoid(log_sum - self.log_sum[where, None])

    def is_best_kept(self, where: slice, largest: Tensor) -> Tensor:
        """Whether the teacher's most likely token is kept [n], from the largest logit over T of those [n, 1]."""
        return largest[:, 0] >= self.largest[where]


class StoredShare:
    """The same of a teacher cache, which holds the share of the kept tokens instead of logits of the others.

    Args:
        kept_share: [N], see `signals.kept_logits`.
    """

    def __init__(self, kept_share: Tensor) -> None:
        self.stored = kept_share

    def share_kept(self, where: slice, log_sum: Tensor) -> Tensor:
        """The teacher's probability of all kept tokens [n, 1], in the dtype of `log_sum`."""
        return self.stored[where, None].abs().to(log_sum.dtype)

    def is_best_kept(self, where: slice, largest: Tensor) -> Tensor:
        """Whether the teacher's most likely token is kept [n]."""
        return ~torch.signbit(self.stored[where])


def dropped_of(
    signal: TeacherSignal, temperature: float, like: Tensor, block: int
) -> DroppedTokens | StoredShare | None:
    """What a signal tells of the tokens that the student lacks; None: it has all. See `DroppedTokens`."""
    if isinstance(signal, DenseSignal):
        return None if signal.kept is None else DroppedTokens(signal, temperature, like, block)
    return None if signal.kept_share is None else StoredShare(signal.kept_share)
