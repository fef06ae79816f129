"""Refits output projections by least squares, so that the kept units reproduce the teacher's layers.

Legend of shape suffixes: N tokens, D inputs of a projection, K those that stay, C those that are cut, H its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import DataSource
from ..families import named_tensors, spec_for
from ..families.axes import dimension_index
from ..models import evaluating
from ..scoring.batches import Batches
from ..scoring.calibration import Calibration, load_calibration
from ..scoring.hook_points import UnitView
from ..scoring.hooks import first_input
from ..scoring.scores import require_weights
from ..sizes.resolve import repaired_axes
from ..weights import input_device, tensor_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import PruningPlan


def repaired_weights(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    num_samples: int = 1024,
    max_length: int | None = None,
    packing: bool = True,
    batch_size: int = 8,
    ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """Refit output projections to the kept neurons and heads, for `apply_plan(repaired=…)`.

    For every projection that reads cut neurons, heads or groups, with X [N, D] its inputs in the teacher:
    min ‖X W − X_K W'_K‖² + λ‖W'_K − W_K‖², so W'_K = W_K + (X_KᵀX_K + λI)⁻¹ X_KᵀX_C W_C. Only XᵀX is accumulated, in
    float64, over one forward pass of the teacher. Biases are left as they are, and nothing is centred.

    Args:
        model: the teacher; not changed.
        plan: made for it. It may cut other axes, too, which the fit ignores.
        data: calibration texts, token rows, a dataset or a `DataLoader`, as for `estimate_importance`.
        processing_class: tokenizer, needed for texts.
        num_samples: rows to use.
        max_length: tokens in a row.
        packing: join texts into full rows.
        batch_size: rows at a time.
        ridge: λ as a fraction of the mean of the diagonal of X_KᵀX_K.

    Returns:
        Name of a teacher's tensor → the tensor with its kept inputs refitted, in its own dtype. Empty without a cut.

    Raises:
        PlanError: if units are cut that other modules than plain projections read (experts, state spaces).
        MismatchError: if the plan was made for other weights.
        DataError: see `estimate_importance`.
    """
    spec = spec_for(model.config)
    spec.check(model)
    require_weights(model, plan.teacher.get("digest"), "The plan and its scores")
    projections = _cut_projections(model, plan)
    if not projections:
        return {}
    calibration = load_calibration(model, data, processing_class, num_samples, max_length, packing, batch_size)
    grams = _gram_matrices(model, projections, calibration)
    repaired = {}
    for path, (layer, view) in projections.items():
        name = f"{path}.weight"
        located = spec.locate(name)
        assert located is not None
        dimension = spec.dimensions[located[0]][view.position]
        index = dimension_index(dimension, spec.sizes(model.config, layer), plan.kept_in(layer))
        weight = tensor_values(model, name).detach()
        if index is not None and len(index) < weight.shape[view.position]:
            weight_DH = weight.T if view.position == 1 else weight
            refitted_DH = _refit(weight_DH, grams[path], torch.from_numpy(index), ridge)
            repaired[name] = (refitted_DH.T if view.position == 1 else refitted_DH).to(weight).contiguous()
    return repaired


def _cut_projections(model: PreTrainedModel, plan: PruningPlan) -> dict[str, tuple[int, UnitView]]:
    """Path of every projection that reads units which are cut → its layer, and which of its inputs are which units."""
    spec = spec_for(model.config)
    before, after = ({axis: sizes[whose] for axis, sizes in plan.sizes.items()} for whose in ("teacher", "student"))
    names = list(named_tensors(model, tied=True))
    projections: dict[str, tuple[int, UnitView]] = {}
    for axis in repaired_axes(spec, before, after):
        module = spec.hook_points[axis]
        for layer in set(spec.layers_with(axis, names)) & set(plan.layers_kept):
            view = UnitView(spec, axis, module, spec.sizes(model.config, layer))
            projections[spec.layer_parameter(layer, module)] = layer, view
    return projections


@torch.no_grad()
def _gram_matrices(model: PreTrainedModel, paths: Iterable[str], calibration: Calibration) -> dict[str, Tensor]:
    """XᵀX of the inputs of some modules, over all tokens of the calibration data: float64 [D, D] of each."""
    grams: dict[str, Tensor] = {}
    watch = Batches(spec_for(model.config), model)

    def observe(path: str, x: Tensor) -> None:
        mask_N = watch.mask_BT.flatten().to(x.device)
        x_ND = x.reshape(len(mask_N), -1)[mask_N].double()
        gram_DD = x_ND.T @ x_ND
        grams[path] = grams[path] + gram_DD if path in grams else gram_DD

    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        for path in paths:

            def hook(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
                observe(path, first_input(args, kwargs))

            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        device = input_device(model)
        for batch in calibration.batches():
            names = ("input_ids", "attention_mask", "scored_mask")
            batch = {name: batch[name].to(device) for name in names if name in batch}
            model.base_model(**watch.inputs(watch.begin(batch)), use_cache=False)
    return grams


def _refit(weight_DH: Tensor, gram_DD: Tensor, kept_K: Tensor, ridge: float) -> Tensor:
    """A projection whose kept inputs are refitted to make up for the cut ones: see `repaired_weights`.

    Args:
        weight_DH: the teacher's.
        gram_DD: XᵀX of its inputs.
        kept_K: indices of the kept inputs.
        ridge: λ as a fraction of the mean of the diagonal of X_KᵀX_K.

    Returns:
        float64 [D, H]; the rows of cut inputs are unchanged.
    """
    kept_K = kept_K.to(gram_DD.device)
    is_cut_D = torch.ones(len(gram_DD), dtype=torch.bool, device=gram_DD.device)
    is_cut_D[kept_K] = False
    exact_DH = weight_DH.to(gram_DD.device, torch.float64).clone()
    gram_KK = gram_DD[kept_K][:, kept_K]
    gram_KK.diagonal().add_(ridge * gram_KK.diagonal().mean().clamp(min=1e-12))
    lost_KH = gram_DD[kept_K][:, is_cut_D] @ exact_DH[is_cut_D]
    exact_DH[kept_K] += torch.linalg.solve(gram_KK, lost_KH)
    return exact_DH
