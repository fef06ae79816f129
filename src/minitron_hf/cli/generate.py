"""`minitron-hf generate`: training text that the teacher writes itself."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .options import Device, Output, Settings, Split, TextField, _corpus, _load, _settings
from .output import given, wrote


def generate(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    output: Output,
    prompts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Dataset with prompts (default: the teacher's own begin-of-text token)."),
    ] = None,
    num_rows: Annotated[Optional[int], typer.Option(help="Rows to generate (default: one for every prompt).")] = None,  # noqa: UP045
    split: Split = "train",
    text_field: TextField = "text",
    device: Device = None,
    set_: Settings = None,
) -> None:
    """Let the teacher write training text (generate_corpus): a dataset folder for distillation.

    Resumes what was interrupted.
    """
    from ..formats import read_artefact
    from ..generation.corpus import RECORD_NAME, generate_corpus
    from ..recipe.rules import hints_of

    own = ("teacher", "prompts", "output_dir", "processing_class", "num_rows", "text_field", "prompts_name")
    settings = _settings(set_, hints_of(generate_corpus, without=own), "arguments of generate_corpus")
    rows = None if prompts is None else _corpus(prompts, split, text_field, "--prompts", cached=False)
    model, tokenizer = _load(teacher, device=device)
    folder = generate_corpus(
        model,
        rows,
        output,
        processing_class=tokenizer,
        num_rows=num_rows,
        text_field=text_field,
        prompts_name=prompts,
        **settings,
    )
    record = read_artefact(folder / RECORD_NAME)
    ended = record["num_finished"] / record["num_rows"]
    given("record", record)
    counts = f"{record['num_rows']:,} rows, {record['num_new_tokens']:,} new tokens"
    wrote(folder, f": {counts}; {ended:.0%} of the rows ended before the limit")
