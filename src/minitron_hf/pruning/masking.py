"""Masks the dropped units of a teacher, so that it computes what its student computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import PlanError, UnsupportedModelError
from ..families import ArchSpec, named_tensors, spec_for
from ..families.axes import CHANNELS, Dimension, dimension_axes
from ..sizes.student import NORM_EPSILONS
from .plan import PruningPlan
from .unit_masks import dimension_mask, unit_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


EXPERTS: Dimension = (("experts",),)


@contextmanager
def masked_units(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Mask in a teacher the units and layers that a plan drops, for the duration of the context.

    Args:
        model: the teacher.
        plan: made for it.

    Raises:
        UnsupportedModelError: on leaving, if scores of experts were to be masked and none were seen.
    """
    masking = Masking(model, plan)
    with ExitStack() as stack:
        for dropped in plan.layers_dropped:
            module = masking.modules[f"{masking.spec.layers_path}.{dropped}"]
            stack.callback(module.register_forward_hook(_pass_through, with_kwargs=True).remove)
        _mask_embeddings(model, plan, stack)
        swapped: dict[int, dict[str, Tensor]] = {layer: {} for layer in plan.layers_kept}
        routers: list[tuple[Tensor, Tensor]] = []
        for name, (pattern, layer) in masking.located.items():
            masking.scale_output(name, pattern, stack)
            if layer is not None and layer not in plan.layers_dropped:
                masking.mask_inputs(name, pattern, layer, stack)
                routers += masking.mask_tensor(name, pattern, layer, swapped[layer])
        masking.restrict_norms(stack)
        swap_tensors("", masking.modules, masking.mask_projectors(), stack)
        for kept, replacements in swapped.items():
            swap_tensors(f"{masking.spec.layers_path}.{kept}", masking.modules, replacements, stack)
        with excluding_experts(model, routers, "verify"):
            yield


@contextmanager
def excluding_experts(model: PreTrainedModel, routers: list[tuple[Tensor, Tensor]], setting: str) -> Iterator[None]:
    """Give dropped experts no token, for the duration of the context.

    Args:
        model: the teacher.
        routers: weight of every router, and True for its dropped experts.
        setting: what needs this, for the message.

    Raises:
        UnsupportedModelError: on leaving, if scores of experts were to be masked and none were seen.
    """
    with _ExcludeExperts(routers) as mode:
        yield
    if mode.unseen:
        raise UnsupportedModelError(
            f"{len(mode.unseen)} of {len(routers)} routers of this {type(model).__name__} compute scores in a way "
            f"that cannot be masked. Prune without {setting}."
        )


