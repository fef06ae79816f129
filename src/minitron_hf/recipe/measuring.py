"""Measures for `recommend`: shapes compared on text before retraining, and the lengths of a corpus."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..data import load_text_dataset, token_rows
from ..data.documents import documents
from ..data.images import holds_images
from ..errors import DataError, PlanError
from ..evaluation.loading import load_processing_class
from ..families import spec_for
from ..models import count_parameters, load_for_compute
from ..pruning.candidates import Candidate, Divergence
from ..pruning.prune import measure_shapes
from ..scoring.calibration import default_max_length
from ..scoring.importance import estimate_importance
from ..sizes.resolve import repaired_axes
from ..sizes.shapes import Shape
from .schedules import Corpus

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Rows on which shapes are scored and repaired, rows on which they are compared, and tokens of each.
CALIBRATION_ROWS, MEASURED_ROWS, MEASURED_LENGTH = 64, 32, 512
#: Documents that are tokenised to learn the lengths of a corpus; and rows whose images are read for this.
SAMPLED_DOCUMENTS, SAMPLED_IMAGES = 500, 64


def measure_corpus(source: str, processing_class: Any, text_field: str = "text") -> Corpus:
    """Tokenise some documents of a corpus, spread over the whole of it.

    Args:
        source: local file, saved dataset folder or Hub id.
        processing_class: tokenizer, for images processor; or the path or Hub id of one.
        text_field: column with the text.

    Raises:
        DataError: if it cannot be read.
    """
    rows = load_text_dataset(source)
    return measure_documents(rows, load_processing_class(processing_class, rows), text_field)


def measure_documents(rows: Any, processing_class: Any, text_field: str = "text") -> Corpus:
    """Tokenise some documents of a dataset, spread over the whole of it, or all of a list; see `measure_corpus`.

    Raises:
        DataError: if they are all empty.
    """
    number, with_images = len(rows), holds_images(rows)
    wanted = SAMPLED_IMAGES if with_images else SAMPLED_DOCUMENTS
    sample = rows
    if not isinstance(rows, list):
        sample = rows.select(range(0, number, max(1, number // wanted)))
    if with_images:
        read = token_rows(sample, processing_class, max_length=sys.maxsize, text_field=text_field)
        return Corpus([len(row) for row in read.rows], number, holds_images=True)
    lengths = [0]
    for piece in documents(sample, processing_class, text_field):
        lengths[-1] += len(piece.ids)
        if piece.is_last:
            lengths.append(0)
    if len(lengths) == 1:
        raise DataError(f"The corpus has no text in {text_field!r}: all of its {number} documents are empty.")
    return Corpus(lengths[:-1], number)


def measure_on_text(
    teacher: str | os.PathLike[str], data: Any, processing_class: Any
) -> Callable[[list[Shape]], list[Candidate]]:
    """Return a function that compares shapes by their divergence from a teacher before retraining, repaired.

    The teacher is scored on some rows, on which the repair is fitted too, and the students are compared on others.

    Args:
        teacher: Hub id or folder.
        data: texts, token rows or a dataset.
        processing_class: tokenizer of texts, for images processor; or the path or Hub id of one.

    Returns:
        Function: shapes → measured candidates, best first.
    """

    def measure(shapes: list[Shape]) -> list[Candidate]:
        model, reader = load_for_compute(teacher), load_processing_class(processing_class, data)
        length = min(MEASURED_LENGTH, default_max_length(model.config))
        rows = token_rows(data, reader, max_length=length, num_rows=CALIBRATION_ROWS + MEASURED_ROWS)
        share = MEASURED_ROWS / (CALIBRATION_ROWS + MEASURED_ROWS)
        count = max(1, round(share * len(rows)))
        measured, calibration = rows.select(list(range(count))), rows.select(list(range(count, len(rows))))
        scores = estimate_importance(model, calibration, max_length=length, show_progress=False)
        divergence, limits = Divergence(model, measured), {"target_parameters": count_parameters(model)}
        shapes = [_repaired(model.config, shape) for shape in shapes]
        candidates, refusals = measure_shapes(model, shapes, scores, divergence, limits, calibration)
        if not candidates:
            raise PlanError(f"None of {len(shapes)} shapes can be cut: {refusals[0]}")
        return sorted(candidates, key=lambda candidate: candidate.pruned_kl_or_infinity)

    return measure


def _repaired(config: PretrainedConfig, shape: Shape) -> Shape:
    """A shape that asks for the repair, where its family knows it."""
    spec = spec_for(config)
    try:
        repaired_axes(spec, spec.sizes(config), shape.sizes)
    except PlanError:
        return shape
    return replace(shape, request=replace(shape.request, repair="least_squares"))
