"""Assistant-only loss for every chat template: renders a conversation turn by turn to find the assistant's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..compat import column_names, has_training_template
from ..data.documents import conversation_of, render_text
from ..data.tokens import text_tokenizer
from ..errors import DataError
from .rows import holds_conversation

#: The role whose turns count.
ASSISTANT = "assistant"


class AssistantTurnsMixin:
    """Mixin for an `SFTTrainer` whose `assistant_only_loss` works without `{% generation %}` in the chat template.

    TRL needs these markers, and brings templates with them for some models. For any other template this finds the
    assistant's tokens itself, and TRL gets rows with labels.
    """

    _finds_turns = False

    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        tokenizer = kwargs.get("processing_class")
        if getattr(args, "assistant_only_loss", False) and tokenizer is not None and args.chat_template_path is None:
            self._finds_turns = not has_training_template(text_tokenizer(tokenizer))
        if not self._finds_turns:
            super().__init__(model, args, **kwargs)  # type: ignore[call-arg] # of SFTTrainer
            return
        args.assistant_only_loss = False  # TRL would refuse the template
        try:
            super().__init__(model, args, **kwargs)  # type: ignore[call-arg] # of SFTTrainer
        finally:
            args.assistant_only_loss = True

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        if self._finds_turns and formatting_func is None and "input_ids" not in column_names(dataset):
            first = next(iter(dataset))
            if not holds_conversation(first):
                raise DataError(
                    f"assistant_only_loss: the {dataset_name} dataset has the columns {', '.join(first)}, expected "
                    "conversations in 'messages', or in 'prompt' and 'completion'. Leave assistant_only_loss out."
                )
            maps: dict[str, Any] = {"remove_columns": list(first)}
            if isinstance(dataset, Dataset):  # `map` of a stream takes neither
                maps |= {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} dataset"}
            settings = {"processing_class": processing_class, "completion_only": self.completion_only_loss}  # type: ignore[attr-defined] # of SFTTrainer
            dataset = dataset.map(labelled_turns, fn_kwargs=settings, **maps)
        return super()._prepare_dataset(  # type: ignore[misc] # of SFTTrainer (trl 1.16)
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )


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
    prompt = conversation_of(row["prompt"]) if "prompt" in row else []
    value = row["completion"] if "prompt" in row else row.get("messages", row.get("conversations"))
    messages = [*prompt, *conversation_of(value)]
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


def require_turns(rows: Sequence[Mapping[str, Any]], processing_class: Any) -> None:
    """Refuse conversations whose assistant turns cannot be found, before anything is computed.

    Args:
        rows: the first rows of a corpus; rows of token ids are skipped.
        processing_class: tokenizer.

    Raises:
        DataError: see `labelled_turns`.
    """
    if "input_ids" in rows[0] or has_training_template(text_tokenizer(processing_class)):
        return
    for row in rows:
        if holds_conversation(row):
            labelled_turns(row, processing_class, False)


def _span(
    messages: Sequence[Mapping[str, Any]], place: int, whole: str, row: Mapping[str, Any], processing_class: Any
) -> tuple[int, int]:
    """First and last character, exclusively, of a turn in the rendered conversation."""
    before = render_text(messages[:place], row, processing_class, add_generation_prompt=True)
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


def _is_inside(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    # A token that begins in front of the turn, such as one of a space and the first letter, belongs to it.
    return any(first < end <= last and start < end for first, last in spans)
