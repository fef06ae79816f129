"""Per-token divergence between teacher and student, computed together with both output heads over token chunks.

Shapes: N tokens that count, V vocabulary, H hidden width of the student, H_t of the teacher.

The logits of both models would be the two largest tensors of distillation: at 8,192 tokens and a vocabulary of
128,256, a plain implementation peaks at about seven float32 copies of [N, V], 29 GB. Here the heads are applied to a
few hundred tokens at a time, and the gradients with respect to the student's hidden states and head are formed in
the same pass, so that no [N, V] tensor exists and no projection is computed twice (the idea of Liger Kernel's fused
linear losses, arXiv 2410.10989 §3.2, for two heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import MismatchError
from .chunks import default_chunk_size, even_slices
from .divergences import DIVERGENCES, OF_LOGITS, Rows
from .dropped import DroppedTokens, dropped_of
from .heads import OutputHead, finite_bias
from .products import compute_dtype, project, scaled_logits
from .signals import DenseSignal, SampledSignal, TeacherSignal, TopKSignal


@dataclass(frozen=True)
class TokenLosses:
    """Losses of N tokens.

    Attributes:
        total: scalar, sum over tokens of `kd_weight * T² * divergence + ce_weight * ce`; the only differentiable one.
        divergence: float32 [N], at temperature T, without the factor T².
        kl: float32 [N], KL(teacher ‖ student) in nats at temperature T, whatever the divergence; unbiased if drawn.
        ce: float32 [N], cross-entropy of the student with the true token in nats, at temperature 1.
        agreement: bool [N], whether student and teacher have the same most likely token.
        accuracy: bool [N], whether the true token is the student's most likely one.
        entropy: float32 [N], of the student's distribution in nats, at temperature 1.
    """

    total: Tensor
    divergence: Tensor
    kl: Tensor
    ce: Tensor
    agreement: Tensor
    accuracy: Tensor
    entropy: Tensor


def next_token_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict a token which counts, and those tokens.

    Args:
        labels: int64 [B, T], not shifted; -100 marks tokens that do not count.

    Returns:
        Indices into the flattened [B * T] positions, and the token that follows each: both int64 [N].
    """
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    following = following.reshape(-1)
    positions = (following != -100).nonzero().squeeze(-1)
    return positions, following[positions]


def distillation_loss(
    hidden: Tensor,
    head: OutputHead,
    teacher: TeacherSignal,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk_size: int | None = None,
) -> TokenLosses:
    """Divergence from the teacher and cross-entropy of N tokens, with both output heads, chunk by chunk.

    With p_T = softmax(teacher logits / T) and q_T the same of the student, a token contributes
    `kd_weight * T² * D(p_T, q_T) + ce_weight * -log q_1[label]`, by default with D = KL(p_T ‖ q_T), which Minitron
    found best (arXiv 2407.14679, table 15), as it did T = 1. The factor T² is from Hinton et al. (arXiv 1503.02531
    §2): gradients of the soft targets shrink as 1/T², so with it `kd_weight` keeps its meaning when the temperature
    changes.

    Softmax and sums are in float32 (float64 for float64 inputs) whatever the inputs; matrix products are in the
    autocast dtype where autocast is on, else in the dtype of the head.

    Args:
        hidden: [N, H], the student's hidden states after its final norm.
        head: the student's output head. Its weight and bias get gradients if they require them.
        teacher: the teacher's distributions at the same N tokens. They get no gradient. Where the student lacks some
            of its tokens, D is weighted by the teacher's probability of the others (`losses.dropped`).
        labels: int64 [N], the true next token of each position.
        divergence: D: `"forward_kl"`; `"reverse_kl"`, KL(q ‖ p); `"jsd"`, the Jensen-Shannon divergence generalised
            as in arXiv 2306.13649 (eq. 1); `"tv"`, half the sum of |p - q|; or of the logits, at T = 1: `"mse"`, the
            mean squared difference, and `"cosine"`, one minus the cosine; or a name of `register_divergence`.
        jsd_beta: β of `"jsd"`, the weight of the teacher in the mixture.
        temperature: T. The probabilities of a `TopKSignal` or `SampledSignal` are at this temperature already.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy, which is reported in any case.
        chunk_size: tokens whose logits are in memory at one time; by default chosen from the vocabulary size.

    Returns:
        Per-token values, and their differentiable weighted sum, which can be differentiated once. Divide it by the
        number of tokens of the whole optimiser step.

    Raises:
        MismatchError: if the two vocabularies differ in size, or the divergence cannot be computed from the signal.
    """
    _require_comparable(hidden, head, teacher, labels, divergence)
    if chunk_size is None:
        dtype = compute_dtype(hidden.device, head.weight)
        widest = max(head.vocab_size, teacher.head.vocab_size if isinstance(teacher, DenseSignal) else 0)
        chunk_size = default_chunk_size(hidden.shape[0], widest, hidden.device, dtype)
    settings = _Settings(head.scale, head.softcap, divergence, jsd_beta, temperature, kd_weight, ce_weight, chunk_size)
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # `needs_input_grad` is true of a parameter even then
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return TokenLosses(*_FusedLoss.apply(hidden, weight, bias, labels, teacher, settings))


