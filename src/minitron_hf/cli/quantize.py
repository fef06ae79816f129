"""`minitron-hf quantize`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .options import Device, Output
from .output import given, wrote


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a finished student, or of any other model.")],
    output: Output,
    method: Annotated[str, typer.Option(help="int8, int4 (torchao), bnb_int8 or bnb_nf4 (bitsandbytes).")] = "int8",
    group_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Inputs that share a scale in int4: 128, 64 or 32 (default: the largest that fits)."),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")] = None,  # noqa: UP045
    device: Device = None,
) -> None:
    """Quantise the weights of a model (quantize_checkpoint); stock Transformers loads what is written.

    Measure it beside its original: minitron-hf evaluate student=FOLDER int8=OUTPUT --data TEXT -o FOLDER2
    """
    from ..evaluation.speed import checkpoint_bytes
    from ..publishing.markdown import byte_size
    from ..quantization import quantize_checkpoint

    folder = quantize_checkpoint(model, output, method, group_size=group_size, revision=revision, device=device)
    size = checkpoint_bytes(folder)
    given("checkpoint_bytes", size)
    wrote(folder, f" ({byte_size(size or 0)})")
