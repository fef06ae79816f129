"""`minitron-hf evaluate`, `card` and `publish`: from a finished student to the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import DataError, OutputError
from .options import Output, Overwrite, Settings, Split, _corpus, _reader, _require_free, _require_own, _settings
from .output import given, say, wrote
from .printing import _print_measurement


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...", help="For example teacher=… student=…")],
    data: Annotated[str, typer.Option(help="Held-out text: file, saved dataset or Hub id.")],
    output: Output,
    split: Split = "train",
    chat_prompts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Dataset of prompts that the models answer under the chat template."),
    ] = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TASK,...", help="Benchmark tasks or presets (minitron, minitron_code, small)."),
    ] = None,
    set_: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure models on the same text, and on benchmark tasks (evaluate_models)."""
    from ..evaluation.benchmarks import BENCHMARKS_NAME, DOCUMENTS_DIR
    from ..evaluation.evaluate import EVALUATION_NAME, evaluate_models
    from ..locks import locked_folder
    from ..publishing.uploads import ADAPTER_NAME
    from ..recipe.rules import hints_of

    # The stage `evaluate` of a run would count as done, and its card would show these numbers as the run's.
    # Benchmarks alone are those of an evaluation that was stopped, and the same command goes on.
    _require_free(output, [EVALUATION_NAME], overwrite)
    beside_a_model = ("config.json", ADAPTER_NAME)
    _require_own(output, (EVALUATION_NAME, BENCHMARKS_NAME, DOCUMENTS_DIR, *beside_a_model))
    given = ("models", "dataset", "processing_class", "output_path", "chat_prompts", "tasks")
    own = (*given, "descriptions", "checkpoints", "show_progress")
    settings = _settings(set_, hints_of(evaluate_models, without=own), "arguments of evaluate_models")
    named = {name: os.path.expanduser(model) for name, _, model in (one.partition("=") for one in models)}
    if not all(named) or not all(named.values()) or len(named) < len(models):
        raise DataError(f"Expected NAME=MODEL for every model, each name once, got {' '.join(models)}.")
    column, named_with = settings.get("text_field", "text"), "--set text_field=NAME"
    rows = _corpus(data, split, column, "--data", cached=False, named_with=named_with)
    prompts = None
    if chat_prompts is not None:
        prompts = _corpus(chat_prompts, split, column, "--chat-prompts", cached=False, named_with=named_with)
    tokenizer = _reader(next(iter(named.values())), rows)
    with locked_folder(output):
        wanted = [name for name in (tasks or "").split(",") if name]
        evaluate_models(
            named,
            rows,
            processing_class=tokenizer,
            chat_prompts=prompts,
            tasks=wanted,
            output_path=output,
            **settings,
        )
        if not wanted:  # finished tasks are kept in files of their own
            (output / BENCHMARKS_NAME).unlink(missing_ok=True)  # of an earlier evaluation
    _print_measurement(output)


def card(folder: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Draw the plots, and write the report and the model card from the files of a run folder."""
    from ..locks import locked_folder
    from ..pruning.plan import PLAN_NAME
    from ..publishing.card import write_model_card
    from ..publishing.quantized_card import is_quantized_copy, write_quantized_card
    from ..publishing.uploads import require_weights

    if not folder.is_dir():
        raise OutputError(f"The folder {folder} does not exist. Give the folder of a finished run.")
    if not all((folder / name).is_file() for name in ("config.json", PLAN_NAME)):  # a card's files, without weights
        require_weights(folder)
    with locked_folder(folder):
        path = (write_quantized_card if is_quantized_copy(folder) else write_model_card)(folder)
    wrote(path)


def publish(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,  # noqa: UP045
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    tag: Annotated[Optional[str], typer.Option(help="Name for the commit, such as v1.")] = None,  # noqa: UP045
    collection: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Title of a collection that gets teacher, student and quantised copies."),
    ] = None,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Also publish the copies in the folder `quantized`.")
    ] = False,
) -> None:
    """Upload a student with plan, plots, evaluation and card to the Hub, in one commit; on request its copies, too."""
    from ..publishing.hub import push_student_to_hub

    commit = push_student_to_hub(
        folder,
        repo_id,
        private=not public,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        collection=collection,
        quantized=quantized,
    )
    url = commit.pr_url or commit.commit_url
    if not given("url", url):
        say(f"Published {url}")
