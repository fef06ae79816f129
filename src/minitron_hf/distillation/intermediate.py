"""Intermediate losses: distances between hidden states of student and teacher (arXiv 2407.14679 §3).

Shapes: B rows, T tokens of a row, N tokens that count, H hidden width of the student, H_t of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..compat import names_not_saved, set_names_not_saved
from ..errors import MismatchError, PlanError
from ..files import replacing_file
from ..hardware import sum_dtype

if TYPE_CHECKING:
    from ..pruning.plan import PruningPlan

Distance = Literal["cosine", "mse"]

#: Name of the shared linear map as a module of the student during training.
PROJECTION = "teacher_projection"
STATE_NAME = "intermediate_losses.safetensors"

#: Pairs of layers that are compared by default: two before the last. One pair, two or three layers from the end, was
#: enough in arXiv 2407.14679, table 17, also for models of unequal depth.
DEFAULT_LAYERS = ((-3, -3),)


@dataclass(frozen=True)
class StatePair:
    """One place where student and teacher are compared.

    Attributes:
        term: the loss that it belongs to, `hidden` or `embedding`.
        distance: name of the distance, see `distance`.
        teacher: index into the teacher's hidden states: 0 for the output of the embeddings, i + 1 for the output of
            layer i, after the final norm for the last layer.
        student: index into the student's hidden states, likewise.
    """

    term: Literal["hidden", "embedding"]
    distance: str
    teacher: int
    student: int


def distance(student_NH: Tensor, teacher_NH: Tensor, kind: str) -> Tensor:
    """Distance between the states of N tokens → [N], in float32 (float64 for float64 input).

    Args:
        student_NH: [N, H_t], the student's states, mapped to the teacher's width.
        teacher_NH: [N, H_t], the teacher's states.
        kind: `"cosine"`, one minus the cosine; or `"mse"`, the mean squared difference.
    """
    dtype = torch.promote_types(student_NH.dtype, torch.float32)
    s_NH, t_NH = student_NH.to(dtype), teacher_NH.to(dtype)
    if kind == "mse":
        return (s_NH - t_NH).square().mean(-1)
    return 1 - nn.functional.cosine_similarity(s_NH, t_NH, dim=-1)


def state_pairs(
    hidden: str | None,
    embedding: str | None,
    layers: Sequence[Sequence[int]] | None,
    depth: int,
    teacher_depth: int,
) -> tuple[StatePair, ...]:
    """The pairs of states to compare.

    Args:
        hidden: distance between outputs of layers; None for no such loss.
        embedding: distance between outputs of the embeddings; None for no such loss.
        layers: pairs (layer of the teacher, layer of the student), counted from 0, or from the end if negative.
        depth: layers of the student.
        teacher_depth: layers of the teacher.

    Raises:
        PlanError: if a model has no such layer.
    """
    pairs = []
    if hidden is not None:
        for pair in DEFAULT_LAYERS if layers is None else layers:
            indices = []
            for layer, number, whose in zip(pair, (teacher_depth, depth), ("teacher", "student")):
                if layers is None:
                    layer = max(layer, -number)
                if not -number <= layer < number:
                    raise PlanError(
                        f"hidden_layers={layers}: the {whose} has no layer {layer}. "
                        f"Expected {-number} to {number - 1}."
                    )
                indices.append(layer % number + 1)
            pairs.append(StatePair("hidden", hidden, *indices))
    if embedding is not None:
        pairs.append(StatePair("embedding", embedding, 0, 0))
    return tuple(pairs)


class IntermediateLosses:
    """State of the intermediate losses between steps: the projection to the teacher's width, and the weight.

    All pairs share the projection. It starts as the selection of the channels that the plan kept, is trained as a
    module of the student, and is removed afterwards. Models of equal width need none.

    A dynamic weight is α = L_logits / L_intermediate (arXiv 2407.14679 §3), with both losses of the optimizer step
    before, summed over all its tokens on all processes, so that the gradient does not depend on how a batch is split.

    Attributes:
        pairs: the pairs of states to compare.
        projection: linear map H → H_t, or None.
        weight: α.
    """

    def __init__(
        self,
        pairs: tuple[StatePair, ...],
        width: int,
        teacher_width: int,
        weight: float | str,
        plans: Sequence[PruningPlan],
    ) -> None:
        self.pairs = pairs
        self.dynamic = weight == "dynamic"
        self.weight: float | None = None if self.dynamic else float(weight)
        self.step_sums: Tensor | None = None
        self.projection: nn.Linear | None = None
        if pairs and width != teacher_width:
            self.projection = nn.Linear(width, teacher_width, bias=False)
            with torch.no_grad():
                self.projection.weight.copy_(_initial_map(width, teacher_width, plans))

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def teacher_states(self, hidden_states: Sequence[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        """The teacher's states of every pair at N positions of the flattened batch: [N, H_t] each."""
        return tuple(hidden_states[pair.teacher].flatten(0, 1).index_select(0, positions) for pair in self.pairs)

    # ---- The projection as a module of the student ----

    def attach(self, student: nn.Module) -> None:
        """Make the projection a module of the student: trained and wrapped with it, but not saved with it."""
        if self.projection is None:
            return
        reference = next(parameter for parameter in student.parameters() if parameter.is_floating_point())
        dtype = torch.promote_types(reference.dtype, torch.float32)
        self.projection.to(device=reference.device, dtype=dtype)
        student.add_module(PROJECTION, self.projection)
        set_names_not_saved(student, [*names_not_saved(student), f"{PROJECTION}.weight"])

    def detach(self, student: nn.Module) -> None:
        """Remove the projection from the student."""
        if hasattr(student, PROJECTION):
            delattr(student, PROJECTION)
            set_names_not_saved(student, None)

    # ---- The weight ----

    def add(self, logit_loss: Tensor, intermediate_loss: Tensor) -> None:
        """Add the losses of a batch, summed over its tokens, for the weight of the next step."""
        sums = torch.stack([logit_loss.detach(), intermediate_loss.detach()]).to(sum_dtype(logit_loss.device))
        self.step_sums = sums if self.step_sums is None else self.step_sums + sums

    def begin_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Set the weight from the losses added since the last call.

        Args:
            reduce: sums a tensor over all processes.
        """
        if self.dynamic and self.step_sums is not None:
            self.weight = self.next_weight(reduce)
        self.step_sums = None

    def next_weight(self, reduce: Callable[[Tensor], Tensor]) -> float | None:
        """The weight that the next step would have."""
        if not self.dynamic or self.step_sums is None:
            return self.weight
        logit_loss, intermediate_loss = reduce(self.step_sums).tolist()
        return logit_loss / intermediate_loss if intermediate_loss > 0 else 0.0

    # ---- Checkpoints ----

    def save(self, folder: Path, weight: float | None, projection: Tensor | None) -> None:
        """Write the projection and the weight of the next step into a checkpoint."""
        tensors = {} if projection is None else {"projection": projection.detach().cpu().contiguous()}
        if weight is not None:
            tensors["weight"] = torch.tensor(weight, dtype=torch.float64)
        with replacing_file(folder / STATE_NAME) as temporary:
            save_file(tensors, temporary)

    def load(self, folder: Path) -> None:
        """Read the file that `save` wrote.

        Raises:
            MismatchError: if there is no such file, or a projection of another shape.
        """
        path = folder / STATE_NAME
        if not path.is_file():
            raise MismatchError(
                f"The checkpoint {folder} has no {STATE_NAME}: it was written without intermediate losses. "
                "Resume with the arguments of that run, or start again."
            )
        tensors = load_file(path)
        expected = None
        if self.projection is not None:  # DeepSpeed ZeRO-3 leaves an empty tensor between uses
            expected = tuple(getattr(self.projection.weight, "ds_shape", self.projection.weight.shape))
        found = tuple(tensors["projection"].shape) if "projection" in tensors else None
        if found != expected:
            raise MismatchError(
                f"The projection to the teacher's width in {path} has the shape {found}, expected {expected}. "
                "Resume with the same teacher and student."
            )
        if self.projection is not None:
            _copy_into(self.projection.weight, tensors["projection"])
        if self.dynamic and "weight" in tensors:
            self.weight = tensors["weight"].item()


def student_distances(
    pairs: Sequence[StatePair],
    hidden_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    positions: Tensor,
    projection: nn.Module | None,
) -> dict[str, Tensor]:
    """Distances of N tokens, averaged over the pairs of each term → term → [N].

    Args:
        pairs: the pairs of states to compare.
        hidden_states: of the student, [B, T, H] each.
        teacher_states: [N, H_t] for every pair.
        positions: int64 [N], of the flattened batch.
        projection: to the teacher's width.
    """
    found: dict[str, list[Tensor]] = {}
    for pair, t_NH in zip(pairs, teacher_states, strict=True):
        s_NH = hidden_states[pair.student].flatten(0, 1).index_select(0, positions)
        s_NH = s_NH if projection is None else projection(s_NH.to(next(projection.parameters()).dtype))
        found.setdefault(pair.term, []).append(distance(s_NH, t_NH.to(s_NH.device), pair.distance))
    return {term: torch.stack(values).mean(0) for term, values in found.items()}


def needed_states(pairs: Sequence[StatePair], whose: Literal["teacher", "student"]) -> list[int]:
    """Indices of the hidden states that a forward pass has to return."""
    return sorted({getattr(pair, whose) for pair in pairs})


@torch.no_grad()
def _copy_into(parameter: Tensor, whole: Tensor) -> None:
    """Write values into a parameter that FSDP2 may have sharded; DeepSpeed restores its own."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    if not hasattr(parameter, "ds_shape"):
        parameter.copy_(whole)


def _initial_map(width: int, teacher_width: int, plans: Sequence[PruningPlan]) -> Tensor:
    """Map each student channel to the teacher's channels that it came from; without plans, an orthogonal map."""
    chosen = torch.eye(teacher_width)
    for plan in plans:
        if plan.sizes["hidden"]["teacher"] != chosen.shape[1]:
            break  # a plan for another teacher
        if plan.basis is not None:
            chosen = chosen @ torch.from_numpy(plan.basis)
        if "hidden" in plan.kept:
            chosen = chosen[:, torch.from_numpy(plan.kept["hidden"])]
    else:
        if chosen.shape[1] == width:
            return chosen
    return nn.init.orthogonal_(torch.empty(teacher_width, width))