class Masking:
    """The tensors and modules of a teacher, and what a plan keeps of them."""

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.plan, self.spec = plan, spec_for(model.config)
        self.sizes = {layer: self.spec.sizes(model.config, layer) for layer in (None, *plan.layers_kept)}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = named_tensors(model, tied=True)
        #: Name of a tensor → its pattern in the table, and its layer.
        self.located = {name: found for name in self.tensors if (found := self.spec.locate(name)) is not None}
        self.kept = {layer: plan.kept_in(layer) for layer in (None, *plan.layers_kept)}
        # Stock classes multiply by powers of the hidden size, which differs between student and teacher.
        ratio = plan.sizes["hidden"]["student"] / plan.sizes["hidden"]["teacher"]
        self.scales = dict(plan.scales)
        for name, power in self.spec.stream.hidden_powers:
            self.scales[name] = self.scales.get(name, 1.0) * ratio**power

    def _hooked_axes(self, module: str) -> set[str]:
        """Axes whose units are the inputs of a module."""
        return {axis for axis, point in (*self.spec.hook_points.items(), *self.spec.readers) if point == module}

    def scale_output(self, name: str, pattern: str, stack: ExitStack) -> None:
        """Scale what a weight and its bias contribute, as the plan scales them in the student."""
        if pattern.endswith(".weight"):
            module = pattern.removesuffix(".weight")
            of_weight, of_bias = (self.scales.get(f"{module}.{part}", 1.0) for part in ("weight", "bias"))
            _scale_output(self.modules[name.removesuffix(".weight")], of_weight, of_bias, stack)

    def mask_inputs(self, name: str, pattern: str, layer: int, stack: ExitStack) -> None:
        """Zero the dropped units that a weight reads."""
        if not pattern.endswith(".weight"):
            return
        hooked = self._hooked_axes(pattern.removesuffix(".weight"))
        units = hooked | {inner for inner, outer in self.spec.groups if outer in hooked}
        for dimension in self.spec.dimensions[pattern]:
            mask = dimension_mask(dimension, self.spec, self.sizes[layer], self.kept[layer])
            if mask is not None and dimension_axes(dimension) & units:
                module = self.modules[name.removesuffix(".weight")]
                stack.callback(module.register_forward_pre_hook(_mask_input(mask)).remove)

    def mask_tensor(
        self, name: str, pattern: str, layer: int, replacements: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Replace a tensor whose dropped units no hook can mask.

        Args:
            name: of the tensor.
            pattern: in the table.
            layer: of the tensor.
            replacements: name → tensor to compute with instead; added to.

        Returns:
            The tensor and its dropped experts, bool [experts], if it is the weight of a router; else nothing.
        """
        tensor, dimensions, kept = self.tensors[name], self.spec.dimensions[pattern], self.kept[layer]
        if self.is_of_router(pattern, layer):
            return self.mask_router(name, pattern, layer, replacements)
        if not pattern.endswith((".weight", ".bias")):
            changed = _masked_experts(tensor, dimensions, self.spec, self.sizes[layer], kept)
            if pattern in self.scales:
                changed = (tensor if changed is None else changed) * self.scales[pattern]
            if changed is not None:
                replacements[name] = changed
        return []

    def is_of_router(self, pattern: str, layer: int) -> bool:
        """Whether a tensor has one row or number for every expert, some of which are dropped, and holds no experts."""
        if "experts" not in self.kept[layer] or self.spec.dimensions[pattern][:1] != (EXPERTS,):
            return False
        return "experts" not in self._hooked_axes(pattern.rpartition(".")[0])

    def mask_router(
        self, name: str, pattern: str, layer: int, replacements: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """As `mask_tensor`, for a tensor of a router."""
        dropped = ~unit_mask("experts", self.spec, self.sizes[layer], self.kept[layer])
        if len(self.spec.dimensions[pattern]) > 1:
            return [(self.tensors[name], dropped)]
        replacements[name] = _exclude_from_choice(self.tensors[name], dropped)
        return []

    def mask_projectors(self) -> dict[str, Tensor]:
        """Tensors outside the language model that know its sizes, by name, without what the plan drops."""
        replacements = {}
        for name, (pattern, layer) in self.located.items():
            dimensions = self.spec.dimensions[pattern]
            axes = {axis for dimension in dimensions for axis in dimension_axes(dimension)}
            if layer is not None or not (pattern in self.spec.input_writers or "projector" in axes):
                continue
            tensor = self.tensors[name]
            for position, dimension in enumerate(dimensions):
                mask = dimension_mask(dimension, self.spec, self.sizes[None], self.kept[None])
                if mask is not None:
                    shape = [-1 if other == position else 1 for other in range(tensor.ndim)]
                    tensor = tensor * mask.reshape(shape).to(tensor)
            if not pattern.endswith((".weight", ".bias")):  # these are scaled where their module returns
                tensor = tensor * self.scales.get(pattern, 1.0)
            replacements[name] = tensor
        return replacements

    def restrict_norms(self, stack: ExitStack) -> None:
        """Let every norm see the kept units alone."""
        for path, dimension, layer in _find_norms(self.spec, self.located, self.modules, self.plan):
            mask = dimension_mask(dimension, self.spec, self.sizes[layer], self.kept[layer])
            if mask is None:
                continue
            pattern = (self.spec.locate(f"{path}.weight") or ("",))[0].removesuffix(".weight")
            gated = self.spec.gated_norms.get(pattern)
            if gated is not None:
                _restrict_gated_norm(self.modules[path], mask, self.sizes[layer][gated], stack)
            else:
                _restrict_norm(self.modules[path], mask, _input_scale(self.plan, dimension), stack)


def _find_norms(
    spec: ArchSpec,
    located: Mapping[str, tuple[str, int | None]],
    modules: Mapping[str, nn.Module],
    plan: PruningPlan,
) -> Iterator[tuple[str, Dimension, int | None]]:
    """(path, dimension, layer) of every norm: modules with one vector that is called a weight, or with none at all."""
    found = {
        name.removesuffix(".weight"): (spec.dimensions[pattern][0], layer)
        for name, (pattern, layer) in located.items()
        if pattern.endswith(".weight") and len(spec.dimensions[pattern]) == 1
    }
    for kept in plan.layers_kept:
        for norm in spec.layer_norms:
            path = spec.layer_parameter(kept, norm)
            if not isinstance(modules.get(path), nn.Identity):  # in place of a norm that a layer lacks
                found.setdefault(path, (CHANNELS, kept))
    found.setdefault(spec.final_norm, (CHANNELS, None))
    for path, (dimension, layer) in found.items():
        if path in modules and dimension != EXPERTS and layer in (None, *plan.layers_kept):
            yield path, dimension, layer


def _pass_through(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's output replaced by its input."""
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _mask_input(mask: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask.to(args[0].device), *args[1:])

    return hook


def _mask_embeddings(model: PreTrainedModel, plan: PruningPlan, stack: ExitStack) -> None:
    """Zero the dropped channels of the embeddings; scale scaled embeddings as in the student."""
    if "hidden" not in plan.kept:
        return
    spec, hidden = spec_for(model.config), plan.sizes["hidden"]
    scale = (hidden["student"] / hidden["teacher"]) ** 0.5 if spec.stream.scaled_embeddings else 1.0
    mask = dimension_mask(CHANNELS, spec, spec.sizes(model.config), plan.kept)
    assert mask is not None
    stack.callback(model.get_input_embeddings().register_forward_hook(_mask_output(mask, scale)).remove)


def _mask_output(mask: Tensor, scale: float = 1.0) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * (mask.to(output) * scale)

    return hook


def _scale_output(module: nn.Module, of_weight: float, of_bias: float, stack: ExitStack) -> None:
    """Multiply what a module's weight and its bias contribute to its output."""
    if of_weight == of_bias == 1:
        return

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        return output * of_weight if bias is None else (output - bias) * of_weight + bias * of_bias

    stack.callback(module.register_forward_hook(hook).remove)


def _input_scale(plan: PruningPlan, dimension: Dimension) -> float:
    """Factor on a norm's input by which its eps acts as the student's.

    x/√(a²·mean x² + eps) ∝ x/√(mean x² + eps/a²).
    """
    teacher, student = (dict(one).get("text_config", one) for one in (plan.teacher["config"], plan.student["config"]))
    for name in NORM_EPSILONS:
        before, after = teacher.get(name), student.get(name)
        if dimension == CHANNELS and before and after and before != after:
            return float((before / after) ** 0.5)
    return 1.0


def _restrict_norm(module: nn.Module, mask: Tensor, scale: float, stack: ExitStack) -> None:
    """Let a norm see the kept units alone.

    Dropped positions are filled with values of the same mean and mean square as the kept ones. So the norm's
    statistics over all positions equal those over the kept ones, whatever its kind, eps or offset.
    """
    dropped = int((~mask).sum())
    spread = torch.zeros(len(mask), dtype=torch.float64)
    if dropped > 1:
        values = torch.linspace(-1, 1, dropped, dtype=torch.float64)
        spread[~mask] = values / values.pow(2).mean().sqrt()

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        weight = mask.to(x)
        mean = (x * weight).sum(-1, keepdim=True) / weight.sum()
        square = (x.square() * weight).sum(-1, keepdim=True) / weight.sum()
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        fill = mean + deviation * spread.to(x) if dropped > 1 else square.sqrt()
        return ((torch.where(mask.to(x.device), x, fill) * scale).to(args[0].dtype), *args[1:])

    if dropped == 1 and subtracts_mean(module, len(mask)):
        raise PlanError("A single dropped channel of a LayerNorm cannot be verified. Drop two, or none.")
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(_mask_output(mask)).remove)


