"""Conversations: what is one, and how a chat template renders it, as for TRL's SFTTrainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import DataError, cut_short
from .images import refuse_image_parts
from .tokens import require_tokenizer


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages: `{"role": …, "content": …}`, or ShareGPT's `{"from": …, "value": …}`."""
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Mapping):
        return False
    return "role" in value[0] or {"from", "value"} <= set(value[0])


#: What ShareGPT calls roles → their names in chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def conversation_of(messages: Any) -> list[dict[str, Any]]:
    """The messages with the keys `role` and `content`, which ShareGPT calls `from` and `value`.

    >>> conversation_of([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    names = {"from": "role", "value": "content"}
    return [
        {names.get(key, key): _ROLES.get(value, value) if key == "from" else value for key, value in message.items()}
        for message in messages
    ]


def render_conversation(
    messages: Any, row: Mapping[str, Any], processing_class: Any, *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation under the chat template, with the tools and template arguments of its row.

    Raises:
        DataError: if there is no template, or it cannot render the conversation.
    """
    rendered = _render(messages, row, processing_class, add_generation_prompt, tokenize=True, return_dict=True)
    return list(rendered["input_ids"])


def render_text(
    messages: Any, row: Mapping[str, Any], processing_class: Any, *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation under the chat template; otherwise as `render_conversation`."""
    return str(_render(messages, row, processing_class, add_generation_prompt, tokenize=False))


def render_conversation_with_mask(
    messages: Any,
    row: Mapping[str, Any],
    processing_class: Any,
    template: str | None,
    *,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the template marks as the assistant's.

    Args:
        messages: the conversation.
        row: with tools and arguments of the template.
        processing_class: tokenizer.
        template: with `{% generation %}`; None: the tokenizer's own.
        add_generation_prompt: whether to end with the beginning of the assistant's turn.
    """
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    rendered = _render(messages, row, processing_class, add_generation_prompt, template, **settings)
    return list(rendered["input_ids"]), [bool(counts) for counts in rendered["assistant_masks"]]


def _render(
    messages: Any,
    row: Mapping[str, Any],
    processing_class: Any,
    add_generation_prompt: bool,
    own_template: str | None = None,
    **settings: Any,
) -> Any:
    if processing_class is None:
        raise DataError("The data is conversations, so a tokenizer is needed. Pass processing_class=tokenizer.")
    template = getattr(processing_class, "chat_template", None)
    tokenizer = require_tokenizer(processing_class)
    if template is None and tokenizer.chat_template is None:
        raise DataError(
            "The data is conversations, and the tokenizer has no chat template. Set tokenizer.chat_template, or pass "
            "texts."
        )
    messages = conversation_of(messages)
    refuse_image_parts(messages)
    if _reads_parts(tokenizer, str(own_template or template or tokenizer.chat_template)):
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]
    tools = row.get("tools")
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=own_template or template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=add_generation_prompt,
            **settings,
            **(row.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # templates raise errors of Jinja, of their own, and of Python
        raise DataError(
            f"The chat template cannot render the conversation {cut_short(str(messages), 120)}: {error}. Check its "
            "roles and their order, or pass texts."
        ) from error


#: Template → whether it reads contents as lists of parts alone.
_PARTS: dict[str, bool] = {}


def _reads_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template leaves out contents that are plain texts, and not those that are lists of parts.

    Templates of many models with images do: TRL gives them parts.
    """
    if template not in _PARTS:
        word = "minitron"

        def shows(content: Any) -> bool:
            try:
                found = tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], chat_template=template, tokenize=False
                )
            except Exception:  # templates raise errors of Jinja, of their own, and of Python
                return False
            return word in str(found)

        _PARTS[template] = not shows(word) and shows([{"type": "text", "text": word}])
    return _PARTS[template]