def _require_comparable(
    hidden: Tensor, head: OutputHead, teacher: TeacherSignal, labels: Tensor, divergence: str
) -> None:
    """Refuse models with different vocabularies, a cache where logits are needed, and unequal numbers of tokens."""
    if teacher.vocab_size != head.vocab_size:
        raise MismatchError(
            f"The teacher's output head has {teacher.vocab_size} tokens, the student's {head.vocab_size}. "
            "Distillation compares probabilities token by token and needs one shared vocabulary."
        )
    if divergence in OF_LOGITS and isinstance(teacher, TopKSignal):
        raise MismatchError(
            f"divergence={divergence!r} compares logits, and a top-k signal holds probabilities. Use one of "
            f"{', '.join(sorted(({'forward_kl'} | DIVERGENCES.keys()) - OF_LOGITS))}, or the teacher itself."
        )
    if divergence != "forward_kl" and isinstance(teacher, SampledSignal):
        raise MismatchError(
            f"divergence={divergence!r}: drawn tokens give the right mean gradient of forward_kl only. Use that one."
        )
    if len(teacher) != hidden.shape[0] or labels.shape[0] != hidden.shape[0]:
        raise MismatchError(
            f"Expected one teacher state and one label per token; got {hidden.shape[0]} student states, "
            f"{len(teacher)} teacher states and {labels.shape[0]} labels."
        )


@dataclass(frozen=True)
class _Settings:
    scale: float
    softcap: float | None
    divergence: str
    jsd_beta: float
    temperature: float
    kd_weight: float
    ce_weight: float
    chunk_size: int

    @property
    def kd_coefficient(self) -> float:
        """Factor of the divergence's gradient; 1 without cross-entropy, see `gradient_factor`."""
        return 1.0 if self.ce_weight == 0 else self.kd_weight * self.temperature

    @property
    def gradient_factor(self) -> float:
        """What remains to be multiplied into the finished gradients.

        d/dz of T² D is T times its gradient with respect to z/T. Without cross-entropy that constant is applied to
        the [N, H] and [V, H] gradients, which saves a pass over every [chunk, V].
        """
        return self.scale * (self.kd_weight * self.temperature if self.ce_weight == 0 else 1.0)


