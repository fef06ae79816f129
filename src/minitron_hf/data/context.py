"""Context lengths of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

#: Training rows below this share of the context are called short.
SHORT_ROWS = 0.5

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def context_length(config: PretrainedConfig) -> int | None:
    """Longest row that a model supports, in tokens; None if its config names no limit."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "rope_parameters")
    return stored_context_length({name: getattr(config, name, None) for name in names})


def stored_context_length(config: Mapping[str, Any]) -> int | None:
    """`context_length` of a config as it is stored in `config.json`."""
    config = config.get("text_config") or config
    limit: int | None = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if limit and factor and original:  # some configs hold the length before scaling
        limit = max(limit, int(factor * original))
    return limit or None


def shortest_context(*configs: PretrainedConfig) -> int | None:
    """The shortest context of several models, in tokens; None if none has a limit."""
    return min((length for config in configs if (length := context_length(config)) is not None), default=None)


def row_limit(max_length: int | None, **configs: PretrainedConfig) -> tuple[int | None, str | None]:
    """The longest row that models can be trained on, and a message where this is not `max_length`.

    Args:
        max_length: as it was asked for; None asks for no limit.
        **configs: role → config of each model.
    """
    contexts = {role: length for role, config in configs.items() if (length := context_length(config)) is not None}
    role = min(contexts, key=contexts.__getitem__, default=None)
    if role is None or (max_length is not None and max_length <= contexts[role]):
        return max_length, None
    context = contexts[role]
    if max_length is None:
        return context, f"max_length=None: rows have at most {context} tokens, the context of the {role}."
    said = f"max_length is {max_length}, and the context of the {role} has {context} tokens."
    return context, f"{said} Rows have at most {context} tokens."


def short_rows_note(max_length: int | None, context: int | None) -> str | None:
    """A warning that training does not reach most of the context; None if it does.

    Args:
        max_length: longest training row, in tokens.
        context: tokens of the model's context.

    >>> short_rows_note(512, 8192)
    'Training rows have at most 512 tokens of a context of 8,192: positions from 512 on are not trained.'
    >>> short_rows_note(4096, 8192), short_rows_note(512, None)
    (None, None)
    """
    if max_length is None or context is None or max_length >= SHORT_ROWS * context:
        return None
    return (
        f"Training rows have at most {max_length:,} tokens of a context of {context:,}: positions from {max_length:,} "
        "on are not trained."
    )
