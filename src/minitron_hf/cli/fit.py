"""`minitron-hf fit`: memory and speed of distilling a student on some devices, from configs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import DataError
from .options import Settings, SizeOption, _sizes
from .printing import _print_capacity
from .wording import takes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..distillation.fake_runs import Setup


def fit(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder; only its config is read.")],
    device: Annotated[
        str, typer.Option(metavar="NAME|SIZE", help="A device: h100, a100, l4, …, or its memory: 24GB.")
    ],
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Hub id or folder of the student, instead of sizes."),
    ] = None,
    hidden_size: SizeOption = None,
    intermediate_size: SizeOption = None,
    num_attention_heads: SizeOption = None,
    num_key_value_heads: SizeOption = None,
    num_hidden_layers: SizeOption = None,
    vocab_size: SizeOption = None,
    set_: Settings = None,
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    sharding: Annotated[str, typer.Option(help="ddp, fsdp2, zero2 or zero3.")] = "ddp",
    batch_size: Annotated[int, typer.Option(help="Rows on each device, per pass.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of a row, at most the context.")] = 1024,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw_8bit.")] = "adamw",
    lora_rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Train an adapter of that rank (default: all weights)."),
    ] = None,
    fake_quantization: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Train with rounded weights: int8 or int4."),
    ] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option("--freeze-embeddings", help="Train neither token embeddings nor output head.")
    ] = False,
) -> None:
    """Print the memory that distillation needs on each device, and an estimate of its speed.

    The student is a model (--student), or the sizes to prune to, as in `minitron-hf plan`.
    """
    from ..distillation.capacity import estimate_capacity
    from ..models import load_config
    from ..recipe.reading import apply_overrides
    from ..sizes.request import PrunerConfig
    from ..sizes.student import check_sizes, student_config
    from ..vocabulary.stored import stored_cut

    widths = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads)
    given = _sizes(*widths, num_hidden_layers, vocab_size)
    training = {"optimizer": optimizer, "lora_rank": lora_rank, "fake_quantization": fake_quantization}
    step = {"batch_size": batch_size, "max_length": max_length, "freeze_embeddings": freeze_embeddings}
    if student is not None and (given or set_):
        raise DataError("fit: --student and sizes exclude each other. Leave out one of them.")
    checked = _setup(device, {"devices": devices, "sharding": sharding, **step, **training})
    config = load_config(teacher)
    takes(PrunerConfig.__dataclass_fields__)
    if student is None:
        request = PrunerConfig.from_dict(apply_overrides(given, set_ or []))
        check_sizes(config, request)
        made, cuts = student_config(config, request), request.vocab_size is not None
    else:
        made, cuts = load_config(student), stored_cut(student) is not None
    _print_capacity(estimate_capacity(config, made, checked, cuts_vocabulary=cuts), device, checked)


def _setup(device: str, setup: Mapping[str, Any]) -> Setup:
    """The setup of a device, given by its name or the size of its memory."""
    from ..distillation.fake_runs import Setup
    from ..distillation.gpu_data_sheets import DEVICES, Device

    known = DEVICES.get(device.lower())
    if known is None:
        size = device.upper().removesuffix("GB")
        if size == device.upper() or not size.isdigit():
            raise DataError(f"--device {device}: expected a size such as 24GB, or one of {', '.join(DEVICES)}.")
        known = Device(int(size) * 1e9)
    return Setup(device=known, **setup)
