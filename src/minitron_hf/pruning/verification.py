"""Verifies a student: its logits must equal those of the teacher with the dropped units masked.

While the teacher runs, the dropped units are masked: the inputs of output projections are multiplied by zero, norms
compute their statistics from the kept channels, dropped layers return their inputs, dropped experts are never chosen.
A table that is wrong about the order inside a fused projection fits in shape and fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PlanError, UnsupportedModelError, VerificationError, checks_kinds
from ..families import VOCABULARY
from ..models import evaluating, plain_model
from ..weights import input_device
from .basis import rotated_model
from .masking import masked_units
from .plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The largest allowed gap, in units of the effect of one rounding of the embeddings: every layer rounds many times.
ROUNDINGS = 30
#: Tokens that are compared: rows, and tokens in a row.
NUM_TOKENS = (2, 24)


@checks_kinds
@torch.no_grad()
def verify_student(
    teacher: PreTrainedModel, student: PreTrainedModel, plan: PruningPlan, *, input_ids: Tensor | None = None
) -> float:
    """Compare the logits of a student with those of its teacher whose dropped units are masked.

    Compensated norms and embeddings (`plan.scales`) are taken into account; with a `plan.basis`, the teacher is
    rotated first. Neither model is changed.

    Args:
        teacher: the teacher, in memory.
        student: the student that `apply_plan` made, before any training.
        plan: the plan.
        input_ids: token ids of the student [rows, tokens]; default: a few random ones.

    Returns:
        The largest difference of two logits, relative to the largest logit. In dtypes below float32, the median over
        tokens of this difference, because rounding may send single tokens to another expert.

    Raises:
        VerificationError: if the difference exceeds rounding. The tolerance is 30 times the change of the logits by
            one rounding of the embeddings, for this model and dtype.
        UnsupportedModelError: if a model cannot be masked, because weights are offloaded or its routers are not
            supported.
        PlanError: if the plan merges heads.
    """
    if plan.partners:
        raise PlanError(
            "With head_add_back the student is not the masked teacher, so there is nothing to verify it against. "
            "Verify a student made without it."
        )
    teacher, student = rotated_model(plain_model(teacher), plan), plain_model(student)
    if any(parameter.is_meta for parameter in [*teacher.parameters(), *student.parameters()]):
        raise UnsupportedModelError("Verifying needs teacher and student in memory, but some weights are offloaded.")
    ids = _random_ids(plan) if input_ids is None else input_ids.cpu()
    # Where the vocabulary is cut, the teacher reads the same tokens under its own ids, and its kept logits count.
    kept = torch.from_numpy(plan.kept[VOCABULARY]) if VOCABULARY in plan.kept else None
    plan = plan.with_whole_vocabulary()
    own_ids = ids if kept is None else kept[ids]

    # The stock models compute norms and softmax in float32 even where the weights are float64.
    eps = max(torch.finfo(dtype).eps for dtype in (student.dtype, torch.float32))
    with evaluating((teacher, student)):
        found = _logits(student, ids)
        with masked_units(teacher, plan):
            expected = _logits(teacher, own_ids, kept)
            with _rounded(teacher.get_input_embeddings(), eps):
                rounded = _logits(teacher, own_ids, kept)
    exact = eps == torch.finfo(torch.float32).eps
    gap, noise = _relative_gap(found, expected, exact), _relative_gap(rounded, expected, exact)
    tolerance = ROUNDINGS * max(noise, eps)
    if not gap <= tolerance:
        raise VerificationError(
            f"The student's logits differ by {gap:.1e} (relative to the largest) from those of the teacher with the "
            f"same units masked; rounding in {str(student.dtype).removeprefix('torch.')} explains {tolerance:.1e}. "
            f"The family table '{plan.model_type}' and the installed Transformers disagree, or the student was not "
            "made by this plan. Do not use it; please report it."
        )
    return gap


def _random_ids(plan: PruningPlan) -> Tensor:
    """A few random token ids of the student."""
    length = min(NUM_TOKENS[1], plan.sizes.get("positions", {}).get("teacher", NUM_TOKENS[1]))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, plan.sizes[VOCABULARY]["student"], (NUM_TOKENS[0], length), generator=generator)


def _logits(model: PreTrainedModel, ids: Tensor, kept: Tensor | None = None) -> Tensor:
    """Logits in float64 on the CPU, of all tokens or the kept ones."""
    found = model(ids.to(input_device(model)), use_cache=False).logits.detach().cpu().double()
    return found if kept is None else found[..., kept]


def note_verification(teacher: PreTrainedModel, student: PreTrainedModel, plan: PruningPlan) -> PruningPlan:
    """Verify a student, and note the gap in its plan, or why it cannot be verified.

    Raises:
        MinitronError: see `verify_student`.
    """
    if plan.partners:
        note = "Not verified: with head_add_back the student is not the masked teacher."
        return plan.with_notes(note)
    gap = verify_student(teacher, student, plan)
    dtype = str(student.dtype).removeprefix("torch.")
    note = f"Verified: the logits are within {gap:.1e} of the masked teacher's, in {dtype}, relative to the largest."
    return plan.with_notes(note)


def _relative_gap(found: Tensor, expected: Tensor, exact: bool) -> float:
    differences = (found - expected).abs().amax(-1) / expected.abs().max()
    return float(differences.max() if exact else differences.median())


@contextmanager
def _rounded(module: nn.Module, eps: float) -> Iterator[None]:
    """Change a module's output by one rounding, up or down at random."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        signs = torch.randint(0, 2, output.shape, generator=generator).mul_(2).sub_(1).to(output.device)
        return (output * (1 + eps * signs)).to(output.dtype)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
