"""Limits of the models that are compared: vocabularies and contexts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data import TokenRows
from ..data.context import context_length
from ..data.images import holds_images, require_image_model
from ..errors import ArgumentError, DataError, MismatchError, did_you_mean
from ..models import load_config
from .token_spaces import TokenSpaces

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Longest row when the models allow any length, in tokens.
DEFAULT_MAX_LENGTH = 2048


def checked_reference(models: Mapping[str, Any], reference: str | None) -> str | None:
    """Name of the reference; None for a single model.

    Raises:
        ArgumentError: if `models` is no mapping, or holds None.
        DataError: if there are no models, or the reference is not among them.
    """
    if not isinstance(models, Mapping):
        raise ArgumentError(f"models: expected {{'teacher': …, 'student': …}}, not a {type(models).__name__}.")
    if not models:
        raise DataError("There are no models to evaluate. Pass {'teacher': …, 'student': …}.")
    if missing := [name for name, model in models.items() if model is None]:
        raise ArgumentError(f"models[{missing[0]!r}] is None: expected a model, or the path or Hub id of one.")
    if reference is not None and reference not in models:
        raise DataError(f"The reference {reference!r} is not among the models {', '.join(models)}.")
    if len(models) == 1:
        return None
    if reference is not None:
        return reference
    return "teacher" if "teacher" in models else next(iter(models))


def require_positive(**settings: int) -> None:
    """Refuse numbers below 1.

    Raises:
        DataError: naming the setting.
    """
    for name, value in settings.items():
        if value < 1:
            raise DataError(f"{name}={value}, expected at least 1.")


@dataclass(frozen=True)
class Limits:
    """Limits of several models.

    Attributes:
        vocabularies: name → number of tokens that the model predicts.
        contexts: name → tokens of its context, for the models that have a limit.
        spaces: what each model calls the measured tokens.
    """

    vocabularies: Mapping[str, int]
    contexts: Mapping[str, int]
    spaces: TokenSpaces = field(default_factory=TokenSpaces)

    @classmethod
    def of(cls, models: Mapping[str, Any], reference: str | None, *, maps_tokens: bool = False) -> Limits:
        """Read the limits of models from their configs.

        Args:
            models: name → model, or the path or Hub id of one.
            reference: name of the model that the others are compared with.
            maps_tokens: whether models may have fewer tokens than the reference by a plan (`TokenSpaces`).

        Raises:
            MismatchError: if a vocabulary differs from the reference's.
        """
        configs = _configs(models)
        vocabularies = {name: _vocabulary_size(models[name], config) for name, config in configs.items()}
        spaces = TokenSpaces.of(models, vocabularies, reference) if maps_tokens else TokenSpaces()
        for name, size in vocabularies.items():
            if reference is not None and size != vocabularies[reference] and spaces.cut is None:
                raise MismatchError(
                    f"The model {name!r} has a vocabulary of {size} tokens and the reference {reference!r} one of "
                    f"{vocabularies[reference]}. Models are compared on the same tokens: evaluate them one at a time "
                    "and compare their bits per byte. A student whose vocabulary was cut needs its pruning_plan.json "
                    "beside it, which save_model writes."
                )
        contexts = {name: context_length(config) for name, config in configs.items()}
        return cls(vocabularies, {name: context for name, context in contexts.items() if context}, spaces)

    @property
    def context(self) -> int | None:
        """Tokens of the shortest context; None where no model has a limit."""
        return min(self.contexts.values(), default=None)

    @property
    def _shortest(self) -> str:
        name = min(self.contexts, key=self.contexts.__getitem__)
        return f"the model {name!r}, {self.contexts[name]} tokens"

    def row_length(self, max_length: int | None) -> int:
        """Longest row: as given, or the shortest context, at most `DEFAULT_MAX_LENGTH`.

        Raises:
            MismatchError: if it exceeds a context.
        """
        if max_length is None:
            return min(DEFAULT_MAX_LENGTH, self.context or DEFAULT_MAX_LENGTH)
        if self.context is not None and max_length > self.context:
            raise MismatchError(f"max_length={max_length} exceeds the context of {self._shortest}. Lower max_length.")
        return max_length

    def timed_lengths(self, prefill_length: int | None, decode_tokens: int | None) -> tuple[int, int]:
        """Tokens of the timed prompt and generation, which fit into the shortest context together.

        Raises:
            DataError: if one of them is below 1.
            MismatchError: if they exceed a context.
        """
        room = self.context or DEFAULT_MAX_LENGTH
        if decode_tokens is None:
            decode_tokens = max(1, min(64, room // 4 if prefill_length is None else room - prefill_length))
        if prefill_length is None:
            prefill_length = max(1, min(512, room - decode_tokens))
        if prefill_length < 1 or decode_tokens < 1:
            raise DataError(
                f"prefill_length={prefill_length} and decode_tokens={decode_tokens}: expected at least 1 of each. "
                "Pass speed=False to skip the timing."
            )
        if self.context is not None and prefill_length + decode_tokens > self.context:
            raise MismatchError(
                f"prefill_length={prefill_length} and decode_tokens={decode_tokens} exceed the context of "
                f"{self._shortest}. Lower them."
            )
        return prefill_length, decode_tokens

    def require_known(self, rows: TokenRows) -> None:
        """Refuse rows with tokens that a model does not know.

        Raises:
            MismatchError: naming the token and the model.
        """
        largest = max(map(max, rows.rows))
        for name, size in self.vocabularies.items():
            if largest >= size:
                raise MismatchError(
                    f"The data holds the token {largest}, but the model {name!r} knows tokens below {size} only. "
                    "Pass the tokenizer that belongs to the models."
                )


def require_image_models(models: Mapping[str, Any], data: Any) -> None:
    """Refuse models that read text alone, if the data has images.

    Raises:
        DataError: naming the model.
    """
    if not holds_images(data):
        return
    for name, config in _configs(models).items():
        require_image_model(config, f"The model {name!r}")


def _configs(models: Mapping[str, Any]) -> dict[str, PretrainedConfig]:
    return {
        name: load_config(model) if isinstance(model, str | os.PathLike) else model.config
        for name, model in models.items()
    }


def _vocabulary_size(model: Any, config: PretrainedConfig) -> int:
    """Number of logits per token."""
    if not isinstance(model, str | os.PathLike):
        head = model.get_output_embeddings()
        # Quantised heads pack their weights, but keep the number of outputs.
        if (size := getattr(head, "out_features", None)) is not None:
            return int(size)
    return int(config.get_text_config().vocab_size)


def chosen_models(models: Mapping[str, Any], **named: Sequence[str] | None) -> list[str]:
    """The models that one argument names, in their order; all if it is None.

    Raises:
        DataError: if one of the names is unknown.
    """
    [(argument, names)] = named.items()
    if isinstance(names, str):
        raise DataError(f"{argument}={names!r}: expected a list of names of models.")
    if unknown := sorted(set(names or ()) - set(models)):
        near = did_you_mean(unknown, models)
        raise DataError(
            f"{argument} names {', '.join(unknown)}, expected some of the models {', '.join(models)}.{near}"
        )
    return [name for name in models if names is None or name in names]