class _FusedLoss(torch.autograd.Function):
    """`distillation_loss` with its gradients, which are formed in the forward pass and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: TeacherSignal,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_any = needs_hidden or needs_weight or needs_bias
        device, num_tokens = hidden.device, hidden.shape[0]
        dtype = compute_dtype(device, weight)
        # Half-precision gradients are summed over chunks in float32.
        sum_dtype = torch.promote_types(dtype, torch.float32)

        h_NH, w_VH = hidden.detach().to(dtype), weight.detach().to(dtype)
        b_V = finite_bias(bias, dtype)
        kl = torch.empty(num_tokens, dtype=sum_dtype, device=device)
        ce, entropy = torch.empty_like(kl), torch.empty_like(kl)
        agreement, accuracy = (torch.empty_like(kl, dtype=torch.bool) for _ in range(2))
        divergence = kl if settings.divergence == "forward_kl" else torch.empty_like(kl)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(b_V, dtype=sum_dtype) if needs_bias and b_V is not None else None

        found = TokenLosses(kl.new_zeros(()), divergence, kl, ce, agreement, accuracy, entropy)
        rows = _Rows(teacher, settings, labels, found, with_gradient=needs_any)
        with torch.autocast(device.type, enabled=False):  # the dtypes are chosen above
            z_s = torch.empty(0, dtype=dtype, device=device)
            for chunk in even_slices(num_tokens, settings.chunk_size):
                z_s = project(h_NH[chunk], w_VH, b_V, z_s)
                rows.evaluate(chunk, z_s)  # z_s becomes the gradient with respect to the raw student logits
                if grad_hidden is not None:
                    grad_hidden[chunk] = z_s @ w_VH
                if grad_weight is not None:
                    if grad_weight.dtype == dtype:
                        grad_weight.addmm_(z_s.t(), h_NH[chunk])
                    else:
                        grad_weight.add_(z_s.t() @ h_NH[chunk])
                if grad_bias is not None:
                    grad_bias.add_(z_s.sum(0, dtype=sum_dtype))

        total = settings.ce_weight * ce.sum() + settings.kd_weight * settings.temperature**2 * divergence.sum()
        # Kept on the context rather than saved: no other reference remains after the backward pass, so autograd can
        # take the gradients over instead of copying them.
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.factor = settings.gradient_factor
        divergence = divergence.clone() if divergence is kl else divergence  # an output may not be given twice
        values = (divergence, kl, ce, agreement, accuracy, entropy)
        ctx.mark_non_differentiable(*values)
        return total, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("distillation_loss can be differentiated once: its gradients are consumed in place.")
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_total * ctx.factor
        scaled = tuple(None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        return (*scaled, None, None, None)


class _Rows:
    """The part of the loss between the matrix products: softmaxes, divergences, and the gradient of the logits.

    Works on blocks of rows that fit a cache, because on a CPU a pass over a whole [chunk, V] costs as much as the
    arithmetic in it. The blocks also bound the scratch memory.
    """

    def __init__(
        self,
        signal: TeacherSignal,
        settings: _Settings,
        labels: Tensor,
        found: TokenLosses,
        *,
        with_gradient: bool,
    ) -> None:
        self.signal, self.settings, self.labels, self.found = signal, settings, labels, found
        self.with_gradient = with_gradient
        kl, dtype = found.kl, found.kl.dtype
        elements = torch.get_num_threads() << 17 if kl.device.type == "cpu" else 1 << 23
        widest = signal.head.vocab_size if isinstance(signal, DenseSignal) else signal.vocab_size
        self.block = max(1, elements // max(widest, signal.vocab_size))
        num_buffers = 4 if settings.divergence == "forward_kl" else 5
        shape = (num_buffers, min(self.block, len(signal)), signal.vocab_size)
        self.scratch = torch.empty(shape, dtype=dtype, device=kl.device)
        if isinstance(signal, DenseSignal):
            teacher_dtype = compute_dtype(kl.device, signal.head.weight)
            self.teacher_hidden = signal.hidden.detach().to(teacher_dtype)
            self.teacher_weight = signal.head.weight.detach().to(teacher_dtype)
            self.teacher_bias = finite_bias(signal.head.bias, teacher_dtype)
            self.product = self.z_t = torch.empty(0, dtype=teacher_dtype, device=kl.device)
        self.dropped = dropped_of(signal, settings.temperature, found.kl, self.block)

    def evaluate(self, chunk: slice, z_s: Tensor) -> None:
        """Fill the losses of one chunk, and turn its raw student logits [chunk, V] into their gradient in place."""
        if isinstance(self.signal, DenseSignal):
            hidden, weight = self.teacher_hidden[chunk], self.teacher_weight
            self.product = self.z_t = project(hidden, weight, self.teacher_bias, self.product)
            if isinstance(self.dropped, DroppedTokens):
                self.z_t = self.dropped.split(chunk, self.product)
        for block in even_slices(z_s.shape[0], self.block):
            self._evaluate_block(block, slice(chunk.start + block.start, chunk.start + block.stop), z_s[block])

    def _teacher_logits(self, block: slice, where: slice, student: Tensor, out: Tensor) -> Tensor:
        """The teacher's logits over T of a block, perhaps in `out`; of drawn tokens, the logarithms of their weights.

        Of a top-k signal, logits that share its k + 1 outcomes and spread the last one over its tokens as the student
        does: the divergences of the outcomes, and their gradients, are those of the whole distributions then, because
        moving probability among tokens at which p / q is the same changes none of them.
        """
        s, signal = self.settings, self.signal
        if isinstance(signal, DenseSignal):
            return scaled_logits(self.z_t[block], signal.head.scale, signal.head.softcap, s.temperature, out)
        if isinstance(signal, SampledSignal):
            return signal.log_weights(where, out)
        tokens = signal.tokens[where]
        out.copy_(student).scatter_(-1, tokens, -torch.inf)
        log_tail = signal.log_tail[where, None].to(out.dtype)
        # Nothing is left for the others at k = V, or beyond what the dtype of the cache can tell from nothing.
        shift = log_tail.clamp(min=-80) - out.logsumexp(-1, keepdim=True)
        torch.add(student, shift.nan_to_num(posinf=0.0), out=out)
        return out.scatter_(-1, tokens, signal.log_probs[where].to(out.dtype))

    def _evaluate_block(self, block: slice, where: slice, z_s: Tensor) -> None:
        """`evaluate` for the rows `block` of a chunk, which are the rows `where` of all tokens."""
        s, found = self.settings, self.found
        scratch_a, scratch_b, work, probabilities_t, *spare = self.scratch[:, : z_s.shape[0]]
        # Logits over T; `teacher` and `student` are the buffers of the products themselves where nothing is to change.
        student = scaled_logits(z_s, s.scale, s.softcap, s.temperature, scratch_b)
        teacher = self._teacher_logits(block, where, student, scratch_a)
        max_t, max_s = self._compare_best_tokens(where, teacher, student, z_s.dtype, work)
        if self.dropped is not None:  # the teacher's most likely token may be one that the student lacks
            found.agreement[where] &= self.dropped.is_best_kept(where, max_t)
        label = student.gather(-1, self.labels[where, None])

        # KL = Σ p (log p - log q) = Σ p (teacher - student) - lse(teacher) + lse(student).
        torch.sub(teacher, student, out=work)
        torch.softmax(teacher, -1, out=probabilities_t)
        kl = torch.linalg.vecdot(probabilities_t, work)[:, None]
        lse_t = max_t - probabilities_t.amax(-1, keepdim=True).log()
        # In place of the teacher's logits, where they are not needed any more.
        probabilities_s = torch.softmax(student, -1, out=spare[0] if spare else scratch_a)
        lse_s = max_s - probabilities_s.amax(-1, keepdim=True).log()
        share = 1.0 if self.dropped is None else self.dropped.share_kept(where, lse_t)
        found.kl[where] = ((kl - lse_t + lse_s) * share)[:, 0]
        if isinstance(self.signal, SampledSignal):
            found.kl[where] += (self.signal.surplus_entropy(where).to(found.kl.dtype)[:, None] * share)[:, 0]
        if s.temperature == 1:
            found.ce[where] = (lse_s - label)[:, 0]
            found.entropy[where] = lse_s[:, 0] - _expected(probabilities_s, student)
        offset = lse_s - lse_t
        rows = Rows(teacher, student, work, offset, probabilities_t, probabilities_s, self.with_gradient)
        gradient = self._divergence_gradient(where, rows, share)
        free = work if gradient is probabilities_s else probabilities_s
        if s.temperature != 1:
            self._add_cross_entropy_at_one(where, student, max_s, gradient, free, probabilities_t)
        if self.with_gradient:
            self._finish_gradient(where, student, gradient, free)
            z_s.copy_(gradient)

    def _compare_best_tokens(
        self, where: slice, teacher: Tensor, student: Tensor, dtype: torch.dtype, work: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fill in whether the student's most likely token is the teacher's, and whether it is the true one.

        Args:
            where: rows of the block.
            teacher: [n, V], the teacher's logits over T.
            student: [n, V], the student's logits over T.
            dtype: in which the student's logits were computed.
            work: [n, V], scratch memory.

        Returns:
            The largest logits [n, 1] of the teacher and of the student.
        """
        found, labels = self.found, self.labels[where, None]
        if isinstance(self.signal, DenseSignal) and self.z_t.dtype == dtype == work.dtype:
            # An index of the maximum costs more than an exponential on a CPU; this finds a shared maximum without.
            max_t, max_s = teacher.amax(-1, keepdim=True), student.amax(-1, keepdim=True)
            largest_sum = torch.add(teacher, student, out=work).amax(-1, keepdim=True)
            found.agreement[where] = (largest_sum == max_t + max_s)[:, 0]
            found.accuracy[where] = (student.gather(-1, labels) == max_s)[:, 0]
            return max_t, max_s
        # Half-precision logits have ties, and a tie is not an agreement. `max` is three times faster than `argmax`.
        max_s, best = student.max(-1, keepdim=True)
        max_t, of_teacher = teacher.max(-1, keepdim=True)
        if not isinstance(self.signal, DenseSignal):
            of_teacher = self.signal.tokens[where, :1]
        found.agreement[where] = (of_teacher == best)[:, 0]
        found.accuracy[where] = (best == labels)[:, 0]
        return max_t, max_s

    def _divergence_gradient(self, where: slice, rows: Rows, share: Tensor | float) -> Tensor:
        """Fill in the divergence, and return its weighted gradient with respect to the student's logits over T.

        At T = 1 the softmax of the cross-entropy, the same as the student's probabilities, is added here.

        Args:
            where: rows of the block.
            rows: probabilities and logits of both models.
            share: weight of the divergence, [n, 1] or one for all.
        """
        s = self.settings
        ce_weight = s.ce_weight if s.temperature == 1 else 0.0
        weight = s.kd_coefficient * share
        if s.divergence == "forward_kl":  # its value is there already; its gradient is q - p
            gradient = rows.q
            if not self.with_gradient:
                return gradient
            if isinstance(weight, Tensor) or weight + ce_weight != 1:
                gradient.mul_(weight + ce_weight)
            if isinstance(weight, Tensor):
                return gradient.sub_(rows.p.mul_(weight))
            return gradient.sub_(rows.p, alpha=weight)
        self.found.divergence[where] = (DIVERGENCES[s.divergence](rows, s.jsd_beta) * share)[:, 0]
        gradient = rows.difference
        if self.with_gradient:
            if isinstance(weight, Tensor) or weight != 1:
                gradient.mul_(weight)
            if ce_weight != 0:
                gradient.add_(rows.q, alpha=ce_weight)
        return gradient

    def _add_cross_entropy_at_one(
        self, where: slice, student: Tensor, max_s: Tensor, gradient: Tensor, free: Tensor, probabilities: Tensor
    ) -> None:
        """Fill in cross-entropy and entropy, which are at temperature 1 and need a softmax of their own if T is not.

        Args:
            where: rows of the block.
            student: [n, V], the student's logits over T.
            max_s: [n, 1], their maxima.
            gradient: [n, V], to which the softmax is added.
            free: [n, V], memory for the logits.
            probabilities: [n, V], memory for the softmax.
        """
        s, found = self.settings, self.found
        torch.mul(student, s.temperature, out=free)
        torch.softmax(free, -1, out=probabilities)
        lse_s = max_s * s.temperature - probabilities.amax(-1, keepdim=True).log()
        found.ce[where] = (lse_s - free.gather(-1, self.labels[where, None]))[:, 0]
        found.entropy[where] = lse_s[:, 0] - _expected(probabilities, free)
        if self.with_gradient and s.ce_weight != 0:
            gradient.add_(probabilities, alpha=s.ce_weight)

    def _finish_gradient(self, where: slice, student: Tensor, gradient: Tensor, free: Tensor) -> None:
        """Subtract the true token of the cross-entropy, and go back through the soft cap."""
        s = self.settings
        if s.ce_weight != 0:
            labels = self.labels[where, None]
            gradient.scatter_add_(-1, labels, gradient.new_full(labels.shape, -s.ce_weight))
        if s.softcap is not None:  # d/dx of c tanh(x/c) is 1 - tanh²; `student` is c tanh(x/c) / T
            torch.mul(student, s.temperature / s.softcap, out=free)
            gradient.addcmul_(gradient * free, free, value=-1)


def _expected(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Σ over the vocabulary of probability times logit → [n]."""
    return torch.linalg.vecdot(probabilities, logits.to(probabilities.dtype))
