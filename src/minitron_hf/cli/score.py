"""`minitron-hf score` and `cache`: passes of the teacher over a corpus."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Output, Settings, _load, _texts, _with_arguments
from .printing import _say


def score(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Calibration text: file, saved dataset or Hub id.")],
    output: Output,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    set_: Settings = None,
) -> None:
    """Score heads, neurons, channels and layers on calibration text (estimate_importance)."""
    from ..recipe.reading import apply_overrides
    from ..scoring.importance import estimate_importance

    texts = _texts(data, split, text_field)
    model, tokenizer = _load(teacher)
    scores = _with_arguments(
        "estimate_importance",
        lambda: estimate_importance(model, texts, processing_class=tokenizer, **apply_overrides({}, set_ or [])),
    )
    _say(f"Wrote {scores.save_pretrained(output)}")


def cache(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Corpus: file, saved dataset or Hub id.")],
    output: Output,
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    top_k: Annotated[int, typer.Option(help="Number of tokens to store per position.")] = 64,
    set_: Settings = None,
) -> None:
    """Store the teacher's top-k logits for a corpus (cache_teacher_logits); --set takes the arguments of distill.

    Resumes what was interrupted.
    """
    from ..data import load_text_dataset
    from ..distillation.cache_writer import cache_teacher_logits
    from ..distillation.config import DistillationConfig
    from ..recipe.reading import apply_overrides
    from ..recipe.schema import DISTILL_DEFAULTS

    model, tokenizer = _load(teacher)
    settings = {**apply_overrides(dict(DISTILL_DEFAULTS), set_ or []), "eval_strategy": "no"}
    args = DistillationConfig(str(output), **settings)
    rows = load_text_dataset(data, split=split)
    _say(f"Wrote {cache_teacher_logits(model, rows, output, top_k=top_k, args=args, processing_class=tokenizer)}")
