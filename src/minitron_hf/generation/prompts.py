"""Prompts of a dataset as token ids, with the chat template where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.documents import conversation_of, is_conversation, render_conversation
from ..data.tokens import separator_tokens, text_tokenizer, tokenize
from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What to do where a folder was begun with other prompts.
OTHER_PROMPTS = (
    "choose another folder, or the same prompts. A chat template that prints the date (strftime_now) renders others "
    "on another day."
)
#: Roles of the model's own turns, in messages and in ShareGPT's conversations.
ASSISTANT_ROLES = ("assistant", "gpt", "model")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: place in the dataset, from 0.
        ids: token ids, at least one.
        messages: the conversation so far; None for a text.
        columns: further columns of the generated row.
    """

    index: int
    ids: list[int]
    messages: list[dict[str, Any]] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class Prompts:
    """Reads the prompts of a dataset, one by one.

    Args:
        data: mappings with the columns `messages` (or `conversations`), `prompt` or `text_field`; or texts; or
            conversations. Of a conversation, the model's turns at the end are left out. None: every prompt is the
            model's own begin-of-text token.
        processing_class: tokenizer, or a processor with one.
        chat: whether a text becomes the message of a user under the chat template; None: where there is a template.
            Conversations always need one.
        text_field: column that holds the text.
        max_length: longest prompt, in tokens: longer texts are cut, longer conversations left out. None: no limit.
        num_rows: number of prompts; None: all of the data.

    Raises:
        DataError: if the settings do not fit the data or the tokenizer.
    """

    def __init__(
        self,
        data: Iterable[Any] | None,
        processing_class: Any,
        *,
        chat: bool | None = None,
        text_field: str = "text",
        max_length: int | None = None,
        num_rows: int | None = None,
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = text_tokenizer(processing_class)
        has_template = self.tokenizer.chat_template is not None
        if chat and not has_template:
            raise DataError("chat=True: the tokenizer has no chat template. Set tokenizer.chat_template.")
        self.chat = has_template if chat is None else chat
        self.data, self.text_field, self.max_length, self.num_rows = data, text_field, max_length, num_rows
        #: Number of conversations that were too long, as far as the prompts were read.
        self.num_skipped = 0
        if data is None:
            self._require_own_start()

    def __len__(self) -> int:
        """Number of prompts, at most.

        Raises:
            TypeError: if the data is a stream and there is no limit.
        """
        rows = len(self.data) if isinstance(self.data, Sized) else None
        counts = [count for count in (rows, self.num_rows) if count is not None]
        if not counts:
            raise TypeError("The prompts are a stream without a length.")
        return min(counts)

    def __iter__(self) -> Iterator[Prompt]:
        self.num_skipped = number = 0
        for index, row in enumerate(self._rows()):
            if number == self.num_rows:
                return
            try:
                prompt = self._prompt(index, row)
            except DataError as error:
                raise DataError(f"Prompt {index} (counted from 0): {error}") from error
            if prompt is None:
                self.num_skipped += 1
                continue
            number += 1
            yield prompt

    def _rows(self) -> Iterable[Any]:
        if self.data is None:
            return (None for _ in range(self.num_rows or 0))
        return self.data

    def _require_own_start(self) -> None:
        require_count(self.data, self.num_rows)
        if not separator_tokens(self.tokenizer):
            raise DataError("The tokenizer has neither a begin-of-text nor an end-of-text token. Pass prompts.")

    def _prompt(self, index: int, row: Any) -> Prompt | None:
        """A row as a prompt; None for a conversation that is too long."""
        if row is None:
            return Prompt(index, separator_tokens(self.tokenizer))
        value, columns = self._value(row)
        if isinstance(value, str):
            if not self.chat:
                return self._text_prompt(index, value)
            value = [{"role": "user", "content": value}]
        messages = _without_answer(conversation_of(value))
        row = row if isinstance(row, Mapping) else {}
        ids = render_conversation(messages, row, self.tokenizer, add_generation_prompt=True)
        if self.max_length is not None and len(ids) > self.max_length:
            return None
        return Prompt(index, ids, messages, columns)

    def _text_prompt(self, index: int, text: str) -> Prompt:
        [ids] = tokenize([text], self.tokenizer)
        ids = ids[: self.max_length]
        if not ids:
            raise DataError("The text is empty, and the tokenizer adds no token to it. Leave such rows out.")
        return Prompt(index, ids)

    def _value(self, row: Any) -> tuple[Any, dict[str, Any]]:
        """The text or conversation of a row, and the columns that stay with it.

        Raises:
            DataError: if there is none.
        """
        if isinstance(row, str) or is_conversation(row):
            return row, {}
        if isinstance(row, Mapping):
            tools = row.get("tools")
            columns = {} if not tools else {"tools": tools if isinstance(tools, str) else json.dumps(tools)}
            for name in ("messages", "conversations", "prompt", self.text_field):
                if isinstance(row.get(name), str) or is_conversation(row.get(name)):
                    return row[name], columns
            raise DataError(
                f"The row has the columns {', '.join(map(str, row))}; expected 'messages', 'prompt' or "
                f"{self.text_field!r} with a text or a conversation. Name the column with text_field=…"
            )
        raise DataError(f"Expected a text, a conversation or a row, got {type(row).__name__}: {str(row)[:60]!r}.")


def _without_answer(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation up to the last turn that is not the model's own.

    Raises:
        DataError: if all turns are the model's.
    """
    end = len(messages)
    while end and messages[end - 1]["role"] in ASSISTANT_ROLES:
        end -= 1
    if not end:
        raise DataError("The conversation has no turn of a user to answer. Leave such rows out.")
    return [dict(message) for message in messages[:end]]


def require_count(prompts: Iterable[Any] | None, num_rows: int | None) -> None:
    """Refuse to generate without prompts and without a number of rows.

    Raises:
        DataError: if both are missing.
    """
    if prompts is None and num_rows is None:
        raise DataError("There are no prompts, so num_rows has to say how many rows to generate.")
