"""Runs the passes of the other stages on tensors without values, and counts the bytes of their activations.

`fake_runs` does so for distillation. Here models have one dtype, no adapter and no teacher beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
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
from .fake_runs import AllocationCounter, build_fake_model

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

    return _on_fakes(config, dtype, batch_size, max_length, run)


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

    return _on_fakes(config, dtype, batch_size, max_length, run)


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
    run: Callable[[Any, Tensor, AllocationCounter], Any],
) -> Any:
    """Call a function with a model, token ids and the counter of its allocations, all without values."""
    empty_model(config)  # refuses a config that cannot be built, with the reason
    try:
        with without_value_checks(), FakeTensorMode(allow_non_fake_inputs=True):
            model = build_fake_model(config, dtype).eval()
            tokens = torch.zeros(batch_size, max_length, dtype=torch.long)
            with AllocationCounter([*model.parameters(), *model.buffers(), tokens]) as counted:
                return run(model, tokens, counted)
    except MinitronError:
        raise
    except Exception as error:
        raise PlanError(
            f"A pass of {config.model_type} cannot be run without values, so its memory is unknown "
            f"({first_line(error)}). Measure it on a device instead."
        ) from error
