"""Divergences between teacher and student, and their gradients.

Each function works in place on a few rows of logits, which `losses.fused` computes. The gradients are written by hand
because autograd would keep several copies of every row.

Shapes: n rows (tokens), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tv", "mse", "cosine"]

#: Divergences that compare logits. The others compare probabilities, at a temperature.
OF_LOGITS: frozenset[Divergence] = frozenset({"mse", "cosine"})


@dataclass(frozen=True)
class Rows:
    """Logits and probabilities of both models at n tokens.

    Attributes:
        teacher: [n, V], the teacher's logits over T.
        student: [n, V], the student's logits over T.
        difference: [n, V], `teacher - student`; replaced by the gradient.
        offset: [n, 1], so that `difference + offset` is log p - log q.
        p: [n, V], the teacher's probabilities.
        q: [n, V], the student's probabilities.
    """

    teacher: Tensor
    student: Tensor
    difference: Tensor
    offset: Tensor
    p: Tensor
    q: Tensor


def _reverse_kl(rows: Rows, beta: float) -> Tensor:
    """Σ q (log q - log p); with r = log p - log q its gradient is -q (r + D)."""
    ratio = rows.difference.add_(rows.offset)
    value = -torch.linalg.vecdot(rows.q, ratio)[:, None]
    ratio.add_(value).mul_(rows.q).neg_()
    return value


def _jensen_shannon(rows: Rows, beta: float) -> Tensor:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q.

    With l = log(m / q) the gradient with respect to q is -(1 - β) l, up to a constant. It is taken of
    l - log(1 - β), which is nearly 0 wherever p is much smaller than q, as it is nearly everywhere: else the sum of q,
    which is 1 to five digits at a large vocabulary, would cost digits of the gradient.
    """
    ratio = rows.difference.add_(rows.offset)
    kl = torch.linalg.vecdot(rows.p, ratio)[:, None]
    torch.logaddexp(ratio.add_(math.log(beta / (1 - beta))), torch.zeros_like(rows.offset), out=ratio)
    of_p, of_q = (torch.linalg.vecdot(probabilities, ratio)[:, None] for probabilities in (rows.p, rows.q))
    ratio.sub_(of_q).mul_(rows.q).mul_(beta - 1)
    return beta * (kl - of_p) - (1 - beta) * of_q - math.log1p(-beta)


def _total_variation(rows: Rows, beta: float) -> Tensor:
    """½ Σ |p - q|; its gradient with respect to q is ½ sign(q - p)."""
    sign = torch.sub(rows.q, rows.p, out=rows.difference)
    value = 0.5 * torch.linalg.vector_norm(sign, ord=1, dim=-1, keepdim=True)
    sign.sign_().mul_(0.5)
    sign.sub_(torch.linalg.vecdot(rows.q, sign)[:, None]).mul_(rows.q)
    return value


def _mean_squared_error(rows: Rows, beta: float) -> Tensor:
    """Mean over the vocabulary of the squared difference of the logits."""
    size = rows.difference.shape[-1]
    value = torch.linalg.vecdot(rows.difference, rows.difference)[:, None] / size
    rows.difference.mul_(-2 / size)
    return value


def _cosine(rows: Rows, beta: float) -> Tensor:
    """1 - the cosine of the two vectors of logits."""
    t, s = rows.teacher, rows.student
    norm_t, norm_s = (torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=rows.p.dtype) for z in (t, s))
    cosine = torch.linalg.vecdot(t.to(rows.p.dtype), s.to(rows.p.dtype))[:, None] / (norm_t * norm_s)
    rows.difference.copy_(s).mul_(cosine / norm_s.square()).sub_(t / (norm_t * norm_s))
    return 1 - cosine


#: Value [n, 1] of some rows; `difference` becomes the gradient with respect to the student's logits over T. The KL of
#: the teacher to the student is not here: `losses` computes it in any case, for the report, and at fewer passes.
DIVERGENCES: Mapping[Divergence, Callable[[Rows, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tv": _total_variation,
    "mse": _mean_squared_error,
    "cosine": _cosine,
}


def require_divergence(name: str, beta: float, temperature: float) -> None:
    """Refuse an unknown divergence, and parameters that do not fit it.

    Raises:
        ValueError: naming what is expected.
    """
    if name not in get_args(Divergence):
        raise ValueError(f"divergence={name!r}: expected one of {', '.join(get_args(Divergence))}.")
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd_beta={beta}: expected a number between 0 and 1; the limits are the forward and the reverse KL."
        )
    if name in OF_LOGITS and temperature != 1:
        raise ValueError(f"temperature={temperature}: divergence={name!r} compares logits, which have no temperature.")
