"""Refits output projections by least squares, so that the kept units reproduce the teacher's layers.

Legend of shape suffixes: N tokens, D inputs of a projection, K those that stay, C those that are cut, H its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import DataSource
from ..errors import DataError, UnsupportedModelError, accept_old_names
from ..families import named_tensors, spec_for
from ..families.axes import dimension_index
from ..hardware import free_memory
from ..models import evaluating
from ..scoring.batches import Batches
from ..scoring.calibration import Calibration, load_calibration
from ..scoring.hook_points import UnitView
from ..scoring.hooks import first_input
from ..scoring.reductions import accumulation_dtype
from ..scoring.scores import require_weights
from ..sizes.resolve import repaired_axes
from ..weights import input_device, tensor_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import PruningPlan

#: Fraction of the free memory that the matrices of a pass may take by default.
SHARE_OF_FREE_MEMORY = 0.5


@accept_old_names(num_samples="num_rows")
def repaired_weights(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    num_rows: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    ridge: float = 1e-3,
    memory_limit: float | None = None,
) -> dict[str, Tensor]:
    """Refit output projections to the kept neurons and heads, for `apply_plan(repaired=…)`.

    For every projection that reads cut neurons, heads or groups, with X [N, D] its inputs in the teacher:
    min ‖X W − X_K W'_K‖² + λ‖W'_K − W_K‖², so W'_K = W_K + (X_KᵀX_K + λI)⁻¹ X_KᵀX_C W_C. Only X_KᵀX is accumulated.
    Biases are left as they are, and nothing is centred.

    One forward pass of the teacher serves as many projections as `memory_limit` allows, 8·K·D bytes each, in the order
    of the layers; a pass ends at its last projection. A batch's product is formed in float32, the sum in float64.

    Args:
        model: the teacher; not changed.
        plan: made for it. It may cut other axes, too, which the fit ignores.
        data: calibration texts, token rows, a dataset or a `DataLoader`, as for `estimate_importance`.
        processing_class: tokenizer, needed for texts.
        num_rows: rows to use.
        max_length: tokens in a row.
        packing: join texts into full rows.
        batch_size: rows at a time.
        ridge: λ as a fraction of the mean of the diagonal of X_KᵀX_K.
        memory_limit: bytes that the matrices of one pass may take; a single projection may exceed it. By default half
            of the memory that is free on the model's device.

    Returns:
        Name of a teacher's tensor → the tensor with its kept inputs refitted, in its own dtype. Empty without a cut.

    Raises:
        PlanError: if units are cut that other modules than plain projections read (experts, state spaces).
        MismatchError: if the plan was made for other weights.
        DataError: if `memory_limit` is not positive; see also `estimate_importance`.
        UnsupportedModelError: if the teacher does not call a projection, or gives it values that are not finite.
    """
    if memory_limit is not None and not memory_limit > 0:
        raise DataError(f"memory_limit={memory_limit!r}: expected a number of bytes above 0.")
    spec_for(model.config).check(model)
    require_weights(model, plan.teacher.get("digest"), "The plan and its scores")
    projections = _cut_projections(model, plan)
    if not projections:
        return {}
    calibration = load_calibration(model, data, processing_class, num_rows, max_length, packing, batch_size)
    limit = SHARE_OF_FREE_MEMORY * free_memory(input_device(model)) if memory_limit is None else memory_limit
    repaired = {}
    for group in projection_groups(projections, limit):
        sums = _kept_products(model, group, calibration)
        for cut in group:
            repaired[f"{cut.path}.weight"] = _refitted_weight(model, cut, sums.pop(cut.path), ridge)
    return repaired


@dataclass(frozen=True)
class CutProjection:
    """A projection that reads units some of which are cut.

    Attributes:
        path: of the module.
        position: the dimension of its weight that holds its inputs.
        order_D: indices of all inputs, the kept ones first.
        num_kept: K, the number of kept inputs.
    """

    path: str
    position: int
    order_D: Tensor
    num_kept: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the float64 sums X_KᵀX."""
        return 8 * self.num_kept * len(self.order_D)


def _cut_projections(model: PreTrainedModel, plan: PruningPlan) -> list[CutProjection]:
    """Every projection that reads units which are cut, in the order of the layers."""
    spec = spec_for(model.config)
    before, after = ({axis: sizes[whose] for axis, sizes in plan.sizes.items()} for whose in ("teacher", "student"))
    names = list(named_tensors(model, tied=True))
    found: dict[tuple[int, str], CutProjection] = {}
    for axis in repaired_axes(spec, before, after):
        module = spec.hook_points[axis]
        for layer in set(spec.layers_with(axis, names)) & set(plan.layers_kept):
            path = spec.layer_parameter(layer, module)
            sizes = spec.sizes(model.config, layer)
            position = UnitView(spec, axis, module, sizes).position
            located = spec.locate(f"{path}.weight")
            assert located is not None
            kept_K = dimension_index(spec.dimensions[located[0]][position], sizes, plan.kept_in(layer))
            num_inputs = tensor_values(model, f"{path}.weight").shape[position]
            if kept_K is not None and len(kept_K) < num_inputs:
                found[layer, path] = CutProjection(path, position, _kept_first(kept_K, num_inputs), len(kept_K))
    return [found[key] for key in sorted(found)]


