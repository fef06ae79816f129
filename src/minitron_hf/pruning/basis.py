"""Changes the basis of the residual stream, so that a cut of the hidden size drops the directions with least energy.

A root mean square norm divides by a length, which no orthogonal matrix Q changes: norm(x Q) = norm(x) Q. So the
stream x [H] of a model can be replaced by x Q without a change of its logits: embeddings and projections that write
to the stream are multiplied by Q, and projections that read a norm by diag(g) Q, where g is the norm's weight, which
becomes 1 (SliceGPT, arXiv 2401.15024, §3.1, there with one Q for every layer and adapters between them; a single Q
leaves a stock model). The columns of Q are the eigenvectors of the mean of x xᵀ, the largest first, and the student
keeps the first channels.

A tied head reads the last norm through the weights of the embeddings, so diag(g) cannot be folded into it. There Q
leaves those channels as they are whose g differs most from the others', and for all others g is replaced by its mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Conv1D

from ..compat import build_from_config, no_init_weights
from ..errors import PlanError, UnsupportedModelError
from ..families import named_tensors, spec_for
from ..families.axes import CHANNELS, dimension_axes
from ..models import evaluating
from ..scoring.experts import reads_input
from ..scoring.hook_points import norm_paths
from ..weights import input_device, narrowed, probe_ids, set_tensor, tensor_values
from .masking import subtracts_mean
from .stored_layers import computing, tensors_in_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .plan import PruningPlan

#: Part of the energy of the logits that the replacement of a tied head's norm weights may change.
TIED_TOLERANCE = 2e-3


@dataclass(frozen=True)
class StreamTensors:
    """The tensors of a model that hold channels of the residual stream.

    Attributes:
        positions: tensor that reads or writes the stream → its dimension of channels.
        norm_of: tensor that reads a norm → path of the norm.
        norms: paths of the norms.
        final_norm: path of the norm before the head.
        head: name of the head's weight; None where it is tied to the embeddings.
    """

    positions: Mapping[str, int]
    norm_of: Mapping[str, str]
    norms: tuple[str, ...]
    final_norm: str
    head: str | None


def stream_tensors(model: PreTrainedModel) -> StreamTensors:
    """Find what reads and what writes the residual stream, in a short forward pass.

    Raises:
        UnsupportedModelError: if the stream of this model cannot be rotated, with the reason.
    """
    spec, modules = spec_for(model.config), dict(model.named_modules())
    norms = dict(norm_paths(spec, modules, spec.sizes(model.config)["layers"]))
    _require_free_norms(model, modules, list(norms))
    readers = norm_readers(model, list(norms))
    if unread := sorted(set(norms) - set(readers.values()) - {spec.final_norm}):
        raise _refusal(model, f"nothing reads {unread[0]} as it is: its weights scale single channels of the stream")
    head = model.get_output_embeddings()
    positions: dict[str, int] = {}
    norm_of: dict[str, str] = {}
    for name in named_tensors(model):
        located = spec.locate(name)
        dimensions = spec.dimensions[located[0]] if located is not None else ()
        holding = [number for number, one in enumerate(dimensions) if "hidden" in dimension_axes(one)]
        path, _, leaf = name.rpartition(".")
        if not holding or path in norms:
            continue
        is_writer = located is not None and located[0] in spec.input_writers
        reads = False if is_writer else _reads_channels(modules[path], leaf, holding[0])
        if len(holding) > 1 or dimensions[holding[0]] != CHANNELS or reads is None:
            raise _refusal(model, f"it is not known how {name} reads or writes the stream")
        if reads and path not in readers:
            raise _refusal(model, f"{name} reads the stream in another way than through a norm")
        positions[name] = holding[0]
        if reads:
            norm_of[name] = readers[path]
    tied = head is None or f"{_path_of(modules, head)}.weight" not in positions
    return StreamTensors(
        positions, norm_of, tuple(norms), spec.final_norm, None if tied else f"{_path_of(modules, head)}.weight"
    )


def _path_of(modules: Mapping[str, nn.Module], wanted: nn.Module) -> str:
    return next(path for path, module in modules.items() if module is wanted)


def _reads_channels(module: nn.Module, leaf: str, position: int) -> bool | None:
    """Whether a tensor multiplies the stream (True) or is added to it, as a matrix or a bias (False); None: neither.

    Args:
        module: that holds it.
        leaf: its name in the module.
        position: its dimension of channels.
    """
    if isinstance(module, nn.Embedding):
        return False
    if isinstance(module, nn.Linear | Conv1D):
        return leaf == "weight" and position == (0 if isinstance(module, Conv1D) else 1)
    is_router = leaf == "weight" and getattr(module, leaf).ndim == 2
    return True if is_router else reads_input(leaf)


def _refusal(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"hidden_basis='principal' cannot rotate the residual stream of this {type(model).__name__}: {reason}. "
        "Leave hidden_basis out, to keep single channels."
    )


def _require_free_norms(model: PreTrainedModel, modules: Mapping[str, nn.Module], norms: list[str]) -> None:
    """Refuse models whose norms depend on the basis.

    Raises:
        UnsupportedModelError: with the reason.
    """
    spec = spec_for(model.config)
    length = spec.sizes(model.config)["hidden"]
    if spec.stream.fixed_basis:
        raise _refusal(model, spec.stream.fixed_basis)
    for path in norms:
        with tensors_in_memory([modules[path]]):
            has_mean = subtracts_mean(modules[path], length)
        if has_mean or getattr(modules[path], "bias", None) is not None:
            raise _refusal(model, f"{path} subtracts the mean over channels, or adds a bias to them")


#: Model → its modules that read norms: a pass finds them once, and reads all weights of a teacher that is on disk.
_READERS: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def norm_readers(model: PreTrainedModel, norms: Iterable[str]) -> dict[str, str]:
    """Module with parameters → the norm, among some, whose output it is called on."""
    if model not in _READERS:
        _READERS[model] = _find_readers(model)
    wanted = set(norms)
    return {path: norm for path, norm in _READERS[model].items() if norm in wanted}


@torch.no_grad()
def _find_readers(model: PreTrainedModel) -> dict[str, str]:
    """The readers of all norms: modules that are given the memory of their outputs, in a short forward pass."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}
    modules, spec = dict(model.named_modules()), spec_for(model.config)
    norms = dict(norm_paths(spec, modules, spec.sizes(model.config)["layers"]))

    def remember(path: str) -> Any:
        def hook(_: Any, args: Any, output: Tensor) -> None:
            outputs[output.data_ptr()] = path, output  # holding the tensor keeps its memory from being used again

        return hook

    def look_up(path: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            for x in (*args, *kwargs.values()):
                norm, output = outputs.get(x.data_ptr(), ("", x)) if isinstance(x, Tensor) else ("", None)
                if norm and output is not None and output.numel() == x.numel():
                    found[path] = norm

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        stack.enter_context(computing(model))
        for path in norms:
            stack.callback(modules[path].register_forward_hook(remember(path)).remove)
        for path, module in modules.items():
            if path not in norms and any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(look_up(path), with_kwargs=True).remove)
        model(input_ids=probe_ids(model), use_cache=False)
    return found