def _restrict_gated_norm(module: nn.Module, mask: Tensor, groups: int, stack: ExitStack) -> None:
    """Let a root mean square norm with a gate, in every group of its channels, see the kept ones alone."""
    one = 1.2784645427610738  # x · sigmoid(x) = 1: such a gate changes nothing

    def normed(gate: float) -> Tensor:
        ones = torch.ones(1, 1, len(mask)).to(module.get_parameter("weight"))
        output: Tensor = module(ones, ones * gate)
        return output

    gate_first = torch.allclose(normed(one), normed(2 * one), rtol=1e-2)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, gate = (arg.to(torch.promote_types(arg.dtype, torch.float32)) for arg in args)
        seen = (x * nn.functional.silu(gate) if gate_first else x) * mask.to(x)
        squares = seen.square().unflatten(-1, (groups, -1)).sum(-1)
        fill = (squares / mask.to(x).unflatten(-1, (groups, -1)).sum(-1)).sqrt()
        fill = fill.repeat_interleave(len(mask) // groups, -1)
        kept = mask.to(x.device)
        return torch.where(kept, x, fill).to(args[0].dtype), gate.masked_fill(~kept, one).to(args[1].dtype)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(_mask_output(mask)).remove)


def subtracts_mean(module: nn.Module, length: int) -> bool:
    """Whether a norm's output for a constant is its output for zero."""
    parameter = next(module.parameters(), torch.zeros(0))
    constant = torch.ones(1, 1, length, dtype=parameter.dtype, device=parameter.device)
    return bool(torch.allclose(module(constant), module(0 * constant), atol=1e-3))


