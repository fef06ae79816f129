"""`minitron-hf score` and `cache`: passes of the teacher over a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import DataError
from .options import (
    PLAN_HELP,
    Data,
    Device,
    Output,
    Overwrite,
    Settings,
    Split,
    TextField,
    _corpus,
    _load,
    _require_own,
    _require_prepared,
    _settings,
    _texts,
)
from .output import wrote

if TYPE_CHECKING:
    from ..pruning.plan import PruningPlan


def score(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Data,
    output: Output,
    split: Split = "train",
    text_field: TextField = "text",
    device: Device = None,
    set_: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Score heads, neurons, channels and layers on calibration text (estimate_importance)."""
    from ..locks import locked_folder
    from ..recipe.settings import scoring_hints
    from ..scoring.importance import estimate_importance
    from ..scoring.scores import SCORES_NAME

    hints = scoring_hints()
    del hints["iterations"]  # needs the sizes to prune, which only a recipe has
    settings = _settings(set_, hints, "arguments of estimate_importance")
    _require_prepared(output, [SCORES_NAME], overwrite)
    with locked_folder(output):
        texts = _texts(data, split, text_field)
        model, tokenizer = _load(teacher, texts, device=device)
        scores = estimate_importance(model, texts, processing_class=tokenizer, **settings)
        path = scores.save_pretrained(output)
    wrote(path)


Server = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="URL",
        help="vLLM server that offers the teacher, such as http://localhost:8000; no weights are loaded then.",
    ),
]
ServerModel = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="The server's name of the teacher, if it offers several models."),
]


def cache(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Corpus: file, saved dataset or Hub id.")],
    output: Output,
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of most likely tokens to store per position; 64 without --num-draws."),
    ] = None,
    num_draws: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of draws from the teacher's distribution per position, instead of --top-k."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="How log-probabilities are stored: float16, float32, or packed: fixed12.")
    ] = "float16",
    server: Server = None,
    server_model: ServerModel = None,
    plan: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help=f"For a student whose vocabulary was cut. {PLAN_HELP}"),
    ] = None,
    set_: Settings = None,
) -> None:
    """Store the teacher's distributions over a corpus (cache_teacher_logits); --set takes the arguments of distill.

    The same command resumes an interrupted cache.
    """
    from ..distillation.cache_coding import DTYPES, refuse_both
    from ..distillation.cache_writer import cache_teacher_logits
    from ..distillation.server_cache import cache_served_teacher, refuse_images
    from ..distillation.teacher_cache import MANIFEST_NAME, refuse_uncacheable
    from ..recipe.rules import require_choice
    from ..recipe.settings import distillation_config, distillation_hints
    from ..recipe.training import with_defaults

    settings = _settings(set_, distillation_hints(), "fields of DistillationConfig")
    args = distillation_config(output, {**settings, "eval_strategy": "no"}, "--set ")
    require_choice(dtype, DTYPES, "--dtype")
    refuse_both(top_k, num_draws, dtype)
    refuse_uncacheable(args, num_draws=num_draws)
    _refuse_unserved(server, server_model, num_draws)
    _require_own(output, ("data-*.arrow", MANIFEST_NAME))
    rows = _corpus(
        data, split, args.dataset_text_field, "--data", cached=False, named_with="--set dataset_text_field=NAME"
    )
    args = distillation_config(output, {**with_defaults(settings, rows), "eval_strategy": "no"}, "--set ")
    made = _plan_of_tokens(plan, teacher, served=server is not None, top_k=top_k)
    stored: Any = {"top_k": top_k, "dtype": dtype, "args": args}
    if server is not None:
        refuse_images(rows)
        wrote(cache_served_teacher(server, teacher, rows, output, server_model=server_model, **stored))
        return
    model, reader = _load(teacher, rows)
    stored |= {"num_draws": num_draws, "processing_class": reader, "pruning_plan": made}
    wrote(cache_teacher_logits(model, rows, output, **stored))


def _refuse_unserved(server: str | None, server_model: str | None, num_draws: int | None) -> None:
    if server is None and server_model is not None:
        raise DataError("--server-model names a model of --server, which is missing.")
    if server is not None and num_draws is not None:
        raise DataError("--num-draws with --server: a server gives the likeliest tokens, and draws none. Use --top-k.")


def _plan_of_tokens(folder: Path | None, teacher: str, *, served: bool, top_k: int | None) -> PruningPlan | None:
    """The plan that says which tokens a student has; refuses what does not fit before the teacher is loaded."""
    from ..distillation.cut_vocabulary import tokens_of_plan
    from ..models import load_config, load_tokenizer
    from ..pruning.plan import PruningPlan

    config = load_config(teacher)
    plan = None if folder is None else PruningPlan.from_pretrained(folder)
    kept = tokens_of_plan(plan, config)
    if kept is not None and served:
        raise DataError(
            f"--server with --plan {folder}, which cuts the vocabulary: a server gives the teacher's most likely "
            "tokens, and the probability of all tokens of the student is needed. Leave out --server."
        )
    if kept is not None:
        kept.tokenizer(load_tokenizer(teacher))
    vocab_size = config.get_text_config().vocab_size if kept is None else len(kept.ids)
    if top_k is not None and top_k > vocab_size:
        raise DataError(f"--top-k {top_k}: the vocabulary has {vocab_size} tokens. Lower it.")
    return plan
