"""Sums over calibration tokens that a repair is computed from.

Legend of shape suffixes: N tokens, K inputs of the student, R inputs whose residual is made up for, G channels of the
residual stream whose change in dropped layers is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DataError, UnsupportedModelError
from ..families import spec_for
from ..models import evaluating
from ..scoring.batches import Batches, on_device
from ..scoring.calibration import Calibration
from ..scoring.hooks import first_input
from .repair_experts import Pause, observe_experts
from .repair_gaps import stream_output
from .repair_inputs import CutInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Every fourth row is held out where the ridge is chosen; it counts in the fit.
HELD_OUT_EVERY = 4


@dataclass
class Moments:
    """Sums over tokens of X [N, K], the student's inputs, and of Y, what they lack and what dropped layers added.

    Attributes:
        products: XᵀX and XᵀY side by side, float64 [K, K + R + G].
        totals: sums of X and Y, float64 [K + R + G].
        count: N.
    """

    products: Tensor
    totals: Tensor
    count: int = 0

    @classmethod
    def of_nothing(cls, cut: CutInputs, device: torch.device | str) -> Moments:
        """Sums of no tokens."""
        shape = (len(cut.kept_K), cut.width)
        zeros = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(shape[1], dtype=torch.float64, device=device))

    def add(self, x_N: Tensor, change_NG: Tensor | None = None) -> None:
        """Add a batch of X and what it lacks side by side, [N, K + R], and what dropped layers added, [N, G].

        Products are formed in the dtype of the batch.
        """
        start, transposed_KN = 0, x_N[:, : len(self.products)].T
        for part_N in (x_N,) if change_NG is None else (x_N, change_NG):
            stop = start + part_N.shape[1]
            self.products[:, start:stop] += (transposed_KN @ part_N).to(self.products.device)
            self.totals[start:stop] += part_N.sum(0).to(self.totals.device)
            start = stop
        self.count += len(x_N)

    def without(self, part: Moments) -> Moments:
        """The sums over all other tokens."""
        return Moments(self.products - part.products, self.totals - part.totals, self.count - part.count)

    @property
    def mean(self) -> Tensor:
        """Means of X and Y, [K + R + G]."""
        return self.totals / max(1, self.count)

    def centre_(self, mean: Tensor | None = None) -> Moments:
        """Replace the products by those of X and Y less their means, and return self.

        Args:
            mean: what to subtract instead, [K + R + G], such as the means of other tokens.
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


class AllObserved(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Observed:
    """What a pass has observed.

    Attributes:
        sums: path → sums so far.
        waiting: paths that the current batch has yet to reach.
        ends: whether a forward pass ends when nothing is waited for.
        pause: while it is on, nothing is observed.
    """

    sums: dict[str, Products] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    ends: bool = True
    pause: Pause = field(default_factory=Pause)


@contextmanager
def observing(
    model: PreTrainedModel, group: Sequence[CutInputs], watch: Batches, probes: Sequence[CutInputs] = ()
) -> Iterator[Observed]:
    """Observe some inputs in the forward passes of the context.

    Args:
        model: the teacher.
        group: inputs to observe.
        watch: knows which tokens of the batch count.
        probes: those of the group whose held-out rows are summed apart.
    """
    observed = Observed()
    apart = {probe.path for probe in probes}

    def add(cut: CutInputs, *batch: Tensor, tokens: Tensor | None = None) -> None:
        add_products(observed.sums, cut, batch, watch, cut.path in apart, tokens)
        observed.waiting.discard(cut.path)
        if observed.ends and not observed.waiting:
            raise AllObserved

    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        modules: dict[str, list[CutInputs]] = {}
        for cut in group:
            if cut.expert is None:
                _observe(model, cut, watch, add, observed.pause, stack)
            else:
                modules.setdefault(cut.projections[0].path, []).append(cut)
        for cuts in modules.values():
            observe_experts(model, cuts, watch, add, observed.pause, stack)
        yield observed


def forward(model: PreTrainedModel, watch: Batches, batch: Mapping[str, Tensor]) -> bool:
    """Run the layers of a model on the next batch, and return whether an observer has ended the pass."""
    inputs = watch.inputs(watch.begin(on_device(batch, model)))
    try:
        model.base_model(**inputs, use_cache=False)
    except AllObserved:
        return True
    return False


def require_observed(model: PreTrainedModel, observed: Observed) -> None:
    """Refuse a model that did not call what is observed."""
    if observed.waiting:
        raise UnsupportedModelError(
            f"The forward pass of this {type(model).__name__} did not call {', '.join(sorted(observed.waiting)[:4])}, "
            "where activations are observed. Load it with another attention or kernel implementation, or prune "
            "without repair."
        )


def require_tokens(watch: Batches) -> None:
    """Refuse data without tokens."""
    if not watch.num_tokens:
        raise DataError(
            "The calibration batches hold no tokens. Pass a list of texts, or a DataLoader that is not empty."
        )


def require_finite(model: PreTrainedModel, sums: Mapping[str, Products]) -> None:
    """Refuse sums that are not finite."""
    wrong = [path for path, products in sums.items() if not bool(products.all.products.isfinite().all())]
    if wrong:
        raise UnsupportedModelError(
            f"The inputs of {wrong[0]} are not finite in {str(model.dtype).removeprefix('torch.')}. Load the model in "
            "a wider dtype (dtype='float32'), or check its weights."
        )


@torch.no_grad()
def input_products(
    model: PreTrainedModel,
    group: Sequence[CutInputs],
    calibration: Calibration,
    probes: Sequence[CutInputs] = (),
    advance: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Products], int]:
    """Sum the products of some inputs over all tokens of the calibration data, in one forward pass per batch.

    Args:
        model: the teacher.
        group: inputs to observe.
        calibration: rows.
        probes: those of the group whose held-out rows are summed apart.
        advance: called after every batch.

    Returns:
        Path → sums, and the number of tokens.
    """
    watch = Batches(spec_for(model.config), model)
    with observing(model, group, watch, probes) as observed:
        for batch in calibration.batches():
            observed.waiting.update(cut.path for cut in group)
            forward(model, watch, batch)
            require_observed(model, observed)
            advance()
    require_tokens(watch)
    return observed.sums, watch.num_tokens


