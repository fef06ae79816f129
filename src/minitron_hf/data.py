"""Text or datasets → token rows, for calibration, perplexity and agreement alike.

Training data goes through TRL instead (tokenising, packing, chat templates); see `trainer.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .files import digest

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

#: Anything `token_rows` reads: texts, token ids, or a dataset (or rows of one) with a text or `input_ids` column.
DataSource = Any


@dataclass(frozen=True)
class TokenRows:
    """Token ids in rows of at most `max_length`, ragged, without padding.

    Attributes:
        rows: token ids, one list per row, each of length ≥ 2.
        num_bytes: UTF-8 bytes of the text that the rows hold; None when the source was token ids.
        overlap: how many leading tokens of every row repeat the end of the row before it (0 or 1). With 1, each
            token after the first is predicted exactly once, whatever `max_length` is.
    """

    rows: tuple[tuple[int, ...], ...]
    num_bytes: int | None
    overlap: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, overlaps included."""
        return sum(map(len, self.rows))

    @property
    def digest(self) -> str:
        """Digest of the token ids and how they are split into rows."""
        return digest(self.rows)


def load_text_dataset(
    source: str, *, name: str | None = None, split: str = "train", revision: str | None = None
) -> Dataset | IterableDataset:
    """Load a dataset by path or Hub id with the `datasets` library.

    Args:
        source: a `.jsonl`, `.json`, `.parquet`, `.csv` or `.txt` file, a folder written by
            `Dataset.save_to_disk`, or a Hub dataset id.
        name: configuration name on the Hub (`"wikitext-2-raw-v1"`).
        split: split, slices allowed (`"train[:1%]"`).
        revision: Hub revision.

    Raises:
        DataError: if nothing can be loaded from `source`.
    """
    import datasets

    readers = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
    path = Path(source)
    try:
        if path.is_file() or path.suffix in readers:
            if path.suffix not in readers:
                raise DataError(f"{source}: cannot read a '{path.suffix}' file. Expected one of {', '.join(readers)}.")
            if not path.is_file():  # a Hub id does not end like this
                raise DataError(f"The file {source} does not exist. Check the path.")
            return datasets.load_dataset(readers[path.suffix], data_files={"train": str(path)}, split=split)
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(source, name, split=split, revision=revision)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"Cannot load the dataset {source!r} (split {split!r}): {error}. "
            f"Expected a local file ({', '.join(readers)}), a saved dataset folder or a Hub dataset id."
        ) from error


def token_rows(
    data: DataSource,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int,
    num_rows: int | None = None,
    packing: bool = True,
    overlap: int = 0,
    text_field: str = "text",
) -> TokenRows:
    """Turn texts, token ids or a dataset into token rows.

    Args:
        data: an iterable of `str`, of token-id sequences, or of mappings (a `datasets.Dataset`, for example) with an
            `input_ids` (without its padding, where an `attention_mask` says so) or a `text_field` column; or a single
            `TokenRows`, returned as it is.
        processing_class: tokenizer; needed for text.
        max_length: longest row, in tokens.
        num_rows: stop after this many rows (None: all).
        packing: join documents (each behind a separator, see `tokenize`) and cut them into full rows. Padding then
            hardly occurs; NVIDIA/Megatron-LM#4807 measured packing at +5.8 MMLU on a pruned Qwen3-8B. Without it
            every document starts its own row, and longer documents continue on further rows.
        overlap: 1 repeats the last token of a row at the start of the next row of the same stream, so that every
            token is predicted exactly once (perplexity); 0 for calibration.
        text_field: column that holds the text.

    Returns:
        The rows. With `overlap=1`, `num_rows` stops after the document that reaches it, whose last rows are kept, so
        that bits per byte are exact; with `overlap=0` there are at most `num_rows` rows.

    Raises:
        DataError: if there is no text, no tokenizer for it, or less text than one row of two tokens; or if a setting
            makes no sense.
    """
    if isinstance(data, TokenRows):
        return data
    if isinstance(data, str | os.PathLike):
        raise DataError(
            f"Expected texts, token rows or a dataset, got the string {str(data)[:80]!r}. "
            "Pass a list of texts, or load a file with minitron_hf.load_text_dataset(path)."
        )
    if isinstance(data, Mapping):
        # Iterating over it would read its keys as texts.
        raise DataError(
            f"Expected texts, token rows or a dataset, got a {type(data).__name__} with the keys "
            f"{', '.join(map(str, data))}. Pass one of its values: a split, or its rows."
        )
    if max_length < 2:
        raise DataError(f"max_length={max_length} is too short: a row needs two tokens to predict one.")
    if overlap not in (0, 1):
        raise DataError(f"overlap={overlap}, expected 0 or 1.")
    if num_rows is not None and num_rows < 1:
        raise DataError(f"num_rows={num_rows}, expected at least 1, or None for all.")

    step = max_length - overlap
    rows: list[tuple[int, ...]] = []
    stream: list[int] = []
    num_bytes: int | None = 0
    num_documents = 0

    def cut(*, flush: bool) -> None:
        nonlocal stream
        start = 0
        while len(stream) - start >= max_length or (flush and len(stream) - start >= max(2, overlap + 1)):
            rows.append(tuple(stream[start : start + max_length]))
            start += step
        stream = [] if flush else stream[start:]

    for ids, text in _documents(data, processing_class, text_field):
        if not ids:
            continue
        num_documents += 1
        num_rows_before = len(rows)
        stream.extend(ids)
        cut(flush=not packing)
        if text is None:
            num_bytes = None
        elif num_bytes is not None and (packing or len(rows) > num_rows_before):
            # A document too short to fill a row of its own is not measured.
            num_bytes += len(text.encode())
        if num_rows is not None and len(rows) >= num_rows:
            break
    cut(flush=True)

    if not rows:
        found = "no documents" if num_documents == 0 else f"{num_documents} document(s) of under two tokens"
        raise DataError(f"The data holds {found}; expected at least one text of two tokens. Pass more text.")
    if num_rows is not None and overlap == 0 and len(rows) > num_rows:
        # Calibration asks for a number of rows; nothing is measured per byte there.
        rows, num_bytes = rows[:num_rows], None
    return TokenRows(tuple(rows), num_bytes, overlap)


