"""The formats that rows of a dataset can have, and their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .conversations import is_conversation
from .images import TEMPLATE_COLUMNS, has_images

#: Format of rows without images → their columns.
_OF_TEXT: Mapping[str, tuple[str, ...]] = {
    "token ids": ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks"),
    "prompts with completions of messages": ("prompt", "completion", *TEMPLATE_COLUMNS),
    "prompts with completions of text": ("prompt", "completion"),
    "conversations": ("messages", *TEMPLATE_COLUMNS),
    "texts": ("text",),
}
#: What the name of a format ends with whose rows have images.
WITH_IMAGES = " with images"
#: Format of rows, in words → the columns that a blend keeps.
FORMATS: Mapping[str, tuple[str, ...]] = {
    **_OF_TEXT,
    **{f"{name}{WITH_IMAGES}": (*columns, "images") for name, columns in _OF_TEXT.items() if name != "token ids"},
}


def row_format(row: Mapping[str, Any], text_field: str) -> str:
    """Which of `FORMATS` a row has. Columns count in the order in which the trainer looks for them.

    Args:
        row: with one of the columns that `require_text` expects.
        text_field: column that holds a text.

    Raises:
        DataError: if it has none of them.

    >>> row_format({"messages": [{"role": "user", "content": "Hi"}], "text": "Hi"}, "text")
    'conversations'
    >>> row_format({"prompt": "1 + 1 =", "completion": " 2"}, "text")
    'prompts with completions of text'
    >>> row_format({"text": "A cat: <image>", "images": []}, "text")
    'texts with images'
    """
    if "input_ids" in row:
        return "token ids"
    return _format_of_text(row, text_field) + (WITH_IMAGES if has_images(row) else "")


def _format_of_text(row: Mapping[str, Any], text_field: str) -> str:
    if "prompt" in row and "completion" in row:
        return f"prompts with completions of {'messages' if is_conversation(row['prompt']) else 'text'}"
    if any(is_conversation(row.get(name)) for name in ("messages", "conversations")):
        return "conversations"
    if text_field in row:
        return "texts"
    raise DataError(f"A row has the columns {', '.join(row)}, and no {text_field!r}.")
