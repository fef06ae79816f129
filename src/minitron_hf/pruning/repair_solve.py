"""Solves the least squares of a repair from its sums, and chooses their ridges on held-out rows.

Legend of shape suffixes: D inputs of a projection in the teacher, K those of the student, R inputs whose residual is
made up for, H outputs of a projection, G those of them that dropped layers change.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..weights import narrowed
from .repair_inputs import CutInputs, Projection
from .repair_sums import Moments, Products
from .stored_layers import read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

#: Ridges among which held-out rows choose, and the one that is taken without held-out rows.
RIDGES, DEFAULT_RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 1e-3
#: The least ridge: with none, an input that is always 0, or equals another, leaves nothing to divide by.
LEAST_RIDGE = 1e-13
#: Outputs of a projection that are solved at a time: an untied head has as many as the vocabulary.
OUTPUTS_AT_A_TIME = 8192
#: Calibration tokens per kept input below which a warning is logged: the fit follows the text more than the model then
#: (SmolLM2-135M: with 8k tokens for 1,080 neurons the student got worse, with 41k it got better).
TOKENS_PER_INPUT = 16


def warn_of_few_tokens(widest: int, num_tokens: int) -> None:
    """Log a warning if a fit had few tokens for each of its inputs.

    Args:
        widest: the most inputs of a projection that were fitted.
        num_tokens: of the calibration data.
    """
    if num_tokens < TOKENS_PER_INPUT * widest:
        logger.warning(
            "The repair fits %s inputs to %s calibration tokens. Below %s per input the student may become worse on "
            "other text: raise num_rows, or pass more text.", f"{widest:,}", f"{num_tokens:,}", TOKENS_PER_INPUT,
        )  # fmt: skip


def best_ridges(
    model: PreTrainedModel, probes: Sequence[CutInputs], sums: dict[str, Products]
) -> Iterator[tuple[str, float | None]]:
    """For each probe: its kind, and the ridge whose fit to the other rows has the smallest error on the held-out ones.

    The ridge is None where no rows were held out.
    """
    for cut in probes:
        products, projection = sums[cut.path], cut.projections[0]
        held_out, products.held_out = products.held_out, None  # frees their memory in the end
        if held_out is None or not held_out.count:  # too few rows to hold one out
            yield cut.kind, None
            continue
        weight_DH = _inputs_first(projection.own(read_tensor(model, projection.name)), projection)
        weight_RH = weight_DH[cut.rest_R.to(weight_DH.device)].to(products.all.products)
        fitted = products.all.without(held_out)
        if has_bias(model, projection):  # the bias makes up for the means of the fitted rows
            held_out.centre_(fitted.mean)
            fitted.centre_()
        errors = {ridge: _held_out_error(fitted, held_out, weight_RH, ridge) for ridge in RIDGES}
        yield cut.kind, min(errors, key=errors.__getitem__)


def medians(best: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Kind → the lower median of its ridges, or the default of none."""
    found: dict[str, list[float]] = {}
    for kind, ridge in best:
        found.setdefault(kind, []).extend([] if ridge is None else [ridge])
    return {kind: statistics.median_low(ridges) if ridges else DEFAULT_RIDGE for kind, ridges in found.items()}


def _held_out_error(fitted: Moments, held_out: Moments, weight_RH: Tensor, ridge: float) -> float:
    """‖T − X Δ‖² − ‖T‖², T = Y W_R + G, over the held-out rows, with Δ fitted to others; both centred or neither."""
    num_kept = len(fitted.products)
    factors = _factors(fitted.products[:, :num_kept], ridge)
    change_KH = torch.linalg.lu_solve(*factors, _wanted(fitted.products[:, num_kept:], weight_RH))
    held_KK, wanted_KH = held_out.products[:, :num_kept], _wanted(held_out.products[:, num_kept:], weight_RH)
    return float(((held_KK @ change_KH - 2 * wanted_KH) * change_KH).sum())


