"""Observes the experts of a layer as the student routes tokens to them.

Legend of shape suffixes: N tokens of a batch, n those that an expert is given, F its neurons, K its kept and R its cut
ones, H outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..scoring.batches import Batches
from ..scoring.experts import RoutedActivations, is_stored_transposed, observed_experts
from ..scoring.reductions import accumulation_dtype
from .repair_inputs import CutInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pause:
    """Lets a module run without being observed, such as a layer that runs again with other experts."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Pause the observers; the pause of a context around this one goes on after it."""
        before, self.is_on = self.is_on, True
        try:
            yield
        finally:
            self.is_on = before


def observe_experts(
    model: PreTrainedModel,
    cuts: Sequence[CutInputs],
    watch: Batches,
    add: Callable[..., None],
    pause: Pause,
    stack: ExitStack,
) -> None:
    """Call a function with what `Moments.add` takes of the experts of one module, in every forward pass.

    The layer runs a second time on the teacher's states, with a router that chooses among the experts that stay. Each
    expert gets an equal share, among those that a token is given to, of what the teacher's experts compute more: if
    every one of k experts makes up for 1/k of it as well as it can, all of them together leave no larger sum of
    squared errors than before.

    Args:
        model: the teacher.
        cuts: the kept experts.
        watch: knows which tokens of the batch count.
        add: takes a cut, tensors and, by name, the `tokens` that they belong to.
        pause: of the other observers, while the layer runs again.
        stack: removes the hooks.
    """
    path, expert = cuts[0].projections[0].path, cuts[0].expert
    assert expert is not None
    layer_path = f"{watch.spec.layers_path}.{expert.layer}"
    experts, transposed = model.get_submodule(path), is_stored_transposed(watch.spec, path[len(layer_path) + 1 :])
    seen: dict[str, Tensor] = {}

    def on_experts(_: Any, __: Any, output: Tensor) -> None:
        if not pause.is_on:
            seen["output"] = output

    def on_layer(layer: Any, args: Any, kwargs: Any, _: Any) -> None:
        if pause.is_on:
            return
        reports: dict[int, RoutedActivations] = {}
        with pause.on(), expert.routing(), observed_experts({experts: reports.__setitem__}, transposed):
            layer(*args, **kwargs)
        _add_experts(cuts, reports, seen.pop("output"), watch, add)

    stack.callback(experts.register_forward_hook(on_experts).remove)
    stack.callback(model.get_submodule(layer_path).register_forward_hook(on_layer, with_kwargs=True).remove)


def _add_experts(
    cuts: Sequence[CutInputs],
    reports: dict[int, RoutedActivations],
    output: Tensor,
    watch: Batches,
    add: Callable[..., None],
) -> None:
    """Add the inputs of all experts, and their shares of what they lack together.

    Args:
        cuts: the kept experts.
        reports: of the second run.
        output: of the teacher's experts; some classes return those of every expert, [E * N, H].
        watch: knows which tokens of the batch count.
        add: as in `observe_experts`.
    """
    mask_N = watch.mask_BT.flatten().to(output.device)
    dtype = accumulation_dtype(output)
    missing_NH = output.reshape(-1, len(mask_N), output.shape[-1]).sum(0, dtype=dtype)
    count_N = torch.zeros(len(mask_N), dtype=torch.long, device=output.device)
    routed: dict[int, Tensor] = {}
    for index, report in reports.items():
        missing_NH.index_add_(0, report.token_n, report.output_nH.to(dtype), alpha=-1)
        routed[index] = report.inner_nF.ne(0).any(1)  # some classes compute every expert for all tokens
        count_N.index_add_(0, report.token_n, routed[index].long())
    for cut in cuts:
        assert cut.expert is not None
        units_F = torch.cat([cut.kept_K, cut.rest_R]).to(output.device)
        token_n, x_nF = mask_N.new_zeros(0, dtype=torch.long), missing_NH.new_zeros(0, len(units_F))
        own = reports.get(cut.expert.index)
        if own is not None:
            counts_n = routed[cut.expert.index] & mask_N[own.token_n]
            token_n = own.token_n[counts_n]
            x_nF = (own.inner_nF[counts_n].to(dtype) * own.weight_n1[counts_n].to(dtype))[:, units_F]
        share = (missing_NH[token_n] / count_N[token_n, None],) if cut.expert.width else ()
        add(cut, x_nF, *share, tokens=token_n)
