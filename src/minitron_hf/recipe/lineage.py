"""What a run records and announces of its training corpus: its parts, their shares, and what the teacher wrote."""

from __future__ import annotations

from collections.abc import Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import MinitronError
from ..files import public_name
from .generating import expected_text, is_written
from .measuring import measure_documents
from .schedules import Corpus

if TYPE_CHECKING:
    from .run import Run

#: Documents of a stream that are read to learn their length.
STREAMED_DOCUMENTS = 64


def measured_part(run: Run, number: int) -> Corpus | None:
    """The length of one of the corpora of `data.train`; of text that is still to be written, at most.

    Returns:
        Lengths of documents, and their number, 0 of a stream; None if it cannot be read.
    """
    key = number, run.whole.recipe.data.parts[number].generated and not is_written(run)
    if key not in run.whole.measured:
        run.whole.measured[key] = _measured_part(run, *key)
    found: Corpus | None = run.whole.measured[key]
    return found


def _measured_part(run: Run, number: int, is_unwritten: bool) -> Corpus | None:
    part = run.whole.recipe.data.parts[number]
    try:
        if is_unwritten:
            expected = expected_text(run).corpus
            most = part.num_rows or expected.num_documents
            return Corpus(expected.document_lengths, min(most, expected.num_documents))
        rows = run.whole.part(number)
        if isinstance(rows, Sized):
            return measure_documents(rows, run.tokenizer, part.text_field)
        sample = list(islice(rows, STREAMED_DOCUMENTS))
        return Corpus(measure_documents(sample, run.tokenizer, part.text_field).document_lengths, 0)
    except MinitronError:
        return None


def measured_training_corpus(run: Run) -> Corpus | None:
    """The length of `data.train`, of a blend in one pass; None where it is unknown, as of streams."""
    data = run.whole.recipe.data
    parts = [measured_part(run, number) for number in range(len(data.parts))]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or data.streaming:
        return None
    if not data.is_blend:
        return known[0]
    weighted = sum(
        probability * sum(part.document_lengths) / len(part.document_lengths)
        for probability, part in zip(data.probabilities, known, strict=True)
    )
    rows = [part.num_documents / probability for probability, part in zip(data.probabilities, known, strict=True)]
    longest = max(rows) if data.stopping_strategy == "all_exhausted" else min(rows)
    return Corpus([round(weighted)], round(longest))


def longest_document(run: Run) -> int | None:
    """Tokens of the longest of some documents of `data.train`; None if one of its corpora cannot be read."""
    parts = [measured_part(run, number) for number in range(len(run.whole.recipe.data.parts))]
    lengths = [length for part in parts if part is not None for length in part.document_lengths]
    return None if None in parts else max(lengths, default=None)


def described_parts(run: Run) -> dict[str, Any] | None:
    """What `distillation.json` records of a blend, or of text that the teacher wrote; None for any other corpus.

    `probability` is the share of the rows, `token_share` the share of their tokens, estimated from some rows.
    """
    recipe = run.whole.recipe
    data = recipe.data
    if not data.is_blend and not data.parts[0].generated:
        return None
    teacher = public_name(recipe.teacher.model)
    found: list[dict[str, Any]] = []
    tokens: list[float | None] = []
    for number, (part, probability) in enumerate(zip(data.parts, data.probabilities, strict=True)):
        measured = measured_part(run, number)
        lengths = [] if measured is None else measured.document_lengths
        tokens.append(probability * sum(lengths) / len(lengths) if lengths else None)
        found.append(
            {
                "name": None if part.source is None else public_name(part.source),
                **({"generated_by": teacher} if part.generated else {}),
                "probability": probability,
                "num_rows": None if measured is None else measured.num_documents or None,
            }
        )
    known = [one for one in tokens if one is not None]
    for one, count in zip(found, tokens, strict=True):
        one["token_share"] = None if count is None or len(known) < len(tokens) else count / sum(known)
    draws = {"stopping_strategy": data.stopping_strategy, "seed": data.seed} if data.is_blend else {}
    return {"parts": found, **draws, "streaming": data.streaming}


def corpus_notes(run: Run) -> list[str]:
    """What a plan says of a blend: shares, the rows of one pass, and how often each corpus is read in it."""
    data = run.recipe.data
    if not data.is_blend:
        return []
    parts = [measured_part(run, number) for number in range(len(data.parts))]
    whole = measured_training_corpus(run)
    notes = []
    for number, (part, probability) in enumerate(zip(data.parts, data.probabilities, strict=True)):
        measured = parts[number]
        name = "text of the teacher" if part.source is None else public_name(part.source)
        passes = ""
        if whole is not None and measured is not None and measured.num_documents:
            passes = f", read {probability * whole.num_documents / measured.num_documents:.1f} times"
        notes.append(f"{probability:.0%} of the rows from {name}{passes}")
    size = "" if whole is None else f" One pass has about {whole.num_documents:,} rows."
    return [f"data.train: {'; '.join(notes)}.{size}"]