def _masked_experts(
    tensor: Tensor,
    dimensions: tuple[Dimension, ...],
    spec: ArchSpec,
    sizes: Mapping[str, int],
    kept: Mapping[str, np.ndarray],
) -> Tensor | None:
    """Stacked weights with dropped neurons at zero in every expert, where they are a dimension of their own.

    A fused gate and up projection stays as it is: its order is under test, and units that nothing reads need no mask.
    """
    for position, dimension in enumerate(dimensions):
        for axis in dimension_axes(dimension) & kept.keys():
            outer = ((spec.axis[axis].within,),)
            if dimension == ((axis,),) and outer in dimensions:
                units = unit_mask(axis, spec, sizes, kept)
                shape = [length if part in (outer, dimension) else 1 for part, length in zip(dimensions, tensor.shape)]
                return tensor * (units if dimensions.index(outer) < position else units.T).reshape(shape).to(tensor)
    return None


def _exclude_from_choice(bias: Tensor, dropped: Tensor) -> Tensor:
    """A router's bias with a very low value for dropped experts, so that they are never chosen."""
    return bias.masked_fill(dropped.to(bias.device), torch.finfo(bias.dtype).min / 2)


def swap_tensors(
    layer: str, modules: Mapping[str, nn.Module], replacements: Mapping[str, Tensor], stack: ExitStack
) -> None:
    """Let a layer compute with other tensors, which replace its own only while it runs."""
    if not replacements:
        return
    kept: dict[str, Tensor] = {}

    def place_of(name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return modules[path], leaf

    def before(_: nn.Module, __: Any) -> None:
        for name, tensor in replacements.items():
            module, leaf = place_of(name)
            kept[name] = getattr(module, leaf)
            setattr(module, leaf, nn.Parameter(tensor, False) if isinstance(kept[name], nn.Parameter) else tensor)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        for name, tensor in kept.items():
            setattr(*place_of(name), tensor)
        kept.clear()

    stack.callback(modules[layer].register_forward_pre_hook(before).remove)
    stack.callback(modules[layer].register_forward_hook(after, always_call=True).remove)


class _ExcludeExperts(TorchFunctionMode):
    """Give dropped experts the score −∞: whatever is computed from a router's weight with one value per expert.

    Casts and transposes of the weight are followed, so that the order of its rows is the only thing relied on.
    """

    def __init__(self, routers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.dropped = {id(weight): (weight, dropped) for weight, dropped in routers}
        self.unseen = set(self.dropped)
        self.origin = {key: key for key in self.dropped}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        tensors = [given for given in (*args, *(kwargs or {}).values()) if isinstance(given, Tensor)]
        for argument in tensors if isinstance(output, Tensor) else ():
            if id(argument) in self.dropped:
                dropped = self.dropped[id(argument)][1]
                if len(tensors) == 1:  # a cast or a transpose; with another tensor, the scores of tokens
                    self.dropped[id(output)] = (output, dropped)
                    self.origin[id(output)] = self.origin[id(argument)]
                elif output.shape[-1:] == dropped.shape:
                    self.unseen.discard(self.origin[id(argument)])
                    output = output.masked_fill(dropped.to(output.device), -torch.inf)
        return output
