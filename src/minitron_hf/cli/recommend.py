"""`minitron-hf recommend`: recommends shapes and settings from the papers for a teacher, a target and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import DataError
from .options import Overwrite, Settings, _number, _require_free
from .printing import _print_recommendation, _say


def recommend(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder; only its config is read.")],
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
        typer.Option(help="Number of prune-and-distil rounds (default: each removes a third at most)."),
    ] = None,
    own_corpus: Annotated[
        bool, typer.Option("--own-corpus", help="The corpus is the one that the teacher was trained on.")
    ] = False,
    teacher_learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Peak learning rate of the teacher's training, for teacher correction."),
    ] = None,
    train_data: Annotated[Optional[str], typer.Option(help="The recipe's corpus.")] = None,  # noqa: UP045
    eval_data: Annotated[Optional[str], typer.Option(help="The recipe's held-out corpus.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Recipe file to write.")] = None,  # noqa: UP045
    set_: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Print what the papers recommend for this teacher, with reasons and sources.

    With --output, --train-data and --eval-data, also write a recipe; --set changes its entries.
    """
    from ..files import replacing_file
    from ..models import load_config
    from ..recipe.recommendations import recommend as decide

    if output is not None and (train_data is None or eval_data is None):
        raise DataError("A recipe needs its corpora: give --train-data and --eval-data with --output.")
    if output is None and (set_ or train_data or eval_data):
        raise DataError("--set, --train-data and --eval-data are entries of the recipe. Give its file with --output.")
    if output is not None:
        _require_free(output.parent, [output.name], overwrite)
    made = decide(
        load_config(teacher),
        _number("target", target),
        goal=goal,  # type: ignore[arg-type] # refused there if unknown
        rounds=rounds,
        own_corpus=own_corpus,
        teacher_learning_rate=teacher_learning_rate,
        **({} if tokens is None else {"tokens": _number("tokens", tokens)}),
    )
    _print_recommendation(teacher, made)
    if output is None:
        return
    recipe = made.recipe(
        teacher, train=train_data, eval=eval_data, output_dir=f"runs/{output.stem}", overrides=set_ or []
    )
    with replacing_file(output) as temporary:
        temporary.write_text(made.to_yaml(recipe), encoding="utf-8")
    _say(f"Wrote {output}")
