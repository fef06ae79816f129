"""Token rows with images: one row for every example, rendered by a processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..files import digest
from .batches import TokenRows
from .documents import Piece
from .images import ImageCollator, read_row, require_image_processor
from .tokens import missing_start, start_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageRows(TokenRows):
    """Token rows that have images. Pixels are read when a batch is made, and not kept.

    Attributes:
        examples: rows of the data, by number.
        numbers: number of every row's example.
        collator: renders examples.
        pixels: digest of the images of every row.
    """

    examples: Any = ()
    numbers: tuple[int, ...] = ()
    collator: ImageCollator | None = None
    pixels: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the token ids, the positions of context, and the images."""
        return digest(self.rows, self.context, self.pixels)

    def predicted(self, index: int) -> list[int]:
        """Positions of a row's tokens whose predictions are measured: no token of an image."""
        assert self.collator is not None
        row, placeholders = self.rows[index], set(self.collator.placeholders)
        return [position for position in super().predicted(index) if row[position] not in placeholders]

    def select(self, indices: list[int]) -> ImageRows:
        """Some of the rows, in the order of `indices`."""
        chosen = super().select(indices)
        own = (tuple(self.numbers[index] for index in indices), self.collator)
        pixels = tuple(self.pixels[index] for index in indices)
        return ImageRows(
            chosen.rows, None, chosen.overlap, chosen.context, chosen.continues, self.examples, *own, pixels
        )

    def without_images(self) -> TokenRows:
        """The rows as text alone."""
        assert self.collator is not None
        placeholders = set(self.collator.placeholders)
        return TokenRows(tuple(tuple(token for token in row if token not in placeholders) for row in self.rows), None)

    def padded(
        self, first: int, last: int, *, pad_token_id: int = 0, padding_side: str = "right"
    ) -> dict[str, torch.Tensor]:
        """A batch of the rows from `first` to before `last`, with the pixels of their images.

        Raises:
            DataError: if the processor renders rows otherwise beside others than alone.
        """
        assert self.collator is not None
        assert padding_side == "right"
        batch = self.collator([self.examples[number] for number in self.numbers[first:last]])
        plain = super().padded(first, last, pad_token_id=pad_token_id)
        mask = plain["attention_mask"]
        length = mask.shape[1]
        same = (batch["input_ids"][:, :length] == plain["input_ids"]) | (mask == 0)
        if not bool(same.all()) or int(batch["attention_mask"].sum()) != int(mask.sum()):
            raise DataError("The processor gives a row other tokens beside other rows than alone. Pass batch_size=1.")
        per_token = {name for name, value in batch.items() if value.shape[:2] == batch["input_ids"].shape}
        cut = {name: value[:, :length] if name in per_token else value for name, value in batch.items()}
        cut.pop("labels")
        return {**cut, **plain}


def image_rows(
    data: Any,
    processing_class: Any,
    *,
    max_length: int,
    num_rows: int | None,
    text_field: str,
    assistant_only: bool = False,
) -> ImageRows:
    """Render rows with images. Every example is a row, and what is longer loses the end of its text.

    Args:
        data: a dataset or a list of rows with images, see `minitron_hf.data.images`.
        processing_class: processor of the model.
        max_length: longest row, in tokens.
        num_rows: number of rows after which to stop; None: all.
        text_field: column that holds the text, if there are no messages.
        assistant_only: count the assistant's turns alone.

    Raises:
        DataError: naming a row that cannot be read.
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        data = list(islice(data, num_rows))
    collator = _collator(data, processing_class, max_length, text_field, assistant_only=assistant_only)
    start = start_tokens(processing_class)
    rows: list[tuple[int, ...]] = []
    context: list[tuple[int, ...]] = []
    numbers: list[int] = []
    pixels: list[str] = []
    for number, batch in _rendered(data, collator):
        ids, targets = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        if all(target == -100 for target in targets[1:]):
            continue
        rows.append(tuple(ids))
        context.append(_context(ids, targets, start, collator.placeholders))
        numbers.append(number)
        pixels.append(_pixel_digest(batch, len(ids)))
        if len(rows) == num_rows:
            break
    if not rows:
        raise DataError("No row with images holds a token to predict. Pass more data, or a larger max_length.")
    own = (data, tuple(numbers), collator, tuple(pixels))
    return ImageRows(tuple(rows), None, 0, tuple(context) if any(context) else (), (False,) * len(rows), *own)


def image_documents(data: Any, processing_class: Any, text_field: str) -> Iterator[Piece]:
    """Yield the tokens of rows with images, placeholders included: every row is a document, and is not cut.

    Args:
        data: as of `image_rows`.
        processing_class: processor of the model.
        text_field: column that holds the text, if there are no messages.

    Raises:
        DataError: naming a row that cannot be read.
    """
    rows = data if hasattr(data, "__getitem__") and hasattr(data, "__len__") else list(data)
    for _, batch in _rendered(rows, _collator(rows, processing_class, None, text_field, assistant_only=False)):
        yield Piece(batch["input_ids"][0].tolist())


def _collator(
    data: Any, processing_class: Any, max_length: int | None, text_field: str, *, assistant_only: bool
) -> ImageCollator:
    require_image_processor(processing_class)
    with _naming(0):
        first = read_row(data, 0)
    return ImageCollator.of(processing_class, first, max_length, text_field, assistant_only=assistant_only)


def _rendered(data: Any, collator: ImageCollator) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row by its number, as a batch of its own."""
    for number in range(len(data)):
        with _naming(number):
            batch = collator([read_row(data, number)])
        yield number, batch


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    """Refusals name the number of the row."""
    try:
        yield
    except DataError as error:
        raise DataError(f"Row {number} (counted from 0): {error}") from error


def _context(ids: list[int], targets: list[int], start: list[int], placeholders: Sequence[int]) -> tuple[int, ...]:
    """Positions of start tokens and of text that is no target; images are scored as the text that reads them."""
    leading = 0 if missing_start(ids, start) else len(start)
    return tuple(
        place
        for place, (token, target) in enumerate(zip(ids, targets))
        if place < leading or (target == -100 and token not in placeholders)
    )


def _pixel_digest(batch: dict[str, Any], length: int) -> str:
    """Digest of all that a row has beside its tokens."""
    others: Iterable[Any] = (
        value.contiguous().numpy().tobytes()
        for name, value in sorted(batch.items())
        if tuple(value.shape[:2]) != (1, length)
    )
    return digest(*others)
