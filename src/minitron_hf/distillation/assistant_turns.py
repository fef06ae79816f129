"""Assistant-only loss for every chat template, also for those whose assistant turns TRL cannot find."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..compat import column_names, has_training_template
from ..data.images import holds_images, require_assistant_marks
from ..data.tokens import text_tokenizer
from ..data.turns import labelled_turns
from ..errors import DataError
from ..models import read_chat_template
from .rows import holds_conversation


class AssistantTurnsMixin:
    """Mixin for an `SFTTrainer` whose `assistant_only_loss` works without `{% generation %}` in the chat template.

    TRL needs these markers, and brings templates with them for some models. For any other template this finds the
    assistant's tokens itself, and TRL gets rows with labels.
    """

    _finds_turns = False

    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        tokenizer = kwargs.get("processing_class")
        if getattr(args, "assistant_only_loss", False) and tokenizer is not None:
            self._finds_turns = not has_training_template(_with_template(tokenizer, args.chat_template_path))
        if not self._finds_turns:
            super().__init__(model, args, **kwargs)  # type: ignore[call-arg] # of SFTTrainer
            return
        if holds_images(kwargs.get("train_dataset")):
            require_assistant_marks(tokenizer)
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


def _with_template(processing_class: Any, path: str | None) -> Any:
    """The tokenizer with the chat template that TRL will give it."""
    tokenizer = text_tokenizer(processing_class)
    if path is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = read_chat_template(path)
    return tokenizer


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