def _wanted(missing: Tensor, weight_RH: Tensor, part: slice = slice(None)) -> Tensor:
    """Y W_R + G, or its product with something, at some outputs.

    Args:
        missing: [..., R + G], products of Y and G side by side, or their means.
        weight_RH: rows of the weight, at these outputs.
        part: these outputs.
    """
    num_rest = len(weight_RH)
    wanted = missing[..., :num_rest] @ weight_RH
    return wanted + missing[..., num_rest:][..., part] if missing.shape[-1] > num_rest else wanted


def refit_weights(
    model: PreTrainedModel, cut: CutInputs, moments: Moments, ridge: float, repaired: dict[str, Tensor]
) -> None:
    """Refit weights and biases of some projections to the kept inputs, in their dtype and layout.

    Args:
        model: the teacher.
        cut: the inputs.
        moments: sums over the calibration data; overwritten.
        ridge: λ as a fraction of the mean of the diagonal of XᵀX.
        repaired: name → refitted tensor; added to.
    """
    for adds_bias in (False, True):
        projections = [one for one in cut.projections if has_bias(model, one) == adds_bias]
        if not projections:
            continue
        if adds_bias:
            moments.centre_()
        products_KK = moments.products[:, : len(moments.products)]
        factors = _factors(products_KK, ridge)
        for projection in projections:
            _refit(model, cut, projection, moments, factors, repaired)


def _refit(
    model: PreTrainedModel,
    cut: CutInputs,
    projection: Projection,
    moments: Moments,
    factors: tuple[Tensor, Tensor],
    repaired: dict[str, Tensor],
) -> None:
    """Refit the weight of one projection, and its bias if it has one."""
    num_kept = len(moments.products)
    products, mean = moments.products[:, num_kept:], moments.mean
    names = [projection.name, *([f"{projection.path}.bias"] if has_bias(model, projection) else [])]
    tensors = [read_tensor(model, name) for name in names]
    for name, tensor in zip(names, tensors):
        if name not in repaired:
            repaired[name] = tensor.clone(memory_format=torch.contiguous_format)
    weight, bias = projection.own(tensors[0]), tensors[1:]
    weight_DH = _inputs_first(weight, projection)
    refitted_DH = _inputs_first(projection.own(repaired[names[0]]), projection)
    kept_K, rest_R = cut.kept_K.to(weight.device), cut.rest_R.to(weight.device)
    for start in range(0, weight_DH.shape[1], OUTPUTS_AT_A_TIME):
        part = slice(start, start + OUTPUTS_AT_A_TIME)
        weight_RH = weight_DH[rest_R, part].to(moments.products)
        change_KH = torch.linalg.lu_solve(*factors, _wanted(products, weight_RH, part))
        found_KH = weight_DH[kept_K, part].to(change_KH) + change_KH
        refitted_DH[kept_K, part] = narrowed(found_KH.to(weight.device), weight.dtype, names[0])
        for before in bias:
            missing_H = _wanted(mean[num_kept:], weight_RH, part) - mean[:num_kept] @ change_KH
            found_H = before[part].to(missing_H) + missing_H
            repaired[names[1]][part] = narrowed(found_H.to(before.device), before.dtype, names[1])


def has_bias(model: PreTrainedModel, projection: Projection) -> bool:
    """Whether a projection adds a bias."""
    return getattr(model.get_submodule(projection.path), "bias", None) is not None


def _inputs_first(weight: Tensor, projection: Projection) -> Tensor:
    """A view [D, H] of a weight."""
    return weight.T if projection.position == 1 else weight


def _factors(products_KK: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """LU factors of XᵀX + λI; λ is `ridge` (at least `LEAST_RIDGE`) times the mean of the diagonal.

    The argument holds λ only meanwhile.
    """
    diagonal_K = products_KK.diagonal().clone()
    products_KK.diagonal().add_(max(ridge, LEAST_RIDGE) * diagonal_K.mean().clamp(min=1e-12))
    factors, pivots = torch.linalg.lu_factor(products_KK)
    products_KK.diagonal().copy_(diagonal_K)
    return factors, pivots
