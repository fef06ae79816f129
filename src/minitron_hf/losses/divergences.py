"""Divergences between teacher and student, and their gradients.

Each function works in place on a few rows of logits, which `losses.fused` computes. The gradients of the built-in
divergences are written by hand, because autograd would keep several copies of every row. Autograd computes those of
registered ones (`register_divergence`).

Shapes: n rows (tokens), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch
from torch import Tensor

from ..errors import DataError, did_you_mean

#: Divergences that compare logits. The others compare probabilities, at a temperature.
OF_LOGITS: frozenset[str] = frozenset({"mse", "cosine"})

#: Other packages offer divergences under this group of entry points; each names a registered function.
ENTRY_POINTS = "minitron_hf.divergences"

#: Log-probabilities of teacher and student, both [n, V] → values [n].
DivergenceFunction = Callable[[Tensor, Tensor], Tensor]


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
        with_gradient: whether the gradient is needed. Without it, `difference` may hold anything afterwards.
    """

    teacher: Tensor
    student: Tensor
    difference: Tensor
    offset: Tensor
    p: Tensor
    q: Tensor
    with_gradient: bool = True


def _reverse_kl(rows: Rows, beta: float) -> Tensor:
    """Σ q (log q - log p); with r = log p - log q its gradient is -q (r + D)."""
    ratio = rows.difference.add_(rows.offset)
    value = -torch.linalg.vecdot(rows.q, ratio)[:, None]
    if rows.with_gradient:
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
    if rows.with_gradient:
        ratio.sub_(of_q).mul_(rows.q).mul_(beta - 1)
    return beta * (kl - of_p) - (1 - beta) * of_q - math.log1p(-beta)


def _total_variation(rows: Rows, beta: float) -> Tensor:
    """½ Σ |p - q|; its gradient with respect to q is ½ sign(q - p)."""
    sign = torch.sub(rows.q, rows.p, out=rows.difference)
    value = 0.5 * torch.linalg.vector_norm(sign, ord=1, dim=-1, keepdim=True)
    if rows.with_gradient:
        sign.sign_().mul_(0.5)
        sign.sub_(torch.linalg.vecdot(rows.q, sign)[:, None]).mul_(rows.q)
    return value


def _mean_squared_error(rows: Rows, beta: float) -> Tensor:
    """Mean over the vocabulary of the squared difference of the logits."""
    size = rows.difference.shape[-1]
    value = torch.linalg.vecdot(rows.difference, rows.difference)[:, None] / size
    if rows.with_gradient:
        rows.difference.mul_(-2 / size)
    return value


def _cosine(rows: Rows, beta: float) -> Tensor:
    """1 - the cosine of the two vectors of logits."""
    t, s = rows.teacher, rows.student
    norm_t, norm_s = (torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=rows.p.dtype) for z in (t, s))
    cosine = torch.linalg.vecdot(t.to(rows.p.dtype), s.to(rows.p.dtype))[:, None] / (norm_t * norm_s)
    if rows.with_gradient:
        rows.difference.copy_(s).mul_(cosine / norm_s.square()).sub_(t / (norm_t * norm_s))
    return 1 - cosine


#: Value [n, 1] of some rows; `difference` becomes the gradient with respect to the student's logits over T, if it is
#: needed. The KL of the teacher to the student is not here: `losses` computes it in any case, and at fewer passes.
DIVERGENCES: dict[str, Callable[[Rows, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tv": _total_variation,
    "mse": _mean_squared_error,
    "cosine": _cosine,
}


#: The functions of `register_divergence`, by name.
REGISTERED: dict[str, DivergenceFunction] = {}


def register_divergence(name: str) -> Callable[[DivergenceFunction], DivergenceFunction]:
    """Make a function a divergence: `DistillationConfig(divergence=name)`, recipes and the command line take it.

    It is known in this process. A package that offers the function as an entry point of the group
    `minitron_hf.divergences` makes it known everywhere, also to the command line.

    The function takes the log-probabilities of teacher and student at the temperature, both `[n, V]` for n tokens and
    a vocabulary of V, in float32. It returns one value per token, `[n]`. In training, autograd differentiates it with
    respect to the student's logits, a few rows at a time.

    Args:
        name: its name for users.

    Returns:
        A decorator that returns the function itself.

    Raises:
        DataError: if the name belongs to another function.

    Example:
        >>> @register_divergence("hellinger")  # doctest: +SKIP
        ... def hellinger(teacher, student):
        ...     return 1 - ((teacher + student) / 2).exp().sum(-1)
    """

    def register(function: DivergenceFunction) -> DivergenceFunction:
        known = REGISTERED.get(name)
        # A notebook cell that is run again defines the same.
        same = known is not None and _origin(known) == _origin(function)
        if name == "forward_kl" or (name in DIVERGENCES and not same):
            raise DataError(f"There is a divergence {name!r} already. Choose another name.")
        REGISTERED[name] = function
        DIVERGENCES[name] = _differentiated(name, function)
        return function

    return register


def _origin(function: DivergenceFunction) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _differentiated(name: str, function: DivergenceFunction) -> Callable[[Rows, float], Tensor]:
    """A function of log-probabilities as an entry of `DIVERGENCES`."""

    def evaluate(rows: Rows, beta: float) -> Tensor:
        dtype = rows.p.dtype
        with torch.set_grad_enabled(rows.with_gradient):
            student = rows.student.detach().to(dtype, copy=True).requires_grad_(rows.with_gradient)
            teacher = torch.log_softmax(rows.teacher.detach(), -1, dtype=dtype)
            value = function(teacher, torch.log_softmax(student, -1))
            if not isinstance(value, Tensor) or value.shape != student.shape[:1]:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise DataError(
                    f"divergence={name!r} returned {shape}; expected one value per token: {[len(student)]}."
                )
            if rows.with_gradient:
                rows.difference.copy_(torch.autograd.grad(value.sum(), student)[0])
        return value.detach()[:, None]

    return evaluate


def divergence_names() -> tuple[str, ...]:
    """Names of all divergences: of this package, of entry points, and registered in this process."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return ("forward_kl", *DIVERGENCES)


def require_divergence(name: str, beta: float, temperature: float) -> None:
    """Refuse an unknown divergence, and parameters that do not fit it.

    Raises:
        DataError: naming what is expected.
    """
    names = divergence_names()
    if name not in names:
        raise DataError(
            f"divergence={name!r}: expected one of {', '.join(names)}.{did_you_mean(str(name), names)} "
            "register_divergence adds one."
        )
    if not 0 < beta < 1:
        raise DataError(
            f"jsd_beta={beta}: expected a number between 0 and 1; the limits are the forward and the reverse KL."
        )
    if name in OF_LOGITS and temperature != 1:
        raise DataError(f"temperature={temperature}: divergence={name!r} compares logits, which have no temperature.")
