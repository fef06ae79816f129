"""`minitron-hf search`."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from ..errors import DataError
from .options import (
    Data,
    Device,
    Output,
    Scores,
    Settings,
    Split,
    TextField,
    _corpus,
    _load,
    _number,
    _require_prepared,
    _texts,
)
from .output import current, given, wrote
from .printing import _console
from .wording import takes_sections

Space = Annotated[
    list[str],
    typer.Option(metavar="SIZE=LIST", help="Sizes to try, as hidden_size=[0.5,0.75,1.0]. Repeatable."),
]
MaxParameters = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="NUMBER", help="Budget of parameters, such as 4.5B. With several budgets, a shape meets all of them."
    ),
]
MaxActive = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NUMBER", help="Budget of the parameters that one token uses, such as 3B."),
]
MaxMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NUMBER", help="Budget of bytes for weights and cache, such as 16GB."),
]
MaxSeconds = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Budget of time to decode a token on this machine."),
]
TrainData = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Corpus to distil on; without it, shapes are ranked before retraining."),
]
EvalData = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Held-out text to rank shapes on (default: the calibration text)."),
]


def search(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    scores: Scores,
    space: Space,
    data: Data,
    output: Output,
    max_parameters: MaxParameters = None,
    max_active_parameters: MaxActive = None,
    max_memory_bytes: MaxMemory = None,
    max_seconds_per_token: MaxSeconds = None,
    train_data: TrainData = None,
    eval_data: EvalData = None,
    split: Split = "train",
    text_field: TextField = "text",
    device: Device = None,
    set_: Settings = None,
) -> None:
    """Find the best shape within budgets: prune, distil briefly, keep the better half (search_architectures).

    --set takes its other arguments (num_candidates, num_rounds, num_tokens, tolerance, distillation.learning_rate, …).
    The same command resumes an interrupted search.
    """
    from ..models import load_config
    from ..publishing.plots import write_plots
    from ..recipe.reading import apply_overrides
    from ..recipe.rules import with_new_names
    from ..recipe.settings import distillation_hints, require_search, search_hints
    from ..scoring.scores import ImportanceScores
    from ..search.architectures import search_architectures
    from ..search.record import candidate_table

    takes_sections(lambda: {"": search_hints(), "distillation": distillation_hints()})
    sizes = _space(space)
    entries = apply_overrides({"distillation": {"dataset_text_field": text_field}}, set_ or [])
    require_search(settings := with_new_names(entries, "search", "--set "), "--set ")
    limits = _limits(max_parameters, max_active_parameters, max_memory_bytes)
    _require_prepared(output, (), overwrite=True)
    calibration = _texts(data, split, text_field)
    held_out = None if eval_data is None else _texts(eval_data, split, text_field, "--eval-data")
    corpus = None if train_data is None else _corpus(train_data, split, text_field, "--train-data", cached=False)
    (read := ImportanceScores.from_pretrained(scores)).require_model(load_config(teacher))  # before weights are loaded
    model, tokenizer = _load(teacher, calibration, held_out, corpus, device=device)
    found = search_architectures(
        model,
        read,
        space=sizes,
        calibration_data=calibration,
        max_seconds_per_token=max_seconds_per_token,
        train_dataset=corpus,
        eval_data=held_out,
        processing_class=tokenizer,
        output_dir=output,
        **limits,
        **{**settings, "show_progress": current().shows_progress},
    )
    if not given("candidates", found.candidates):
        _console().print(candidate_table(found.candidates))
    found.best.save_pretrained(output)
    write_plots(output)
    wrote(found.path, f". Best: {found.candidates[0].name}")


def _space(options: list[str]) -> dict[str, list[Any]]:
    """The sizes to try, by name.

    Raises:
        DataError: if an option is no list.
    """
    from ..recipe.reading import read_yaml

    sizes = {name: read_yaml(listed) for name, _, listed in (one.partition("=") for one in options)}
    if wrong := [name for name, listed in sizes.items() if not isinstance(listed, list)]:
        raise DataError(f"--space {wrong[0]}: expected a list of sizes, as --space hidden_size=[0.5,0.75,1.0].")
    return sizes


def _limits(max_parameters: str | None, max_active: str | None, max_memory: str | None) -> dict[str, Any]:
    """The budgets that are given, as numbers."""
    budgets = {
        "max_parameters": max_parameters,
        "max_active_parameters": max_active,
        "max_memory_bytes": max_memory,
    }
    return {name: _number(name, text) for name, text in budgets.items() if text is not None}
