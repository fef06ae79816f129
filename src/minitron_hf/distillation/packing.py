"""Checks that a model keeps the documents of a packed row apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..compat import attention_implementation
from ..errors import MismatchError, UnsupportedModelError
from ..losses.heads import base_model_of
from ..models import evaluating, first_line
from ..weights import input_device
from .batches import model_inputs

#: Tokens of the two documents of the check.
LENGTHS = (5, 7)
#: Relative change of an output that is more than rounding, in full and in half precision.
TOLERANCE, HALF_PRECISION_TOLERANCE = 0.01, 0.1


def require_documents_apart(trainer: Any, **models: Any) -> None:
    """Refuse models whose packed documents attend to each other, if the trainer packs; skips sharded models.

    Args:
        trainer: with its collator.
        **models: role → model on its device, or None.

    Raises:
        UnsupportedModelError: naming the settings that work.
        MismatchError: if rows are packed for evaluation alone, where TRL (1.16) pads them and marks no documents.
    """
    args = trainer.args
    if args.eval_packing and not trainer.padding_free and args.packing_strategy != "wrapped":
        raise MismatchError(
            "eval_packing=True without packing=True: the documents of a packed row would attend to each other in "
            "evaluation. Set packing=True too, or eval_packing=False."
        )
    if trainer.padding_free and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        for role, model in models.items():
            if model is not None:
                try_packing(model, trainer.data_collator, role, trainer.accelerator.autocast)


def try_packing(
    model: Any,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    role: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Refuse a model whose packed documents attend to each other, as in some classes with some attention functions.

    The check runs the model: its output at the second of two documents must not change when the first document is
    replaced or left out.

    Args:
        model: on its device.
        collator: makes batches without padding.
        role: of the model, for messages.
        autocast: makes the context manager of the computation.

    Raises:
        UnsupportedModelError: naming the settings that work.
    """
    backbone = base_model_of(model).base_model
    vocab_size = base_model_of(model).config.get_text_config().vocab_size
    vocab_size = min(vocab_size, getattr(collator, "vocab_size", vocab_size))  # the student's, which may be smaller
    before, length = LENGTHS
    second = [token % vocab_size for token in range(20, 20 + length)]
    outputs = []
    try:
        for first in (range(3, 3 + before), range(3 + before, 3 + 2 * before), ()):
            ids = [*(token % vocab_size for token in first), *second]
            lengths = [len(first), length] if first else [length]
            inputs = model_inputs(collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}]))
            with torch.no_grad(), evaluating([model]), autocast():
                inputs = {k: v.to(input_device(model)) if torch.is_tensor(v) else v for k, v in inputs.items()}
                output = backbone(**inputs, use_cache=False)[0][0, -length:]
                is_half = output.dtype.itemsize == 2 or torch.is_autocast_enabled(output.device.type)
                outputs.append(output.float())
    except Exception as error:  # a stock class may fail in any way on arguments that it does not know
        raise UnsupportedModelError(_refusal_message(model, role, f"fails on ({first_line(error)})")) from error
    changes = [(outputs[0] - other).abs().max() / outputs[0].abs().max().clamp(min=1e-12) for other in outputs[1:]]
    if not (changes[0] < TOLERANCE and changes[1] < (HALF_PRECISION_TOLERANCE if is_half else TOLERANCE)):
        raise UnsupportedModelError(_refusal_message(model, role, "does not keep apart"))


def _refusal_message(model: Any, role: str, does: str) -> str:
    stock = base_model_of(model)
    attention = attention_implementation(stock.config)
    return (
        f"The {role}, a {type(stock).__name__} with attn_implementation={attention!r}, {does} the documents of a "
        "packed row, so what it computes would depend on how they are packed. Set packing=False (and "
        "padding_free=False), or packing_strategy='wrapped', where documents follow one another in one stream; many "
        "classes keep them apart with attn_implementation='flash_attention_2'."
    )