def norm_weight(model: PreTrainedModel, path: str) -> Tensor:
    """What a norm multiplies the channels by, float64 [H] on the CPU."""
    spec = spec_for(model.config)
    module = model.get_submodule(path)
    if getattr(module, "weight", None) is None:
        return torch.ones(spec.sizes(model.config)["hidden"], dtype=torch.float64)
    return tensor_values(model, f"{path}.weight").detach().cpu().double() + spec.norm_offset


def principal_basis(model: PreTrainedModel, covariance: Tensor) -> np.ndarray:
    """The orthogonal matrix Q [H, H], float32, whose first columns hold most of the residual stream.

    Args:
        model: the teacher; its weights are read where the head is tied.
        covariance: the mean of x xᵀ over all norms, and of the last one, [2, H, H] (`ImportanceScores.covariance`).

    Raises:
        UnsupportedModelError: if the stream of this model cannot be rotated, with the reason.
    """
    tensors = stream_tensors(model)
    covariance, last = covariance.double()
    fixed = torch.zeros(len(covariance), dtype=torch.bool)
    if tensors.head is None:
        fixed = _channels_with_outlying_gain(model, last, tensors.final_norm)
    free = (~fixed).nonzero().flatten()
    energies, vectors = torch.linalg.eigh(covariance[free][:, free])
    basis = torch.zeros_like(covariance)
    num_fixed = int(fixed.sum())
    basis[fixed.nonzero().flatten(), torch.arange(num_fixed)] = 1
    basis[free[:, None], torch.arange(num_fixed, len(covariance))] = vectors.flip(1)
    if not num_fixed:
        return basis.float().numpy()
    # Fixed channels stand among the others by their energy: a small one may be cut.
    order = torch.cat([covariance.diagonal()[fixed], energies.flip(0)]).argsort(descending=True, stable=True)
    return basis[:, order].float().numpy()


