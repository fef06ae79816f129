"""Logits of one row at a time: logits [rows, tokens, vocabulary] never exist in full.

The head of a model is whatever its own code does with the output of its backbone, the module that holds the layers.

Legend of shape suffixes: B rows of a batch, T tokens of a row, V vocabulary, H hidden, n positions of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.images import TEXT_INPUTS, holds_pixels
from ..errors import UnsupportedModelError
from ..families import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BackboneOutput:
    """What the backbone of a model returned for a batch, from which logits follow row by row.

    Attributes:
        model: the model.
        inputs: its inputs: those of the text, each [B, T], and of images.
        output: what the backbone returned.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Tensor]
    output: Any

    @property
    def states_BTH(self) -> Tensor:
        """Hidden states after the final norm."""
        states: Tensor = self.output.last_hidden_state
        return states

    def logits(self, row: int, positions_n: Tensor | None = None, states_BTH: Tensor | None = None) -> Tensor:
        """Compute the logits of one row.

        Args:
            row: its index.
            positions_n: positions to compute; None: all.
            states_BTH: hidden states instead of the backbone's own, such as a leaf of another graph.

        Returns:
            [n, V], or [T, V].
        """
        states_BTH = self.states_BTH if states_BTH is None else states_BTH
        chosen_1TH = states_BTH[row : row + 1]
        if positions_n is not None:
            chosen_1TH = chosen_1TH[:, positions_n.to(chosen_1TH.device)]
        # The backbone, which alone reads images, returns what is stored.
        inputs = {name: values[row : row + 1] for name, values in self.inputs.items() if name in TEXT_INPUTS}
        with _backbone_returns(self.model, type(self.output)(last_hidden_state=chosen_1TH)):
            logits: Tensor = self.model(**inputs, use_cache=False).logits[0]
        return logits


def run_backbone(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> BackboneOutput:
    """Run a model without its head.

    Args:
        model: a causal language model of a known family.
        inputs: `input_ids` and whatever else it takes.

    Raises:
        UnsupportedModelError: if the family is unknown, or the model does not call the module that holds its layers.
    """
    seen: list[Any] = []
    backbone = _backbone(model)
    handle = backbone.register_forward_hook(lambda _, __, output: seen.append(output))
    base: Any = model.base_model
    try:
        if base is not model:
            base(**inputs, use_cache=False)
        elif holds_pixels(inputs):
            _run_whole(model, inputs)
        else:
            backbone(**inputs, use_cache=False)
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedModelError(
            f"This {type(model).__name__} did not call the module that holds its layers, so its logits cannot be "
            "computed row by row; please report it."
        )
    return BackboneOutput(model, inputs, seen[-1])


def _run_whole(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Run a model whose images are read by no part of it but the whole, with as few logits as its class can give."""
    forward = type(model).forward  # the instance's own may be replaced by one that calls this
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    forward(model, **inputs, **least, use_cache=False)


def _backbone(model: PreTrainedModel) -> Any:
    """The module that holds the layers and the final norm.

    Raises:
        UnsupportedModelError: if the family is unknown, or the model is wrapped.
    """
    path = spec_for(model.config).layers_path.rpartition(".")[0]
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(
            f"This {type(model).__name__} has no {path}, which should hold its layers."
        ) from None


@contextmanager
def _backbone_returns(model: PreTrainedModel, output: Any) -> Iterator[None]:
    """Let the backbone return a stored output for the duration of the context, whatever it is called with."""
    backbone = _backbone(model)
    own = backbone.__dict__.get("forward")
    backbone.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del backbone.forward
        else:  # Accelerate's, which fetches offloaded weights
            backbone.forward = own
