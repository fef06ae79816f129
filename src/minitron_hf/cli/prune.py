"""`minitron-hf prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import DataError
from ..files import refuse_own_folder, replacing_folder, require_empty
from .options import PLAN_HELP, Device, Output, Settings, Split, TextField, _load, _settings, _texts
from .output import given, say, wrote
from .wording import worded

#: Arguments of `repaired_weights` that are no settings.
OWN = ("model", "plan", "data", "processing_class", "show_progress")


def prune(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    plan: Annotated[Path, typer.Option(help=PLAN_HELP)],
    output: Output,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the student with the masked teacher; loads both into memory.")
    ] = False,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Calibration text for a plan with repair: file, saved dataset or Hub id."),
    ] = None,
    split: Split = "train",
    text_field: TextField = "text",
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole teacher; a repair takes half as long.")
    ] = False,
    device: Device = None,
    set_: Settings = None,
) -> None:
    """Build the student from the teacher's checkpoint and a plan (prune_checkpoint), a few rows at a time.

    A repair runs the teacher layer by layer; a sequential one needs --in-memory. With --verify or --in-memory, or
    without safetensors, the teacher is loaded as a whole (prune_with_plan). --set takes num_rows, max_length, packing,
    batch_size and memory_limit of a repair.
    """
    from ..models import load_config, stored_dtype
    from ..pruning.plan import PruningPlan
    from ..pruning.prune import prune_with_plan
    from ..pruning.repair import repaired_weights
    from ..pruning.stored_checkpoint import is_streamable
    from ..pruning.streaming import prune_checkpoint
    from ..pruning.surgery import require_architecture
    from ..pruning.tokenizers import prune_tokenizer
    from ..recipe.rules import hints_of
    from ..saving import in_stored_dtype, save_model

    settings = _settings(set_, hints_of(repaired_weights, without=OWN), "arguments of repaired_weights")
    made, in_memory = PruningPlan.from_pretrained(plan), verify or in_memory
    _require_data(made.repair, plan, data, set_)
    refuse_own_folder(output, teacher=teacher)
    require_empty(output)
    require_architecture(load_config(teacher), made)  # before its tokenizer and the text
    texts = None if data is None else _texts(data, split, text_field)
    if is_streamable(teacher) and not in_memory:
        prune_checkpoint(teacher, output, made, data=texts, device=device, **settings)
        noted = PruningPlan.from_pretrained(output)
    else:
        if not in_memory:
            say(f"{teacher} holds no safetensors, so all of it is loaded into memory.")
        model, tokenizer = _load(teacher, texts, device=device)
        settings |= {"processing_class": tokenizer, "show_progress": True}
        student: Any = prune_with_plan(model, made, texts, verify=verify, **settings)
        noted = student.pruning_plan
        stored = in_stored_dtype(student, stored_dtype(load_config(teacher)))
        with replacing_folder(output) as folder:
            save_model(stored, folder, prune_tokenizer(tokenizer, made) if made.vocabulary else tokenizer)
            noted.save_pretrained(folder)
    if (notes := [worded(note) for note in noted.notes[len(made.notes) :]]) and not given("notes", notes):
        say("\n".join(notes))
    wrote(output)


def _require_data(repair: str | None, plan: Path, data: str | None, settings: list[str] | None) -> None:
    """Refuse a repair without calibration text, and the reverse."""
    if repair and data is None:
        raise DataError(f"The plan in {plan} has the repair {repair!r}, which needs calibration text. Give --data.")
    if (data or settings) and not repair:
        raise DataError(
            f"The plan in {plan} has no repair, so --data and --set have no effect. Plan with "
            "`minitron-hf plan --set repair=…`."
        )
