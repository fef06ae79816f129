"""Observes stacked experts: the activations of every expert for the tokens that are routed to it.

Transformers keeps the experts of a layer in 3-D tensors of one module, so there is no module per expert to hook. But
it computes them by an exchangeable function (`compat.experts_computed_by`); the function here reports activations.

Legend of shape suffixes: N tokens, K experts chosen for a token, n tokens routed to one expert, F its neurons,
D inputs of its nonlinearity (neurons, and gates where it has them), H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import experts_computed_by, gate_function
from ..errors import UnsupportedModelError
from ..families import ArchSpec
from ..families.axes import Dimension, dimension_axes
from ..weights import tensor_values


class RoutedActivations(NamedTuple):
    """Activations of one expert for the tokens that are routed to it.

    Attributes:
        token_n: indices of the tokens.
        weight_n1: router weights; 1 where they scaled the tokens beforehand.
        before_nD: input of the nonlinearity, gates and neurons in the order of the weights.
        inner_nF: input of the down projection.
        output_nH: output, times the router weights.
    """

    token_n: Tensor
    weight_n1: Tensor
    before_nD: Tensor
    inner_nF: Tensor
    output_nH: Tensor


#: The tensor of a module of stacked experts that holds their down projections.
DOWN_PROJECTIONS = "down_proj"
#: Called for every expert with its index and its activations.
Observer = Callable[[int, RoutedActivations], None]

#: Largest relative difference between two computations of the same experts: the rounding of bfloat16.
_SAME = 0.03


@contextmanager
def observed_experts(
    observers: Mapping[nn.Module, Observer], transposed: bool, *, differentiable: bool = False
) -> Iterator[None]:
    """Report what the experts of some modules compute, for the duration of the context.

    Most modules compute their experts by the function of `config._experts_implementation`, which is replaced. The
    experts of other modules are computed a second time after their forward, and must give the same output.

    Args:
        observers: module of stacked experts → function to call for each of its experts.
        transposed: whether the weights of an expert are stored as [in, out], for modules without `is_transposed`.
        differentiable: whether gradients of the reported activations are needed, which a second computation lacks.

    Raises:
        UnsupportedModelError: if a module computes something else than its weights suggest, or gives no gradients.
    """

    def forward(module: Any, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return _sum_of_experts(module, transposed, observers.get(module), hidden_NH, index_NK, weights_NK)

    def compute_again(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        inputs = (*args, *kwargs.values())
        with align_module_device(module):
            if len(inputs) == 1:
                _require_same(module, output, _sorted_experts(module, transposed, observers[module], *inputs))
                return
            total_NH = _sum_of_experts(module, transposed, observers[module], *inputs)
        # An index beyond the stacked experts may stand for an expert without weights, such as the identity.
        known_N = (inputs[1] < len(module.down_proj)).all(-1)
        _require_same(module, output.reshape(total_NH.shape)[known_N], total_NH[known_N])

    with ExitStack() as stack:
        configs: dict[int, Any] = {}
        for module in observers:
            if hasattr(module, "has_post_expert_norm"):  # an attribute of all modules that use the function
                configs[id(module.config)] = module.config
            elif differentiable:
                raise UnsupportedModelError(
                    f"The experts of {type(module).__name__} cannot be observed in a backward pass: it computes them "
                    "in a way of its own. Use a metric that reads no gradients, such as 'activation'."
                )
            else:
                stack.callback(module.register_forward_hook(compute_again, with_kwargs=True).remove)
        stack.enter_context(experts_computed_by(forward, configs.values()))
        yield


def is_stored_transposed(spec: ArchSpec, module: str) -> bool:
    """Whether the table says that a module stores the down projections of its experts as [in, out]."""
    _, rows, _ = spec.dimensions.get(f"{module}.down_proj", ((), (), ()))
    return any(spec.axis[axis].within is not None for axis in dimension_axes(rows))


def expert_input_dimension(spec: ArchSpec, module: str) -> Dimension:
    """The dimension of the projection that computes the neurons of an expert, gates included."""
    names = [name for name in ("gate_up_proj", "up_proj") if f"{module}.{name}" in spec.dimensions]
    [dimension] = [
        dimension
        for dimension in spec.dimensions[f"{module}.{names[0]}"]
        if any(spec.axis[axis].within is not None for axis in dimension_axes(dimension))
    ]
    return dimension


def reads_input(leaf: str) -> bool | None:
    """Whether a tensor of stacked experts multiplies their input (True) or makes their output (False)."""
    return {"gate_up_proj": True, "up_proj": True, "down_proj": False}.get(leaf.removesuffix("_bias"))


def expert_down_projections(model: PreTrainedModel, path: str) -> Tensor:
    """The down projections of all experts of a module, [E, …]."""
    return tensor_values(model, f"{path}.down_proj")


def _sum_of_experts(
    module: Any,
    transposed: bool,
    observer: Observer | None,
    hidden_NH: Tensor,
    index_NK: Tensor,
    weights_NK: Tensor,
) -> Tensor:
    """Output of all experts, weighted by the router → [N, H]."""
    hidden_NH = hidden_NH.reshape(-1, hidden_NH.shape[-1])
    total_NH = torch.zeros_like(hidden_NH, dtype=torch.promote_types(hidden_NH.dtype, weights_NK.dtype))
    num_experts, top_k = len(module.down_proj), index_NK.shape[-1]
    pairs = index_NK.flatten().argsort(stable=True)  # of token and choice, expert by expert
    counts = torch.bincount(index_NK.flatten(), minlength=num_experts).tolist()
    # An index beyond the last expert means no expert of this module.
    for expert, pairs_n in enumerate(pairs.split(counts)[:num_experts]):
        if len(pairs_n):
            token_n, weight_n1 = pairs_n // top_k, weights_NK.flatten()[pairs_n][:, None]
            before_nD, inner_nF, output_nH = _one_expert(module, transposed, expert, hidden_NH[token_n])
            output_nH = output_nH * weight_n1
            total_NH.index_add_(0, token_n, output_nH.to(total_NH.dtype))
            if observer is not None:
                observer(expert, RoutedActivations(token_n, weight_n1, before_nD, inner_nF, output_nH))
    return total_NH.to(hidden_NH.dtype)


def _sorted_experts(module: Any, transposed: bool, observer: Observer, hidden: Tensor) -> Tensor:
    """Outputs of all experts for all tokens, which the router scaled beforehand: [E * N, H] → [E * N, H]."""
    outputs = []
    for expert, hidden_NH in enumerate(hidden.chunk(len(module.down_proj))):
        before_ND, inner_NF, output_NH = _one_expert(module, transposed, expert, hidden_NH)
        token_N = torch.arange(len(hidden_NH), device=hidden.device)
        observer(
            expert, RoutedActivations(token_N, hidden_NH.new_ones(len(hidden_NH), 1), before_ND, inner_NF, output_NH)
        )
        outputs.append(output_NH)
    return torch.cat(outputs)


def _one_expert(module: Any, transposed: bool, expert: int, x_nH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input of an expert's nonlinearity [n, D], of its down projection [n, F], and its output [n, H].

    The output is normalised if the module normalises it.
    """
    transposed = getattr(module, "is_transposed", transposed)
    gated = hasattr(module, "gate_up_proj")

    def project(name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        return nn.functional.linear(x, weight.T if transposed else weight, None if bias is None else bias[expert])

    before_nD = project("gate_up_proj" if gated else "up_proj", x_nH)
    if not gated:
        inner_nF = module.act_fn(before_nD)
    elif (apply_gate := gate_function(module)) is not None:
        inner_nF = apply_gate(before_nD)
    else:
        gate_nF, up_nF = before_nD.chunk(2, dim=-1)
        inner_nF = module.act_fn(gate_nF) * up_nF
    output_nH = project("down_proj", inner_nF)
    if hasattr(module, "post_expert_norm"):
        output_nH = module.post_expert_norm(output_nH)
    return before_nD, inner_nF, output_nH


def _require_same(module: nn.Module, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape or not bool((theirs - ours).norm() <= _SAME * theirs.norm()):
        raise UnsupportedModelError(
            f"The experts of {type(module).__name__} do not compute what their weights suggest, so they cannot be "
            "scored. Leave their sizes as they are, and score with metric='random'; please report it."
        )