def _channels_with_outlying_gain(model: PreTrainedModel, covariance: Tensor, final_norm: str) -> Tensor:
    """The fewest channels to leave unrotated so that one mean weight of the final norm fits all others: bool [H].

    It fits up to `TIED_TOLERANCE`, measured by the energy Σ (U D x)² of the logits, for the difference D between the
    norm's weights and their mean.
    """
    gain = norm_weight(model, final_norm)
    head = model.get_output_embeddings()
    assert head is not None
    weight_VH = head.weight.detach().to(torch.promote_types(head.weight.dtype, torch.float32))
    weight_VH = weight_VH - weight_VH.mean(0)  # a softmax does not see what all logits share
    products = (weight_VH.T @ weight_VH).cpu().double() * covariance
    whole = gain @ products @ gain
    energy = products.diagonal().clamp(min=0)
    order = ((gain - gain.median()).square() * energy).argsort(descending=True)

    def error(count: int) -> float:
        rest = order[count:]
        centre = (gain[rest] * energy[rest]).sum() / energy[rest].sum().clamp(min=1e-30)
        difference = torch.zeros_like(gain)
        difference[rest] = gain[rest] - centre
        return float(difference @ products @ difference / whole)

    low, high = 0, len(gain)
    while low < high:  # the error falls with the count, nearly always
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= TIED_TOLERANCE else (middle + 1, high)
    fixed = torch.zeros(len(gain), dtype=torch.bool)
    fixed[order[:low]] = True
    return fixed


class Rotation:
    """Turns the tensors of a teacher into those of the same model in another basis of its residual stream.

    Args:
        model: the teacher; not changed.
        basis: orthogonal matrix, [H, H].
    """

    def __init__(self, model: PreTrainedModel, basis: np.ndarray) -> None:
        self.model, self.tensors, self.spec = model, stream_tensors(model), spec_for(model.config)
        self.basis = torch.from_numpy(basis).double()
        self._basis_in: dict[torch.dtype, Tensor] = {}
        self.gains = {path: norm_weight(model, path) for path in self.tensors.norms}

    def tensor(self, name: str, values: Tensor) -> Tensor:
        """A tensor in the new basis, in its own dtype; the tensor itself where it holds no channels.

        Args:
            name: in the teacher.
            values: of the tensor, all channels.
        """
        path = name.rpartition(".")[0]
        if path in self.tensors.norms:
            gain = torch.ones_like(self.gains[path])
            if path == self.tensors.final_norm and self.tensors.head is None:
                gain = self.basis.square().T @ self.gains[path]  # the mean, and what the fixed channels have
            return (gain - self.spec.norm_offset).to(values)
        position = self.tensors.positions.get(name)
        if position is None:
            return values
        wide = torch.promote_types(values.dtype, torch.float32)
        norm = self.tensors.norm_of.get(name)
        if norm is None:  # of tensors on disk, the product is computed later: they share one matrix
            matrix = self._basis_in.setdefault(wide, self.basis.to(wide))
        else:
            matrix = self.gains[norm][:, None] * self.basis
        moved = values.to(wide)
        if values.ndim == 1:  # a bias, as a matrix of one row: torch computes a vector's product in place
            return narrowed((moved[None] @ matrix.to(moved))[0], values.dtype, name)
        moved = moved.movedim(position, -1)
        return narrowed((moved @ matrix.to(moved)).movedim(-1, position).contiguous(), values.dtype, name)


def require_in_memory(model: PreTrainedModel) -> None:
    """Refuse a teacher with offloaded weights, which cannot be rotated.

    Raises:
        PlanError: if some are offloaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "hidden_basis='principal' needs the whole teacher in memory, but some weights are offloaded. Load it "
            "onto one device, or leave hidden_basis out."
        )


@torch.no_grad()
def rotated_model(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The teacher in the basis of a plan: a new model with the same logits, up to rounding and a tied head.

    The teacher itself where the plan has no basis.
    """
    if plan.basis is None:
        return model
    require_in_memory(model)
    rotation = Rotation(model, plan.basis)
    with no_init_weights(), input_device(model):
        rotated = build_from_config(type(model), model.config, model.dtype)
    rotated.generation_config = model.generation_config
    for name in named_tensors(model):
        values = tensor_values(model, name).detach()
        tensor = rotation.tensor(name, values)
        set_tensor(rotated, name, tensor.clone() if tensor.is_set_to(values) else tensor)
    rotated.tie_weights()
    _READERS[rotated] = _READERS[model]
    return rotated.eval()
