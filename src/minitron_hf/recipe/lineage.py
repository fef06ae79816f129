"""What a run records and announces of its training corpus: its parts, their shares, and what the teacher wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..data.images import holds_images
from ..errors import MinitronError
from ..names import public_name
from .beginnings import beginning, is_remote
from .corpus_sections import DatasetSection
from .generating import expected_text, is_written
from .measuring import measure_documents
from .run import GENERATED_DIR, place_of, processor_of
from .schedules import Corpus

if TYPE_CHECKING:
    from .run import Run


def measured_part(run: Run, number: int) -> Corpus | None:
    """The length of one of the corpora of `data.train`; of text that is still to be written, at most.

    Returns:
        Lengths of documents, and their number; None if it cannot be read.
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
            counts = [one for one in (part.num_rows, expected.num_documents) if one is not None]
            return Corpus(expected.document_lengths, min(counts, default=None))
        where, load = run.whole.recipe.data.place(number), partial(run.whole.part, number)
        section = part.dataset(str(run.whole.folder / GENERATED_DIR))
        return _measured(run, section, where, load, is_loaded=f"data.train.{number}" in run.whole.loaded)
    except MinitronError:
        return None


def measured_dataset(run: Run, which: str) -> Corpus | None:
    """The length of a corpus other than the training corpus; None if it cannot be read."""
    try:
        section, load = run.dataset_section(which), partial(run.whole.dataset, which)
        return _measured(run, section, place_of(which), load, is_loaded=f"data.{which}" in run.whole.loaded)
    except MinitronError:
        return None


def _measured(run: Run, section: DatasetSection, where: str, load: Callable[[], Any], *, is_loaded: bool) -> Corpus:
    """Lengths of documents spread over a corpus; of its first ones if it is a stream, or still on the Hub."""
    if (is_loaded or not is_remote(section)) and isinstance(rows := load(), Sized):
        return measure_documents(rows, _reader(run, rows), section.text_field)
    found = beginning(section, where, load)
    measured = measure_documents(found.rows, _reader(run, found.rows), section.text_field)
    return replace(measured, num_documents=found.num_rows, is_beginning=True)


def _reader(run: Run, rows: Any) -> Any:
    return processor_of(run) if holds_images(rows) else run.tokenizer


def beginning_notes(corpora: Mapping[str, Corpus | None]) -> list[str]:
    """Which corpora only the first documents of were measured, and which have images.

    Args:
        corpora: where a corpus stands in the recipe → its length.
    """
    known = {where: one for where, one in corpora.items() if one is not None}
    notes = [
        f"{where}: the lengths of documents are those of its first {len(one.document_lengths):,}."
        for where, one in known.items()
        if one.is_beginning
    ]
    if with_images := [where for where, one in known.items() if one.holds_images]:
        notes.append(f"{', '.join(with_images)}: what reading the images takes is not part of the estimate.")
    return notes


def measured_training_corpus(run: Run) -> Corpus | None:
    """The length of `data.train`, of a blend in one pass; None where it is unknown, as of streams."""
    data = run.whole.recipe.data
    parts = [measured_part(run, number) for number in range(len(data.parts))]
    known = [part for part in parts if part is not None and part.num_documents is not None]
    if len(known) < len(parts) or data.streaming:
        return None
    if not data.is_blend:
        return known[0]
    weighted = sum(
        probability * sum(part.document_lengths) / len(part.document_lengths)
        for probability, part in zip(data.probabilities, known, strict=True)
    )
    rows = [
        (part.num_documents or 0) / probability for probability, part in zip(data.probabilities, known, strict=True)
    ]
    longest = max(rows) if data.stopping_strategy == "all_exhausted" else min(rows)
    return Corpus([round(weighted)], round(longest))


def longest_document(run: Run) -> int | None:
    """Tokens of the longest of some documents of `data.train`; None if one of its corpora cannot be read."""
    parts = [measured_part(run, number) for number in range(len(run.whole.recipe.data.parts))]
    lengths = [length for part in parts if part is not None for length in part.document_lengths]
    return None if None in parts else max(lengths, default=None)


def described_parts(run: Run) -> dict[str, Any] | None:
    """What `distillation.json` records of a blend, or of text that the teacher wrote; None for any other corpus.

    `probability` is the share of the rows, `token_share` the share of their tokens, estimated from some rows spread
    over the corpus; of a stream from its first ones, whose number is `measured_first_documents`.
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
                "num_rows": None if measured is None else measured.num_documents,
                **({"measured_first_documents": len(lengths)} if measured and measured.is_beginning else {}),
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
        if whole is not None and whole.num_documents and measured is not None and measured.num_documents:
            passes = f", read {probability * whole.num_documents / measured.num_documents:.1f} times"
        notes.append(f"{probability:.0%} of the rows from {name}{passes}")
    size = "" if whole is None else f" One pass has about {whole.num_documents:,} rows."
    return [f"data.train: {'; '.join(notes)}.{size}"]
