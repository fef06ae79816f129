"""Teacher signals: dense logits, the top-k log-probabilities with the probability of all others, or sampled tokens."""

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
        vocab_size: V, size of the vocabulary.
        kept_share: of a student that lacks some of the teacher's tokens, see `kept_logits`; None: it has all.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocab_size: int
    kept_share: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class SampledSignal:
    """Tokens drawn from the teacher's distribution, weighted so that the gradient of the KL is right on average.

    With the weights ŵ of a token's draws, E[ŵ] = p. The gradient of KL(p ‖ q) with respect to the student's logits is
    q - p, linear in p, so the mean gradient over the draws is that of the whole distribution (arXiv 2503.16870). This
    holds for the forward KL and the cross-entropy to the teacher, for no other divergence.

    Attributes:
        tokens: int64 [N, m], the most likely one first, also where it was not drawn; then the others that were drawn.
            Rows with fewer tokens are filled up with any token of weight 0.
        weights: [N, m], draws of the token divided by all draws of its row; they sum to 1.
        entropy: [N], of the teacher's whole distribution in nats, with which the value of the KL is right on average.
        vocab_size: V, size of the vocabulary.
        kept_share: of a student that lacks some of the teacher's tokens, see `kept_logits`; None: it has all.
    """

    tokens: Tensor
    weights: Tensor
    entropy: Tensor
    vocab_size: int
    kept_share: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def log_weights(self, where: slice, out: Tensor) -> Tensor:
        """Logarithms of the weights of all tokens, [n, V], in `out`; finite, and exp of them is 0 for weights of 0."""
        out.zero_().scatter_add_(-1, self.tokens[where], self.weights[where].to(out.dtype))
        return out.log_().clamp_(min=-1e4)

    def surplus_entropy(self, where: slice) -> Tensor:
        """Entropy of the weights minus that of the teacher, [n]: what their KL to the student lacks."""
        return torch.special.entr(self.weights[where]).sum(-1) - self.entropy[where]


#: What the student learns from. Only the functions below and `fused._Rows` depend on the kind of signal.
TeacherSignal = DenseSignal | TopKSignal | SampledSignal


def kept_logits(logits: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The teacher's logits at the tokens that a student has, and what the others take away.

    Args:
        logits: [n, V_t], over T.
        kept: int64 [V], the teacher's id of every token of the student; None: it has all.

    Returns:
        [n, V]; and [n], the teacher's probability of all kept tokens, which weights a position (`losses.dropped`),
        negative where its most likely token is not among them. None where all are kept.
    """
    if kept is None:
        return logits, None
    found = logits.index_select(-1, kept.to(logits.device))
    share = (found.logsumexp(-1) - logits.logsumexp(-1)).exp().clamp(max=1)
    return found, torch.where(found.amax(-1) < logits.amax(-1), -share, share)


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
    kept_share = None if signal.kept is None else torch.empty_like(log_tail)
    for chunk in even_slices(len(signal), size):
        logits, share = kept_logits(head_logits(hidden[chunk], head).to(dtype) / temperature, signal.kept)
        if kept_share is not None and share is not None:
            kept_share[chunk] = share
        normaliser = logits.logsumexp(-1, keepdim=True)
        values, tokens[chunk] = logits.topk(top_k)
        log_probs[chunk] = values - normaliser
        # Summed over the other tokens: one minus the sum of the k is only rounding error where that sum is nearly 1.
        log_tail[chunk] = logits.scatter_(-1, tokens[chunk], -torch.inf).logsumexp(-1) - normaliser[:, 0]
    return TopKSignal(tokens, log_probs, log_tail, signal.vocab_size, kept_share)


@torch.no_grad()
def sampled_signal(
    signal: DenseSignal,
    num_draws: int,
    offsets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> SampledSignal:
    """Draw tokens from the teacher's distribution, with the head applied to a chunk of tokens at a time.

    The draws of a position are the tokens at the points (u + j) / D of the cumulative distribution, j = 0 … D - 1
    (systematic sampling). A token of probability p is drawn ⌊D·p⌋ or ⌈D·p⌉ times, D·p times on average over u. So
    the weights are as unbiased as those of independent draws, and vary less: their variance is at most 1 / 4D², not
    p(1 - p) / D.

    Args:
        signal: N hidden states of the teacher, and its head.
        num_draws: D, draws of each position.
        offsets: float64 [N], u of each position, uniform in [0, 1).
        temperature: T of the distribution.
        chunk_size: tokens whose logits are in memory at one time; by default chosen from the vocabulary size.

    Returns:
        At most D + 1 tokens of each position, in float32, or float64 for float64 states.
    """
    hidden, head = signal.hidden, signal.head
    size = default_chunk_size(hidden.shape[0], head.vocab_size, hidden.device) if chunk_size is None else chunk_size
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tokens = torch.zeros((len(signal), num_draws + 1), dtype=torch.long, device=hidden.device)
    weights = torch.zeros((len(signal), num_draws + 1), dtype=dtype, device=hidden.device)
    entropy = torch.empty(len(signal), dtype=dtype, device=hidden.device)
    kept_share = None if signal.kept is None else torch.empty_like(entropy)
    # In float64, which MPS lacks: in float32 the sum over a large vocabulary loses the tokens of small probability.
    exact = torch.float32 if hidden.device.type == "mps" else torch.float64
    offsets, steps = offsets.to(hidden.device, exact), torch.arange(num_draws, device=hidden.device)
    for chunk in even_slices(len(signal), size):
        logits, share = kept_logits(head_logits(hidden[chunk], head).to(dtype) / temperature, signal.kept)
        if kept_share is not None and share is not None:
            kept_share[chunk] = share
        best = logits.argmax(-1)
        cumulative = torch.softmax(logits, -1, dtype=exact)
        entropy[chunk] = torch.special.entr(cumulative).sum(-1).to(dtype)
        cumulative = cumulative.cumsum_(-1)
        points = (offsets[chunk, None] + steps) / num_draws * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=signal.vocab_size - 1)
        tokens[chunk], counts = _counted(drawn, best)
        weights[chunk] = counts.to(dtype) / num_draws
    return SampledSignal(tokens, weights, entropy, signal.vocab_size, kept_share)


def _counted(drawn: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Different tokens and their counts, [n, D + 1] each.

    Args:
        drawn: [n, D], ascending.
        best: [n], the token that comes first.
    """
    is_best = drawn == best[:, None]
    is_new = torch.ones_like(is_best)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = (is_new & ~is_best).cumsum(-1).masked_fill_(is_best, 0)
    tokens = best[:, None].repeat(1, drawn.shape[1] + 1)
    tokens.scatter_(1, place, drawn)
    counts = torch.zeros_like(tokens).scatter_add_(1, place, torch.ones_like(drawn))
    return tokens, counts
