"""The number of tokens that a request keeps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..families import is_multimodal, text_config
from ..vocabulary.ids import names_ids
from .legality import _round_fraction, rounding_step
from .request import PrunerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


#: Fields of every config that name tokens of text.
TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
#: Numbers in the configs of models around a language model that may be ids under other names.
_OTHER_IDS = re.compile(r"_(id|ids|idx|index|indices)$")


def require_known_ids(config: PretrainedConfig, request: PrunerConfig) -> None:
    """Refuse a cut of the vocabulary inside a model whose tokens of images or sound the config does not name.

    Raises:
        PlanError: if there is one; says why.
    """
    if request.vocab_size is None or not is_multimodal(config):
        return
    text = text_config(config)
    own = {name: value for name, value in config.to_dict().items() if isinstance(value, int | list) and value}
    rows = text.vocab_size
    others = [name for name in own if _OTHER_IDS.search(name) and not names_ids(name) and "ignore" not in name]
    # Idefics 3 stores its token of padding under a private name.
    media = {name: value for name, value in own.items() if names_ids(name) and name.lstrip("_") not in TEXT_IDS}
    outside = [name for name, value in media.items() if isinstance(value, int) and value >= rows]
    maps = [name for name, value in config.to_dict().items() if isinstance(value, dict) and _is_id_map(name, value)]
    reason = ""
    if text is config:
        reason = "the configs of its towers name the tokens that stand for images or sound, and are kept as they are"
    elif maps:
        reason = f"{', '.join(maps)} of its config holds the ids of tokens that images become"
    elif others:
        reason = f"{', '.join(others)} of its config may be ids of tokens, and nothing tells whether they are"
    elif not media:
        reason = "its config does not name the tokens that stand for images or sound"
    elif outside:
        reason = f"{', '.join(outside)} of its config lie outside the {rows} rows of the embeddings"
    if reason:
        raise PlanError(f"vocab_size of this '{config.model_type}' model cannot be cut: {reason}. Leave it out.")


def _is_id_map(name: str, value: dict[str, object]) -> bool:
    """Whether a dict of a config gives tokens their ids."""
    return "vocab" in name and any(isinstance(one, int) for one in value.values())


def vocabulary_after(before: int, request: PrunerConfig) -> int:
    """Number of tokens to keep; a fraction is rounded like a number of channels.

    Raises:
        PlanError: if it is larger than the teacher's, or a fraction below 1 that comes to no change.
    """
    size = request.vocab_size
    if isinstance(size, float):
        step = rounding_step(before, 1, request.multiple_of, size)
        size, given = (before, size) if size == 1 else (_round_fraction(size, before, step), size)
        if size == before and given < 1:
            raise PlanError(f"vocab_size={given} of {before} comes to no change: give fewer, or leave it out.")
    assert size is not None
    if size > before:
        raise PlanError(f"vocab_size={size} is larger than the teacher's {before}. Pruning only removes.")
    return int(size)
