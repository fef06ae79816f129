"""Runs some layers of a model alone, from states that were kept of the layers before them.

For each batch the model is called with the layers before left out, and it ends before the next layer. So what is
beside the layers (embeddings, masks, positions) is computed by the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..families import spec_for
from ..scoring.hooks import first_input, replaced_forwards, with_first_input
from .repair_gaps import stream_output
from .repair_sums import AllObserved, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..scoring.batches import Batches

#: Tokens of the pass that tests whether a model can be run layer by layer, and the relative error that is allowed:
#: parallel sums of a device may differ from run to run.
NUM_TESTED, TOLERANCE = 8, 1e-2


class LayerRuns:
    """Runs consecutive layers of a model.

    Args:
        model: any model of a supported family.
        advice: what to do if its layers cannot run alone, for the error.

    Attributes:
        blocks: its layers.
    """

    def __init__(self, model: PreTrainedModel, advice: str) -> None:
        self.model, self.advice = model, advice
        self.blocks: list[Any] = list(model.get_submodule(spec_for(model.config).layers_path).children())
        #: Layer → the number of its outputs; None where it returns a tensor.
        self._num_outputs: dict[int, int | None] = {}

    def note_outputs(self, stack: ExitStack) -> None:
        """Note in a forward pass how many outputs every layer has, which `leaving_out` needs."""

        def hook_of(layer: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                self._num_outputs[layer] = len(output) if isinstance(output, tuple) else None

            return hook

        for layer, block in enumerate(self.blocks):
            stack.callback(block.register_forward_hook(hook_of(layer)).remove)

    @contextmanager
    def leaving_out(self, stop: int) -> Iterator[None]:
        """Let the layers before `stop` return their input."""
        with replaced_forwards([(self.blocks[layer], _left_out(self._num_outputs[layer])) for layer in range(stop)]):
            yield

    def start_from(self, layer: int, state: Tensor, stack: ExitStack) -> None:
        """Replace the input of a layer."""

        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            return with_first_input(args, kwargs, state)

        stack.callback(self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def end_before(self, stop: int, stack: ExitStack, *, is_last: bool = True) -> list[Tensor]:
        """Keep the input of a layer, or the output of the last one.

        Args:
            stop: index of the layer; the number of layers for the output of the last one.
            stack: removes the hooks.
            is_last: whether the pass ends there.

        Returns:
            A list that receives it.
        """
        found: list[Tensor] = []

        def keep(state: Tensor) -> None:
            found.append(state)
            if is_last:
                raise AllObserved

        if stop < len(self.blocks):

            def before(_: Any, args: Any, kwargs: Any) -> None:
                keep(first_input(args, kwargs))

            # Ahead of the hook that would read the tensors of the layer.
            handle = self.blocks[stop].register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        else:
            handle = self.blocks[-1].register_forward_hook(lambda _, __, output: keep(stream_output(output)))
        stack.callback(handle.remove)
        return found

    def require_alone(self, layer: int, stop: int, entry: Tensor | None, expected: Tensor, watch: Batches) -> Tensor:
        """Refuse a model whose layers compute something else when the layers before them are left out (`leaving_out`).

        Args:
            layer: the first of them.
            stop: index of the layer after them.
            entry: input of the first one, of the few tokens of `tested_batch`; None: the embeddings.
            expected: what the last one returns in a whole pass.
            watch: sees the batch.

        Returns:
            What the last one returned.
        """
        with ExitStack() as stack:
            if entry is not None:
                self.start_from(layer, entry, stack)
            reached = self.end_before(stop, stack)
            try:
                forward(self.model, watch, tested_batch())
            except Exception as error:
                raise self._refusal(layer) from error
        if not bool((reached[0] - expected).cpu().double().norm() <= TOLERANCE * expected.cpu().double().norm()):
            raise self._refusal(layer)
        return reached[0]

    def _refusal(self, layer: int) -> UnsupportedModelError:
        """The error for a layer that cannot run alone."""
        return UnsupportedModelError(
            f"Layer {layer} of this {type(self.model).__name__} reads more of the layers before it than what they "
            f"return, so that they cannot run one by one. {self.advice}"
        )


def tested_batch() -> dict[str, Tensor]:
    """The few tokens of the test."""
    return {"input_ids": torch.arange(NUM_TESTED)[None]}


def _left_out(num_outputs: int | None) -> Callable[..., Any]:
    """A forward method that returns its input, as one of so many outputs."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = first_input(args, kwargs)
        return given if num_outputs is None else (given, *[None] * (num_outputs - 1))

    return forward
