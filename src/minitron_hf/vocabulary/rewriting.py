"""The tokenizer that emits kept tokens alone, under new ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import MismatchError, UnsupportedModelError
from .pieces import pieces_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Files of a saved tokenizer that hold its vocabulary in another form than tokenizer.json.
OTHER_FORMS = ("vocab.*", "merges.txt", "added_tokens.json", "*.model", "*.tiktoken", "tekken.json")
#: Post-processors without token ids.
WITHOUT_IDS = ("ByteLevel",)


def cut_tokenizer(tokenizer: Any, kept: np.ndarray) -> PreTrainedTokenizerBase:
    """The tokenizer that splits texts into kept tokens alone.

    Every text decodes to what it did. A text keeps its pieces where all of them are kept.

    Args:
        tokenizer: a fast tokenizer; not changed.
        kept: ids that stay, ascending (`choose_tokens`); the i-th becomes the id i.

    Raises:
        UnsupportedModelError: if the tokenizer cannot be rewritten.
    """
    from transformers import PreTrainedTokenizerFast

    whole = cut_json(tokenizer, kept)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for pattern in OTHER_FORMS:
            for path in Path(folder).glob(pattern):
                path.unlink()
        (Path(folder) / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        config = Path(folder) / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in settings:
            new = {str(old): str(place) for place, old in enumerate(kept)}
            decoder = settings["added_tokens_decoder"]
            settings["added_tokens_decoder"] = {new[old]: token for old, token in decoder.items() if old in new}
        # Classes that build the tokenizer in Python may build another one: then the plain class reads tokenizer.json.
        for kind in (type(tokenizer), PreTrainedTokenizerFast):
            settings["tokenizer_class"] = kind.__name__
            config.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
            cut: Any = kind.from_pretrained(folder)
            if _is_same(cut.backend_tokenizer, whole):
                break
        else:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} changes the tokens that it is given, so its vocabulary cannot be cut. "
                "Leave out vocab_size."
            )
    cut.name_or_path = ""  # its files are gone: `save_model` writes new ones
    cut.init_kwargs.pop("name_or_path", None)
    cut.deprecation_warnings.update(tokenizer.deprecation_warnings)
    return cut


def cut_json(tokenizer: Any, kept: np.ndarray) -> dict[str, Any]:
    """The `tokenizer.json` with kept tokens alone, under new ids.

    Raises:
        UnsupportedModelError: if it cannot be rewritten.
    """
    pieces = pieces_of(tokenizer)
    new_id = {int(old): new for new, old in enumerate(kept)}
    known: dict[str, int] = tokenizer.get_vocab()
    new_ids = {token: new_id[old] for token, old in known.items() if old in new_id}
    whole = dict(pieces.whole)
    if lost := [token["content"] for token in whole["added_tokens"] if token["content"] not in new_ids]:
        raise MismatchError(f"The added token {lost[0]!r} is not among the kept ones. Plan again.")
    whole["model"] = pieces.cut({token: index for token, index in new_ids.items() if token in pieces.tokens})
    whole["added_tokens"] = [{**token, "id": new_ids[token["content"]]} for token in whole["added_tokens"]]
    whole["post_processor"] = _renumbered(whole["post_processor"], new_ids)
    if whole["padding"]:
        whole["padding"] = {**whole["padding"], "pad_id": new_ids.get(whole["padding"]["pad_token"], 0)}
    if Tokenizer.from_str(json.dumps(whole)).get_vocab() != new_ids:
        raise UnsupportedModelError(
            "The ids of this tokenizer cannot be renumbered: its added tokens do not follow those of its model. Leave "
            "out vocab_size."
        )
    return whole


def _renumbered(processor: Any, new_ids: Mapping[str, int]) -> Any:
    """A post-processor with new ids.

    Raises:
        UnsupportedModelError: if it is of an unknown kind, or adds a token that the tokenizer does not have.
    """
    if processor is None or processor["type"] in WITHOUT_IDS:
        return processor
    try:
        if processor["type"] == "Sequence":
            return {**processor, "processors": [_renumbered(one, new_ids) for one in processor["processors"]]}
        if processor["type"] == "TemplateProcessing":
            special = {
                name: {**token, "ids": [new_ids[one] for one in token["tokens"]]}
                for name, token in processor["special_tokens"].items()
            }
            return {**processor, "special_tokens": special}
        if processor["type"] in ("BertProcessing", "RobertaProcessing"):
            return {**processor, **{end: [processor[end][0], new_ids[processor[end][0]]] for end in ("sep", "cls")}}
    except KeyError as error:
        raise UnsupportedModelError(
            f"The post-processor of this tokenizer adds {error}, which is none of its tokens. Leave out vocab_size."
        ) from error
    raise UnsupportedModelError(
        f"vocab_size cannot rewrite a post-processor of the kind {processor['type']}. Leave it out."
    )


def _is_same(backend: Any, whole: Mapping[str, Any]) -> bool:
    """Whether a tokenizer splits as its JSON says."""
    built, wanted = json.loads(backend.to_str()), json.loads(Tokenizer.from_str(json.dumps(whole)).to_str())
    sections = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return all(built[name] == wanted[name] for name in sections)
