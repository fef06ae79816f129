"""`minitron-hf distill`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..errors import DataError
from .options import Accelerate, Output, Processes, Settings, _corpus, _load
from .printing import _say


def distill(
    student: Annotated[str, typer.Argument(help="Folder or Hub id of the pruned student.")],
    train_data: Annotated[str, typer.Option(help="Corpus: file, saved dataset, Hub id, or a cache of the teacher.")],
    output: Output,
    teacher: Annotated[Optional[str], typer.Option(help="Hub id or folder; not needed for a cache.")] = None,  # noqa: UP045
    eval_data: Annotated[Optional[str], typer.Option(help="Held-out corpus, likewise.")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    eval_split: Annotated[str, typer.Option(help="Split of the held-out corpus.")] = "train",
    accelerate: Accelerate = None,
    num_processes: Processes = None,
    set_: Settings = None,
) -> None:
    """Train the student to predict like the teacher (DistillationTrainer); --set takes its arguments.

    Resumes from the last checkpoint in the output folder.
    """
    from ..recipe.launching import is_main_process, launch

    if accelerate is not None:
        options = {
            "--train-data": train_data,
            "--output": str(output),
            "--teacher": teacher,
            "--eval-data": eval_data,
            "--split": split,
            "--eval-split": eval_split,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [f"--set={entry}" for entry in set_ or []]
        launch(["distill", *given, "--", student], accelerate, num_processes)
        return
    if num_processes is not None:
        raise DataError("--num-processes needs --accelerate NAME, such as ddp.")
    from ..recipe.reading import apply_overrides
    from ..recipe.schema import DISTILL_DEFAULTS
    from ..recipe.training import distill as run_distillation

    model, tokenizer = _load(student, dtype="float32")
    settings = apply_overrides(dict(DISTILL_DEFAULTS), set_ or [])
    if eval_data is None:
        settings["eval_strategy"] = "no"
    run_distillation(
        model,
        teacher,
        output,
        tokenizer,
        settings,
        _corpus(train_data, split),
        None if eval_data is None else _corpus(eval_data, eval_split),
    )
    if is_main_process():
        _say(f"Wrote {output}")
