"""The assistant's tokens of a conversation, for training and measurement alike.

A chat template that marks them (`{% generation %}`), or that TRL has a marked version of, tells which they are. With
any other template, the conversation is rendered turn by turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from .conversations import conversation_of, render_conversation_with_mask, render_text
from .tokens import text_tokenizer

#: The role whose turns count.
ASSISTANT = "assistant"


def assistant_tokens(row: Mapping[str, Any], processing_class: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether training with `assistant_only_loss` counts it.

    Args:
        row: with `messages` (or `conversations`), or `prompt` and `completion` as lists of messages, of which only the
            completion counts.
        processing_class: tokenizer with a chat template.

    Raises:
        DataError: if there is no template, or the turns cannot be found.
    """
    from ..compat import has_training_template, training_template  # imports torch

    tokenizer = text_tokenizer(processing_class)
    if not has_training_template(tokenizer):
        found = labelled_turns(row, processing_class, True)
        return found["input_ids"], [label != -100 for label in found["labels"]]
    template = training_template(tokenizer)
    prompt, messages = _messages(row)
    ids, mask = render_conversation_with_mask(messages, row, processing_class, template)
    if prompt:
        before, _ = render_conversation_with_mask(prompt, row, processing_class, template, add_generation_prompt=True)
        mask = [counts and place >= len(before) for place, counts in enumerate(mask)]
    return ids, mask


def labelled_turns(row: Mapping[str, Any], processing_class: Any, completion_only: bool) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels of the assistant's turns, with their end-of-turn tokens.

    A turn begins where the conversation before it ends, rendered with the generation prompt, and ends where the
    conversation up to it ends. That includes a line break behind the end-of-turn token, as in TRL's templates.

    Args:
        row: with `messages` (or `conversations`), or `prompt` and `completion` as lists of messages.
        processing_class: tokenizer with a chat template.
        completion_only: count turns of the completion only.

    Returns:
        `input_ids` and `labels`, -100 where a token does not count.

    Raises:
        DataError: if the template renders the beginning of a conversation differently when more follows.
    """
    prompt, messages = _messages(row)
    whole = render_text(messages, row, processing_class)
    first = len(prompt) if completion_only else 0
    spans = [
        _span(messages, place, whole, row, processing_class)
        for place, message in enumerate(messages)
        if message["role"] == ASSISTANT and place >= first
    ]
    tokenizer = text_tokenizer(processing_class)
    encoded: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if _is_inside(start, end, spans) else -100
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": list(encoded["input_ids"]), "labels": labels}


def _messages(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of the prompt, if there is one, and all messages."""
    if "prompt" in row and "completion" in row:  # beside messages, a prompt alone is a comment on them
        prompt = conversation_of(row["prompt"])
        return prompt, [*prompt, *conversation_of(row["completion"])]
    return [], conversation_of(row.get("messages") or row.get("conversations") or [])


def _span(
    messages: Sequence[Mapping[str, Any]], place: int, whole: str, row: Mapping[str, Any], processing_class: Any
) -> tuple[int, int]:
    """First and last character, exclusively, of a turn in the rendered conversation."""
    before = _before(messages, place, whole, row, processing_class)
    upto = whole if place + 1 == len(messages) else render_text(messages[: place + 1], row, processing_class)
    # Some templates close the last turn with a token of their own, so only the shared part is this turn's.
    end = next((i for i, (one, other) in enumerate(zip(whole, upto)) if one != other), min(len(whole), len(upto)))
    content = messages[place].get("content")
    is_whole = content.strip() in whole[len(before) : end] if isinstance(content, str) else end == len(upto)
    if not (whole.startswith(before) and is_whole):
        raise DataError(
            f"assistant_only_loss: the chat template renders a conversation differently when a turn follows, so the "
            f"assistant's tokens of message {place + 1} are unknown ({str(messages[place])[:80]}). Mark them in the "
            "template with {% generation %} and {% endgeneration %}, split such conversations into prompt and "
            "completion, or leave assistant_only_loss out."
        )
    return len(before), end


def _before(
    messages: Sequence[Mapping[str, Any]], place: int, whole: str, row: Mapping[str, Any], processing_class: Any
) -> str:
    """What is rendered before the content of a turn."""
    if place:
        return render_text(messages[:place], row, processing_class, add_generation_prompt=True)
    # No template renders an empty conversation: another first content differs from where it begins.
    content = str(messages[0].get("content"))
    other = {**messages[0], "content": ("b" if content.startswith("a") else "a") + content}
    changed = render_text([other, *messages[1:]], row, processing_class)
    return whole[: next((i for i, (one, two) in enumerate(zip(whole, changed)) if one != two), len(whole))]


def _is_inside(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    # A token that begins in front of the turn, such as one of a space and the first letter, belongs to it.
    return any(first < end <= last and start < end for first, last in spans)
