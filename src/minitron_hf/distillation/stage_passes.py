"""Runs the passes of the other stages on tensors without values, and counts the bytes of their activations.

`fake_runs` does so for distillation. Here is no teacher beside the model. Every pass is run once in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compat import FakeTensorMode, without_value_checks
from ..errors import MinitronError, PlanError
from ..families import spec_for
from ..losses.heads import backbone_output
from ..models import empty_model, first_line
from ..scoring.hook_points import holds_stacked_experts, norm_paths, watch_states
from ..scoring.hooks import Hooks
from .fake_runs import (
    BACKWARD,
    FORWARD,
    AllocationCounter,
    build_fake_model,
    checkpoint_activations,
    count_pass,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def forward_bytes(
    config: PretrainedConfig, dtype: torch.dtype, batch_size: int, max_length: int, *, keep_states: bool = False
) -> int:
    """Peak bytes that a forward pass without gradients and without the head adds to the weights.

    Args:
        config: the model's config.
        dtype: of its weights.
        batch_size: rows.
        max_length: tokens of each.
        keep_states: whether the inputs of all layers are kept to the end.

    Raises:
        PlanError: if the model depends on values.
        UnsupportedModelError: if Transformers cannot build it.
    """

    def run(model: Any, tokens: Tensor, counted: AllocationCounter) -> int:
        kept: list[Tensor] = []
        with torch.no_grad(), Hooks(model) as hooks:
            if keep_states:
                watch_states(spec_for(config), hooks, config.get_text_config().num_hidden_layers, kept.append)
            backbone_output(model, input_ids=tokens, use_cache=False)
        return max(counted.moments)

    return _on_fakes(config, dtype, batch_size, max_length, f"forward {keep_states}", run)


def backward_bytes(config: PretrainedConfig, dtype: torch.dtype, batch_size: int, max_length: int) -> tuple[int, int]:
    """Bytes of a forward and backward pass through frozen weights that observes what `metric="taylor"` does.

    Returns:
        Bytes that wait for the backward pass, and the peak.

    Raises:
        PlanError: if the model depends on values.
        UnsupportedModelError: if Transformers cannot build it.
    """

    def run(model: Any, tokens: Tensor, counted: AllocationCounter) -> tuple[int, int]:
        kept: list[Tensor] = []
        model.requires_grad_(False)
        with ExitStack() as stack:
            hooks = stack.enter_context(_taylor_hooks(model, config, kept))
            handle = model.get_input_embeddings().register_forward_hook(lambda _, __, x: x.requires_grad_())
            hooks.callback(handle.remove)
            states = backbone_output(model, input_ids=tokens, use_cache=False).last_hidden_state
        waiting = counted.live
        states.backward(torch.empty_like(states))
        return waiting, max(counted.moments)

    return _on_fakes(config, dtype, batch_size, max_length, "taylor", run)


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of training a model by itself, in float32 weights.

    Attributes:
        weights: of all weights, an adapter included.
        trained: number of trained parameters.
        waiting: what the forward pass keeps for the backward pass.
        backward: peak of the backward pass, with the gradients that it forms, without those of the output head.
    """

    weights: int
    trained: int
    waiting: int
    backward: int


def training_bytes(
    config: PretrainedConfig, batch_size: int, max_length: int, *, mixed: bool, checkpointing: bool, method: str
) -> TrainingBytes:
    """Count a forward and backward pass of a teacher's correction, without the loss.

    Args:
        config: the model's config.
        batch_size: rows.
        max_length: tokens of each.
        mixed: whether products are computed in bfloat16.
        checkpointing: whether activations within layers are computed anew in the backward pass.
        method: weights that are trained, as in `correct_teacher`.

    Raises:
        PlanError: if the model depends on values.
        UnsupportedModelError: if Transformers cannot build it.
    """
    from .correction import ADAPTER_RANK, train_norms_only  # the trainers of TRL take seconds to import

    def count() -> TrainingBytes:
        model = build_fake_model(config, torch.float32, ADAPTER_RANK if method == "lora" else None).train()
        if method == "norms":
            train_norms_only(model)
        if checkpointing:
            checkpoint_activations(model, with_frozen_weights=method != "full")
        moments, _ = count_pass(model, None, batch_size, max_length, mixed=mixed)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        weights = sum(parameter.numel() for parameter in model.parameters())
        return TrainingBytes(4 * weights, trained, moments[FORWARD][-1], max(moments[BACKWARD]))

    return _without_values(config, ("train", batch_size, max_length, mixed, checkpointing, method), count)


def _taylor_hooks(model: Any, config: PretrainedConfig, kept: list[Tensor]) -> Hooks:
    """Hooks that keep what `GradientPass` keeps: the inputs of observed projections, outputs of norms, and states."""
    spec, depth = spec_for(config), config.get_text_config().num_hidden_layers
    hooks = Hooks(model)
    for module in spec.hook_points.values():
        for layer in range(depth):
            path = spec.layer_parameter(layer, module)
            if not holds_stacked_experts(spec, module) and path in hooks.modules:
                hooks.on_input(path, kept.append)
    for path, _ in norm_paths(spec, hooks.modules, depth):
        hooks.on_output(path, kept.append)
    watch_states(spec, hooks, depth, kept.append)
    return hooks


def _on_fakes(
    config: PretrainedConfig,
    dtype: torch.dtype,
    batch_size: int,
    max_length: int,
    kind: str,
    run: Callable[[Any, Tensor, AllocationCounter], Any],
) -> Any:
    """Call a function with a model, token ids and the counter of its allocations, all without values."""

    def count() -> Any:
        model = build_fake_model(config, dtype).eval()
        tokens = torch.zeros(batch_size, max_length, dtype=torch.long)
        with AllocationCounter([*model.parameters(), *model.buffers(), tokens]) as counted:
            return run(model, tokens, counted)

    return _without_values(config, (kind, dtype, batch_size, max_length), count)


#: Config and settings of a pass → what was counted.
_COUNTED: dict[tuple[Any, ...], Any] = {}


def _without_values(config: PretrainedConfig, settings: tuple[Any, ...], count: Callable[[], Any]) -> Any:
    """Call a function in which tensors have no values, once for a config and settings."""
    key = (type(config).__name__, config.to_json_string(use_diff=False), *settings)
    if key in _COUNTED:
        return _COUNTED[key]
    empty_model(config)  # refuses a config that cannot be built, with the reason
    try:
        with without_value_checks(), FakeTensorMode(allow_non_fake_inputs=True):
            found = _COUNTED[key] = count()
            return found
    except MinitronError:
        raise
    except Exception as error:
        raise PlanError(
            f"A pass of {config.model_type} cannot be run without values, so its memory is unknown "
            f"({first_line(error)}). Measure it on a device instead."
        ) from error
