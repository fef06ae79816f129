"""`minitron-hf recommend`: recommends shapes and settings for a teacher, a target and a number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import DataError
from .options import Overwrite, Settings, _number, _require_free
from .output import say, wrote
from .printing import _print_estimate, _print_recommendation
from .wording import takes_sections

TrainData = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The recipe's corpus. A local one decides the length of the rows."),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Load the teacher, and compare shapes on --train-data before retraining.")
]


def recommend(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder. Only its config is read, unless --measure.")],
    target: Annotated[str, typer.Option(metavar="NUMBER|FRACTION", help="Parameters to keep, such as 4.5B or 0.5.")],
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NUMBER", help="Number of tokens for distillation, such as 500M (default: 94B, as in the papers)."
        ),
    ] = None,
    goal: Annotated[str, typer.Option(help="quality or latency.")] = "quality",
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of prune-and-distil rounds (default: by target and tokens)."),
    ] = None,
    own_corpus: Annotated[
        bool, typer.Option("--own-corpus", help="The corpus is the one that the teacher was trained on.")
    ] = False,
    teacher_learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Peak learning rate of the teacher's training, for teacher correction."),
    ] = None,
    train_data: TrainData = None,
    eval_data: Annotated[Optional[str], typer.Option(help="The recipe's held-out corpus.")] = None,  # noqa: UP045
    measure: Measure = False,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Recipe file to write.")] = None,  # noqa: UP045
    set_: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Print how to prune this teacher and distil the student on so many tokens, with reasons and sources.

    With --output, --train-data and --eval-data, also write a recipe; --set changes its entries.
    """
    from ..files import write_text
    from ..models import load_config
    from ..recipe.recommendations import recommend as decide
    from ..recipe.settings import section_names

    takes_sections(section_names)
    _require_corpora(output, train_data, eval_data, set_, measure)
    if output is not None:
        _require_free(output.parent, [output.name], overwrite)
    given: dict[str, Any] = {} if train_data is None else _measures(teacher, train_data, measure)
    if tokens is not None:
        given["tokens"] = _number("tokens", tokens)
    made = decide(
        load_config(teacher),
        _number("target", target),
        goal=goal,  # type: ignore[arg-type] # refused there if unknown
        rounds=rounds,
        own_corpus=own_corpus,
        teacher_learning_rate=teacher_learning_rate,
        **given,
    )
    _print_recommendation(teacher, made)
    if output is not None:
        corpora = {"train": train_data, "eval": eval_data}
        recipe = made.recipe(teacher, **corpora, output_dir=f"runs/{output.stem}", overrides=set_ or [])
        write_text(output, made.to_yaml(recipe))
        _print_costs(recipe)
        wrote(output)


def _print_costs(recipe: dict[str, Any]) -> None:
    """Print what a recipe will cost on this machine, if this machine has what it needs."""
    from ..errors import MinitronError
    from ..recipe.estimates import estimate_recipe
    from ..recipe.schema import Recipe

    try:
        _print_estimate(estimate_recipe(Recipe.from_dict(recipe)))
    except MinitronError as error:
        say(f"Note: the costs cannot be estimated here: {error}")


def _require_corpora(
    output: Path | None, train_data: str | None, eval_data: str | None, set_: list[str] | None, measure: bool
) -> None:
    """Refuse a recipe without corpora, entries of a recipe that is not written, and a measurement without text."""
    if output is not None and (train_data is None or eval_data is None):
        raise DataError("A recipe needs its corpora: give --train-data and --eval-data with --output.")
    if output is None and (set_ or eval_data):
        raise DataError("--set and --eval-data are entries of the recipe. Give its file with --output.")
    if measure and train_data is None:
        raise DataError("--measure compares shapes on text. Give it with --train-data.")


def _measures(teacher: str, train_data: str, measure: bool) -> dict[str, Any]:
    """The arguments of `recommend` that a corpus gives: its lengths if it is a local one, and how to measure on it."""
    from ..data import load_text_dataset
    from ..data.loading import local_dataset
    from ..errors import MinitronError
    from ..recipe.measuring import measure_corpus, measure_on_text

    if not measure:  # the corpus, or the tokenizer, may be on another machine
        try:
            local = local_dataset(train_data) is not None
            return {"corpus": measure_corpus(train_data, teacher)} if local else {}
        except MinitronError as error:
            say(f"Note: the lengths of the documents are not known here: {error}")
            return {}
    corpus = measure_corpus(train_data, teacher)
    return {"corpus": corpus, "measure": measure_on_text(teacher, load_text_dataset(train_data), teacher)}