def _documents(
    data: DataSource, processing_class: PreTrainedTokenizerBase | None, text_field: str
) -> Iterator[tuple[list[int], str | None]]:
    """Yield (token ids, text or None) per document. Texts are tokenised in batches, which is much faster."""
    documents = iter(data)
    while chunk := list(islice(documents, 256)):
        values = [_content(document, text_field) for document in chunk]
        texts = [value for value in values if isinstance(value, str)]
        if texts and processing_class is None:
            raise DataError("The data is text, so a tokenizer is needed. Pass processing_class=tokenizer.")
        encoded = iter(tokenize(texts, processing_class) if processing_class is not None and texts else [])
        for value in values:
            if isinstance(value, str):
                ids = next(encoded)
                yield (ids, value) if value.strip() else ([], value)
            else:
                yield value, None


def tokenize(texts: Sequence[str], processing_class: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of whole documents, each behind one separator token.

    The separator is the beginning-of-text token, or the end-of-text token of tokenizers without one, as in
    lm-evaluation-harness: it gives the first real token a context, and in a packed stream it parts the documents.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [ids if separator is None or ids[:1] == [separator] else [separator, *ids] for ids in encoded]


def _content(document: Any, text_field: str) -> str | list[int]:
    if isinstance(document, Mapping):
        if "input_ids" in document:
            ids, mask = document["input_ids"], document.get("attention_mask")
            document = ids if mask is None else [token for token, kept in zip(_listed(ids), _listed(mask)) if kept]
        elif text_field in document:
            document = document[text_field]
        else:
            raise DataError(
                f"A row of the dataset has the columns {sorted(document)}; expected 'input_ids' or {text_field!r}. "
                "Name the text column with text_field=…"
            )
    if isinstance(document, str):
        return document
    document = _listed(document)
    if isinstance(document, Iterable):
        ids = list(document)
        if all(isinstance(token, int) for token in ids):
            return ids
    raise DataError(
        f"Expected a text or a sequence of token ids, got {type(document).__name__}: {str(document)[:60]!r}."
    )


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def padded_batches(
    rows: TokenRows, batch_size: int, *, pad_token_id: int = 0, padding_side: str = "right"
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `input_ids`, `attention_mask` and `position_ids`, each int64 [batch, longest row in the batch].

    Position ids count the unmasked tokens, so absolute position embeddings do not depend on the padding side.
    """
    import torch

    for start in range(0, len(rows), batch_size):
        chunk = rows.rows[start : start + batch_size]
        length = max(map(len, chunk))
        input_ids = torch.full((len(chunk), length), pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(chunk), length), dtype=torch.long)
        for index, row in enumerate(chunk):
            where = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
            input_ids[index, where] = torch.tensor(row)
            attention_mask[index, where] = 1
        yield {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids(attention_mask),
        }


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token among the unmasked ones, int64 [batch, length]; padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
