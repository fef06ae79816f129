"""`minitron-hf distill`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..errors import DataError
from .options import Accelerate, Output, Processes, Settings, _corpus, _load, _require_own, _settings
from .output import current, wrote

EvalData = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Held-out corpus: file, saved dataset, Hub id or teacher cache."),
]
TrainImages = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Corpus with the images of a teacher cache that is --train-data."),
]
EvalImages = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Corpus with the images of a teacher cache that is --eval-data."),
]


def distill(
    student: Annotated[str, typer.Argument(help="Folder or Hub id of the pruned student.")],
    train_data: Annotated[str, typer.Option(help="Corpus: file, saved dataset, Hub id or teacher cache.")],
    output: Output,
    teacher: Annotated[Optional[str], typer.Option(help="Hub id or folder; not needed with a teacher cache.")] = None,  # noqa: UP045
    eval_data: EvalData = None,
    train_images: TrainImages = None,
    eval_images: EvalImages = None,
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    eval_split: Annotated[str, typer.Option(help="Split of the held-out corpus.")] = "train",
    accelerate: Accelerate = None,
    num_processes: Processes = None,
    set_: Settings = None,
) -> None:
    """Train the student to predict like the teacher (DistillationTrainer); --set takes its arguments.

    Resumes from the last checkpoint in the output folder.
    """
    from ..locks import is_main_process
    from ..recipe.launching import launch
    from ..recipe.run import UNFINISHED_DIR
    from ..recipe.settings import distillation_config, distillation_hints

    if accelerate is None and num_processes is not None:
        raise DataError("--num-processes needs --accelerate NAME, such as ddp.")
    settings = _settings(set_, distillation_hints(), "fields of DistillationConfig")
    if eval_data is None:
        settings["eval_strategy"] = "no"
        if eval_images is not None:
            raise DataError("--eval-images names the images of --eval-data, which is missing.")
    checked = distillation_config(output, settings, "--set ")
    _require_own(output, ("checkpoint-*", UNFINISHED_DIR, "distillation.json", "runs"))
    if accelerate is not None:
        options = {"--train-data": train_data, "--output": str(output), "--teacher": teacher}
        options |= {"--eval-data": eval_data, "--split": split, "--eval-split": eval_split}
        options |= {"--train-images": train_images, "--eval-images": eval_images}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [*(f"--set={entry}" for entry in set_ or []), *([] if current().shows_progress else ["--quiet"])]
        launch(["distill", *given, "--", student], accelerate, num_processes)
        return
    from ..distillation.checks import refuse_pair
    from ..distillation.cut_vocabulary import kept_tokens
    from ..models import load_config
    from ..recipe.environment import check_reporters
    from ..recipe.training import distill as run_distillation
    from ..recipe.training import with_defaults

    check_reporters([checked], "--set ")
    column, named = checked.dataset_text_field, "--set dataset_text_field=NAME"
    corpora = [_corpus(train_data, split, column, "--train-data", images=train_images, named_with=named), None]
    if eval_data is not None:
        corpora[1] = _corpus(eval_data, eval_split, column, "--eval-data", images=eval_images, named_with=named)
    rows = [getattr(corpus, "dataset", corpus) for corpus in corpora]  # of teacher caches
    if teacher is not None:
        configs = load_config(student), load_config(teacher)
        refuse_pair(student, teacher, *configs, None, maps_tokens=kept_tokens(student, (), *configs) is not None)
    model, reader = _load(student, *rows, dtype="float32")
    run_distillation(model, teacher, output, reader, with_defaults(settings, rows[0]), *corpora)
    if is_main_process():
        wrote(output)
