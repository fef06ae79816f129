"""Checks that several tokenizers have the same vocabulary."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MismatchError
from .tokens import text_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refuse_other_tokenizers(processing_class: Any, **models: Any) -> None:
    """Refuse tokenizers that map an id to different tokens: the given one, and those stored beside the models.

    Vocabularies of equal size may hold different tokens, and then everything that is computed from ids is wrong.
    Tokens that were added to a tokenizer may differ, because special tokens get other names and uses.

    Args:
        processing_class: tokenizer or processor; None compares the models' own tokenizers.
        **models: role → model, or a path or Hub id; models without a tokenizer are skipped.

    Raises:
        MismatchError: naming an id and its tokens.
    """
    known = [] if processing_class is None else [("processing_class", text_tokenizer(processing_class))]
    names: set[str] = set()
    for role, model in models.items():
        name = _name_of(model)
        if name and name not in names and (tokenizer := stored_tokenizer(name)) is not None:
            known.append((f"the tokenizer of the {role} ({name})", tokenizer))
        names.add(name or "")
    for who, tokenizer in known[1:]:
        tokens, others = _tokens(known[0][1]), _tokens(tokenizer)
        differing = [index for index in sorted(tokens.keys() & others.keys()) if tokens[index] != others[index]]
        if differing:
            first = differing[0]
            raise MismatchError(
                f"{known[0][0]} and {who} differ: of {len(tokens.keys() & others.keys())} ids that both have, "
                f"{len(differing)} mean different tokens; {first} is {tokens[first]!r} and {others[first]!r}. Pass "
                "the tokenizer that belongs to the models, and models that share one."
            )


def stored_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, or in the cache of a Hub id; None if there is none. Uses no network."""
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not any(Path(name).glob("*token*")) and not any(Path(name).glob("vocab.*")):
        return None
    with contextlib.suppress(Exception):  # no tokenizer can be read, for whatever reason
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
        return tokenizer
    return None


def _name_of(model: Any) -> str | None:
    if isinstance(model, str | os.PathLike):
        return os.path.expanduser(os.fspath(model))
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or None


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.get_added_vocab()
    return {index: token for token, index in tokenizer.get_vocab().items() if token not in added}
