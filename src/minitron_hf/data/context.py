"""Context lengths of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def context_length(config: PretrainedConfig) -> int | None:
    """Longest row that a model supports, in tokens; None if its config names no limit."""
    config = config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if limit and factor and original:  # some configs hold the length before scaling
        limit = max(limit, int(factor * original))
    return limit or None


def shortest_context(*configs: PretrainedConfig) -> int | None:
    """The shortest context of several models, in tokens; None if none has a limit."""
    return min((length for config in configs if (length := context_length(config)) is not None), default=None)
