"""Sums over calibration tokens that a repair is computed from.

Legend of shape suffixes: N tokens, K inputs of the student, R inputs whose residual is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DataError, UnsupportedModelError
from ..families import spec_for
from ..models import evaluating
from ..scoring.batches import Batches
from ..scoring.calibration import Calibration
from ..scoring.hooks import first_input
from ..weights import input_device
from .repair_inputs import CutInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Every fourth row is held out where the ridge is chosen; it counts in the fit.
HELD_OUT_EVERY = 4


@dataclass
class Moments:
    """Sums over tokens of X [N, K], the student's inputs, and Y [N, R], what they lack.

    Attributes:
        products: XᵀX and XᵀY side by side, float64 [K, K + R].
        totals: sums of X and Y, float64 [K + R].
        count: N.
    """

    products: Tensor
    totals: Tensor
    count: int = 0

    @classmethod
    def of_nothing(cls, num_kept: int, num_rest: int, device: torch.device | str) -> Moments:
        """Sums of no tokens."""
        shape = (num_kept, num_kept + num_rest)
        zeros = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(shape[1], dtype=torch.float64, device=device))

    def add(self, x_N: Tensor) -> None:
        """Add a batch of X and Y side by side, [N, K + R]; its product is formed in its dtype."""
        self.products += (x_N[:, : len(self.products)].T @ x_N).to(self.products.device)
        self.totals += x_N.sum(0).to(self.totals.device)
        self.count += len(x_N)

    def without(self, part: Moments) -> Moments:
        """The sums over all other tokens."""
        return Moments(self.products - part.products, self.totals - part.totals, self.count - part.count)

    @property
    def mean(self) -> Tensor:
        """Means of X and Y, [K + R]."""
        return self.totals / max(1, self.count)

    def centre_(self, mean: Tensor | None = None) -> Moments:
        """Replace the products by those of X and Y less their means, and return self.

        Args:
            mean: what to subtract instead, [K + R], such as the means of other tokens.
        """
        num_kept, mean = len(self.products), self.mean if mean is None else mean
        self.products.addr_(self.totals[:num_kept], mean, alpha=-1)
        self.products.addr_(mean[:num_kept], self.totals - self.count * mean, alpha=-1)
        return self


@dataclass
class Products:
    """Sums over all rows of some inputs, and over those that are held out; None where they are not kept apart."""

    all: Moments
    held_out: Moments | None = None


class _AllObserved(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def input_products(
    model: PreTrainedModel, group: Sequence[CutInputs], calibration: Calibration, probes: Sequence[CutInputs] = ()
) -> tuple[dict[str, Products], int]:
    """Sum the products of some inputs over all tokens of the calibration data, in one forward pass per batch.

    Args:
        model: the teacher.
        group: inputs to observe.
        calibration: rows.
        probes: those of the group whose held-out rows are summed apart.

    Returns:
        Path → sums, and the number of tokens.
    """
    watch = Batches(spec_for(model.config), model)
    sums: dict[str, Products] = {}
    waiting: set[str] = set()
    apart = {probe.path for probe in probes}

    def hook_of(cut: CutInputs) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            _add(sums, cut, first_input(args, kwargs), output, watch, cut.path in apart)
            waiting.discard(cut.path)
            if not waiting:
                raise _AllObserved

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        for cut in group:
            module = model.get_submodule(cut.path)
            stack.callback(module.register_forward_hook(hook_of(cut), with_kwargs=True).remove)
        device = input_device(model)
        for batch in calibration.batches():
            waiting.update(cut.path for cut in group)
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
    return sums, watch.num_tokens


def _add(
    sums: dict[str, Products], cut: CutInputs, before: Tensor, after: Tensor, watch: Batches, is_probe: bool
) -> None:
    """Add the products of one batch to the sums."""
    num_rows = watch.mask_BT.shape[0]
    mask_N = watch.mask_BT.flatten().to(before.device)
    seen = (before,) if cut.norm is None else (before, after)  # the output of a projection is not read
    x_N = cut.observed(*(x.reshape(len(mask_N), -1)[mask_N] for x in seen))
    if cut.path not in sums:
        device = "cpu" if x_N.device.type == "mps" else x_N.device  # MPS has no float64
        sizes = len(cut.kept_K), len(cut.rest_R)
        sums[cut.path] = Products(
            Moments.of_nothing(*sizes, device), Moments.of_nothing(*sizes, device) if is_probe else None
        )
    found = sums[cut.path]
    found.all.add(x_N)
    if found.held_out is not None:
        first = watch.num_rows - num_rows  # of this batch among all rows
        is_held_B = torch.arange(first, first + num_rows) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        is_held_N = is_held_B[:, None].expand(watch.mask_BT.shape).flatten().to(mask_N.device)[mask_N]
        found.held_out.add(x_N[is_held_N])
