"""Checks that a run can read its corpora with images: models, processor, settings, and the first rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..data import token_rows
from ..data.context import context_length
from ..data.images import require_image_model
from ..distillation.inputs import refuse_image_settings
from ..distillation.server_cache import refuse_images
from ..errors import DataError, MinitronError
from ..scoring.calibration import default_max_length
from .run import processor_of

if TYPE_CHECKING:
    from ..distillation.config import DistillationConfig
    from .run import Run


def check_images(
    run: Run,
    rows: Sequence[Any],
    source: str,
    text_field: str,
    where: str,
    arguments: Collection[DistillationConfig],
) -> None:
    """Check the first rows of a corpus with images.

    Args:
        run: the run.
        rows: the first rows.
        source: where they come from.
        text_field: column that holds a text.
        where: where the corpus stands in the recipe.
        arguments: of the distillation that reads it; none for calibration data.

    Raises:
        MinitronError: naming the setting or the row that the run would refuse.
    """
    try:
        _check(run, rows, text_field, where, arguments)
    except MinitronError as error:
        raise type(error)(f"{where}: {source}: {error}") from error


def require_images_in_training(run: Run) -> None:
    """Refuse images in the held-out rows alone.

    Raises:
        DataError: if `data.train` has none.
    """
    if run.loaded.get("images.eval") and run.loaded.get("images.train") is False:
        raise DataError("data.eval has images, data.train has none. Train on images too, or leave them out.")


def _check(
    run: Run, rows: Sequence[Any], text_field: str, where: str, arguments: Collection[DistillationConfig]
) -> None:
    recipe, default = run.recipe, default_max_length(run.teacher_config)
    require_image_model(run.teacher_config, "The teacher")
    lengths = [context_length(run.teacher_config), *(args.max_length for args in arguments)]
    if arguments:
        if recipe.teacher_cache is not None and recipe.teacher_cache.server is not None:
            refuse_images(rows)
        for settings in (recipe.distill, *(one.distill for one in recipe.rounds)):
            refuse_image_settings(settings, "distill.")
        if where.startswith("data.train") and recipe.teacher_correction is not None:
            refuse_image_settings(recipe.teacher_correction.arguments, "teacher_correction.arguments.")
    if where == "data.eval":
        lengths.append(recipe.evaluate.max_length)
    elif where == "data.calibration" or recipe.data.calibration is None:
        lengths.append(recipe.scores.get("max_length") or default)
    token_rows(
        list(rows),
        processor_of(run),
        max_length=min(length for length in lengths if length is not None),
        text_field=text_field,
        assistant_only=any(args.assistant_only_loss for args in arguments),
    )