def _kept_first(kept_K: Any, num_inputs: int) -> Tensor:
    """Indices of all inputs of a projection: the kept ones, then the others."""
    is_cut_D = torch.ones(num_inputs, dtype=torch.bool)
    is_cut_D[torch.from_numpy(kept_K)] = False
    return torch.cat([torch.from_numpy(kept_K), is_cut_D.nonzero().flatten()])


def projection_groups(projections: list[CutProjection], limit: float) -> Iterator[list[CutProjection]]:
    """Consecutive projections whose sums fit into a number of bytes together, at least one at a time."""
    group: list[CutProjection] = []
    for cut in projections:
        if group and sum(each.num_bytes for each in [*group, cut]) > limit:
            yield group
            group = []
        group.append(cut)
    yield group


class _AllObserved(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def _kept_products(
    model: PreTrainedModel, projections: list[CutProjection], calibration: Calibration
) -> dict[str, Tensor]:
    """X_KᵀX of the inputs of some projections over all tokens of the calibration data, the kept inputs first.

    Returns:
        Path → float64 [K, D].
    """
    watch = Batches(spec_for(model.config), model)
    sums: dict[str, Tensor] = {}
    waiting: set[str] = set()

    def hook_of(cut: CutProjection) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            _add_product(sums, cut, first_input(args, kwargs), watch.mask_BT)
            waiting.discard(cut.path)
            if not waiting:
                raise _AllObserved

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        for cut in projections:
            handle = model.get_submodule(cut.path).register_forward_pre_hook(hook_of(cut), with_kwargs=True)
            stack.callback(handle.remove)
        device = input_device(model)
        for batch in calibration.batches():
            waiting.update(cut.path for cut in projections)
            names = ("input_ids", "attention_mask", "scored_mask")
            batch = {name: batch[name].to(device) for name in names if name in batch}
            inputs = watch.inputs(watch.begin(batch))
            try:
                model.base_model(**inputs, use_cache=False)
            except _AllObserved:
                continue
            raise UnsupportedModelError(
                f"The forward pass of this {type(model).__name__} did not call {', '.join(sorted(waiting)[:4])}, "
                "where activations are observed. Load it with another attention or kernel implementation, or prune "
                "without repair."
            )
    if not watch.num_tokens:
        raise DataError(
            "The calibration batches hold no tokens. Pass a list of texts, or a DataLoader that is not empty."
        )
    return sums


def _add_product(sums: dict[str, Tensor], cut: CutProjection, x: Tensor, mask_BT: Tensor) -> None:
    """Add X_KᵀX of one batch: the product in float32 (float64 for float64 inputs), the sum in float64."""
    x_ND = x.reshape(mask_BT.numel(), -1)
    if not bool(mask_BT.all()):
        x_ND = x_ND[mask_BT.flatten().to(x.device)]
    x_ND = x_ND[:, cut.order_D.to(x.device)].to(accumulation_dtype(x))
    product_KD = x_ND[:, : cut.num_kept].T @ x_ND
    if product_KD.device.type == "mps":  # has no float64
        product_KD = product_KD.cpu()
    if cut.path not in sums:
        sums[cut.path] = torch.zeros_like(product_KD, dtype=torch.float64)
    sums[cut.path] += product_KD


def _refitted_weight(model: PreTrainedModel, cut: CutProjection, products_KD: Tensor, ridge: float) -> Tensor:
    """The teacher's weight of a projection with its kept inputs refitted, in its dtype and layout.

    Raises:
        UnsupportedModelError: if the sums are not finite.
    """
    if not bool(products_KD.isfinite().all()):
        raise UnsupportedModelError(
            f"The inputs of {cut.path} are not finite in {str(model.dtype).removeprefix('torch.')}. Load the model in "
            "a wider dtype (dtype='float32'), or check its weights."
        )
    weight = tensor_values(model, f"{cut.path}.weight").detach()
    weight_DH = weight.T if cut.position == 1 else weight
    order_D = cut.order_D.to(weight.device)
    kept_K, cut_C = order_D[: cut.num_kept], order_D[cut.num_kept :]
    change_KH = _compensation(products_KD, weight_DH[cut_C].to(products_KD.device, torch.float64), ridge)
    refitted = weight.clone(memory_format=torch.contiguous_format)
    kept_KH = (weight_DH[kept_K].to(change_KH) + change_KH).to(weight)
    (refitted.T if cut.position == 1 else refitted)[kept_K] = kept_KH
    return refitted


def _compensation(products_KD: Tensor, weight_CH: Tensor, ridge: float) -> Tensor:
    """What the weights of the kept inputs gain to make up for the cut ones: see `repaired_weights`.

    Args:
        products_KD: float64 X_KᵀX, the kept inputs first; overwritten.
        weight_CH: float64 weights of the cut inputs.
        ridge: λ as a fraction of the mean of the diagonal of X_KᵀX_K.

    Returns:
        float64 [K, H].
    """
    num_kept = len(products_KD)
    products_KK = products_KD[:, :num_kept]
    products_KK.diagonal().add_(ridge * products_KK.diagonal().mean().clamp(min=1e-12))
    return torch.linalg.solve(products_KK, products_KD[:, num_kept:] @ weight_CH)
