"""Token ids in configs and generation configs: which there are, and their new numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..models import savable_generation_config

if TYPE_CHECKING:
    from transformers import GenerationConfig

#: Fields of a generation config with lists of ids that are never generated: dropped tokens are left out.
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
#: Those with lists of sequences that are avoided: sequences with dropped tokens cannot occur.
AVOIDED = ("bad_words_ids",)
#: Those that would force, or change the odds of, sequences of ids.
REFUSED = ("force_words_ids", "sequence_bias", "forced_decoder_ids")


def names_ids(name: str) -> bool:
    """Whether a field of a config or a processor holds a token id, or a list of them.

    >>> names_ids("eos_token_id"), names_ids("special_token_ids"), names_ids("image_token_index")
    (True, True, True)
    >>> names_ids("hidden_size")
    False
    """
    return name.endswith(("_token_id", "_token_ids", "_token_index"))


def names_processor_ids(name: str) -> bool:
    """The same for an attribute of a processor, which holds no other numbers under such names.

    >>> names_processor_ids("video_start_id"), names_processor_ids("row_col_ids"), names_processor_ids("image_seq_len")
    (True, True, False)
    """
    return names_ids(name) or name.endswith(("_id", "_ids"))


def ids_in(fields: Mapping[str, Any], num_rows: int) -> set[int]:
    """The ids that the fields of a config name, of those that the model has.

    >>> sorted(ids_in({"eos_token_id": [3, 5], "pad_token_id": -1, "bos_token_id": None, "hidden_size": 4}, 8))
    [3, 5]
    """
    found = {index for name, value in fields.items() if names_ids(name) for index in _numbers(value)}
    return {index for index in found if 0 <= index < num_rows}


def _numbers(value: Any) -> Iterator[int]:
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int) and not isinstance(one, bool):
            yield one


def renumbered_fields(
    fields: Mapping[str, Any],
    new_ids: Mapping[int, int],
    num_rows: int,
    names: Callable[[str], bool] = names_ids,
) -> dict[str, Any]:
    """The fields of a config that name token ids, with their new ids; None where the token does not stay.

    Numbers that are no ids of the teacher, such as -1, stay what they are.

    >>> renumbered_fields({"eos_token_id": [3, 5], "pad_token_id": -1, "bos_token_id": 4, "a": 1}, {3: 0, 5: 1}, 8)
    {'eos_token_id': [0, 1], 'pad_token_id': -1, 'bos_token_id': None}
    """

    def new(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [new_ids[one] for one in value if one in new_ids] or None
        is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_rows
        return new_ids.get(value) if is_id else value

    return {name: new(value) for name, value in fields.items() if names(name)}


def renumbered_generation_config(
    config: GenerationConfig, new_ids: Mapping[int, int], num_rows: int
) -> GenerationConfig:
    """A copy of a generation config with new ids.

    Raises:
        PlanError: if it forces sequences of tokens.
    """
    config = copy.deepcopy(config)
    if found := [name for name in REFUSED if getattr(config, name, None)]:
        raise PlanError(
            f"The teacher's generation config has {', '.join(found)}, whose token ids cannot be renumbered. Remove it "
            "from the teacher, or leave out vocab_size."
        )
    for name, value in renumbered_fields(vars(config), new_ids, num_rows).items():
        setattr(config, name, value)
    for name in SUPPRESSED:
        if ids := getattr(config, name, None):
            setattr(config, name, [new_ids[one] for one in ids if one in new_ids] or None)
    for name in AVOIDED:
        if words := getattr(config, name, None):
            kept = [[new_ids[one] for one in word] for word in words if all(one in new_ids for one in word)]
            setattr(config, name, kept or None)
    return savable_generation_config(config)