def _observe(
    model: PreTrainedModel,
    cut: CutInputs,
    watch: Batches,
    add: Callable[..., None],
    pause: Pause,
    stack: ExitStack,
) -> None:
    """Call a function with what `Moments.add` takes of some inputs, in every forward pass.

    Args:
        model: the teacher.
        cut: the inputs.
        watch: knows which tokens of the batch count.
        add: takes `cut` and tensors.
        pause: while it is on, nothing is observed.
        stack: removes the hooks.
    """
    seen: dict[str, Tensor] = {}

    def tokens(x: Tensor) -> Tensor:
        """[B, T, …] → [N, …]."""
        mask_N = watch.mask_BT.flatten().to(x.device)
        return x.reshape(len(mask_N), -1)[mask_N]

    def on_inputs(_: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if pause.is_on:
            return
        read = first_input(args, kwargs)  # the output of a projection is not read
        of_norm = () if cut.norm is None else (output, *args[1:2])  # a norm with a gate takes it second
        x_N = cut.observed(*map(tokens, (read, *of_norm)))
        if cut.gap is None:
            add(cut, x_N)
        else:
            seen["inputs"] = x_N

    def before_gap(_: Any, args: Any, kwargs: Any) -> None:
        if not pause.is_on:
            seen["state"] = tokens(first_input(args, kwargs))

    def after_gap(_: Any, __: Any, output: Any) -> None:
        if pause.is_on:
            return
        assert cut.gap is not None
        x_N = seen.pop("inputs")
        change_NG = tokens(stream_output(output)).to(x_N)
        change_NG -= seen.pop("state").to(change_NG.device)
        add(cut, x_N, change_NG.div_(cut.gap.factor))

    stack.callback(model.get_submodule(cut.path).register_forward_hook(on_inputs, with_kwargs=True).remove)
    if cut.gap is not None:
        layers: Any = model.get_submodule(watch.spec.layers_path)
        stack.callback(layers[cut.gap.first].register_forward_pre_hook(before_gap, with_kwargs=True).remove)
        stack.callback(layers[cut.gap.last].register_forward_hook(after_gap).remove)


def add_products(
    sums: dict[str, Products],
    cut: CutInputs,
    batch: tuple[Tensor, ...],
    watch: Batches,
    is_probe: bool,
    tokens: Tensor | None,
) -> None:
    """Add the products of one batch to the sums; `tokens` are the indices of some of its tokens, or None for all."""
    num_rows = watch.mask_BT.shape[0]
    where = batch[0].device
    tokens = watch.mask_BT.flatten().nonzero().flatten() if tokens is None else tokens
    if cut.path not in sums:
        device = "cpu" if where.type == "mps" else where  # MPS has no float64
        moments = [Moments.of_nothing(cut, device) for _ in range(2 if is_probe else 1)]
        sums[cut.path] = Products(*moments)
    found = sums[cut.path]
    found.all.add(*batch)
    if found.held_out is not None:
        first = watch.num_rows - num_rows  # of this batch among all rows
        is_held_B = torch.arange(first, first + num_rows) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        is_held_N = is_held_B[:, None].expand(watch.mask_BT.shape).flatten().to(where)[tokens.to(where)]
        found.held_out.add(*(part_N[is_held_N] for part_N in batch))
