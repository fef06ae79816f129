"""Saving models and tokenizers so that Transformers 4.57 reads what Transformers 5 does.

Version 5 renamed config keys, and version 4 takes its defaults, without a word, for keys that it misses: a rotary base
of 10,000 and no scaling. So both spellings are written. A tokenizer's files are copied byte for byte where nothing in
them was changed.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MismatchError, checks_kinds
from .families import named_tensors
from .families.releases import IN_4_57, LOCAL_ROPE_THETA, OLDER_KEYS, OLDER_LAYER_TYPES, ROPE_KEYS, first_release
from .files import read_json, share_files, write_text
from .privacy import is_outside_folder

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

#: Files of tokenizers and processors.
PROCESSOR_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
)

CONFIG_NAME, SPECIAL_TOKENS_NAME, VOCABULARY_NAME = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
TEMPLATE_NAME, LEGACY_TEMPLATE_NAME = "chat_template.jinja", "chat_template.json"
#: Of these files, the ones that say nothing about the vocabulary.
SETTINGS_FILES = (CONFIG_NAME, SPECIAL_TOKENS_NAME, "*.jinja", LEGACY_TEMPLATE_NAME, "*processor_config.json")

#: How a tokenizer was loaded: nothing that another loader should read. Transformers 5.23 writes them all the same.
LOADING_ARGUMENTS = frozenset(
    {
        "backend",
        "cache_dir",
        "is_local",
        "local_files_only",
        "revision",
        "token",
        "trust_remote_code",
        "use_auth_token",
    }
)

#: What a fast tokenizer leaves in tokenizer.json of the last call with padding or truncation.
CALL_SETTINGS = ("padding", "truncation")


@checks_kinds
def save_model(
    model: PreTrainedModel, folder: str | os.PathLike[str], processing_class: Any = None, **kwargs: Any
) -> None:
    """Save a model, and its tokenizer beside it, as a checkpoint that both Transformers 4.57 and 5 can load.

    An architecture that is new in version 5 still needs version 5. The files differ from those of
    `model.save_pretrained` in config keys that version 5 ignores, and in tokenizer files that are copied from where
    the tokenizer was loaded. The plan of a student is written, too: comparisons with the teacher need the ids of a
    vocabulary that was cut.

    Args:
        model: a student, or any other model.
        folder: where to write; made if it is missing.
        processing_class: tokenizer or processor.
        **kwargs: passed on to `model.save_pretrained` (`max_shard_size`, …).

    Raises:
        MismatchError: if the vocabulary of a student was cut, and the tokenizer is still the teacher's.
    """
    _require_its_tokenizer(model, processing_class)
    model.save_pretrained(folder, **kwargs)
    share_files(folder)
    if processing_class is not None:
        save_processing_class(processing_class, folder)
    add_older_keys(folder)
    plan: Any = getattr(model, "pruning_plan", None)
    if plan is not None:
        plan.save_pretrained(folder)


def _require_its_tokenizer(model: PreTrainedModel, processing_class: Any) -> None:
    """Refuse the teacher's tokenizer beside a student whose vocabulary was cut: its ids mean other tokens."""
    vocabulary = getattr(getattr(model, "pruning_plan", None), "vocabulary", None)
    if processing_class is None or vocabulary is None:
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if max(tokenizer.get_vocab().values()) >= model.config.get_text_config().vocab_size:
        raise MismatchError(
            "The student's vocabulary was cut, and this is the tokenizer of the teacher. Pass "
            "prune_tokenizer(tokenizer, student.pruning_plan)."
        )


def in_stored_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model in the dtype that it will be stored in; in float32 if its values exceed the range of float16.

    As in `from_pretrained`, tensors that Transformers keeps in float32 (the biases of DeepSeek-V3's routers) and
    buffers that are not saved (rotary frequencies) stay as they are.

    Args:
        model: changed.
        dtype: None: its own.
    """
    import torch

    from .compat import is_kept_in_float32

    dtype = dtype or model.dtype
    limit = torch.finfo(torch.float16).max
    tensors = {
        name: one
        for name, one in named_tensors(model).items()
        if one.is_floating_point() and not is_kept_in_float32(model, name, dtype)
    }
    if dtype == torch.float16:
        wide = [name for name, one in tensors.items() if one.numel() and float(one.detach().abs().max()) > limit]
        if wide:
            logger.warning(
                "%s and %d other weights exceed the range of float16. The model is stored in float32; bfloat16 holds "
                "it, too.", wide[0], len(wide) - 1,
            )  # fmt: skip
            dtype = torch.float32
    for tensor in tensors.values():
        tensor.data = tensor.data.to(dtype)
    return model


def save_config(config: PretrainedConfig, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` as `save_model` does."""
    config.save_pretrained(folder)
    add_older_keys(folder)


def add_older_keys(folder: str | os.PathLike[str]) -> None:
    """Let Transformers 4.57 read what Transformers 5 saved in a folder: its config and its tokenizer's."""
    for name, completed in (("config.json", with_older_keys), (CONFIG_NAME, with_older_tokenizer_keys)):
        path = Path(folder) / name
        if path.is_file():
            values = read_json(path)
            if (changed := completed(values)) != values:
                write_text(path, json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `config.json` and what Transformers 4 calls the same: dtype and rotary positions.

    Configs inside it, such as that of the language model in a vision-language model, are completed likewise.
    """
    values = {
        key: with_older_keys(value) if isinstance(value, dict) and "model_type" in value else value
        for key, value in config.items()
    }
    if isinstance(config.get("dtype"), str):
        values["torch_dtype"] = config["dtype"]
    model_type = str(config.get("model_type"))
    values.update({older: config[key] for key, older in OLDER_KEYS.get(model_type, {}).items() if key in config})
    if names := OLDER_LAYER_TYPES.get(model_type):
        values["layer_types"] = [names.get(kind, kind) for kind in config.get("layer_types") or ()]
    if model_type in IN_4_57 and isinstance(config.get("rope_parameters"), dict):
        values.update(_older_rope_keys(model_type, config["rope_parameters"]))
    return values


def _older_rope_keys(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as version 4 writes them, from parameters for all layers or for every kind of layer."""
    whole = rope.get("full_attention", rope)  # version 4 scales the positions of these layers only
    if not isinstance(whole, dict) or "rope_theta" not in whole:
        return {}
    names = ROPE_KEYS.get(model_type, ROPE_KEYS["*"])
    values = {older: whole[key] for key, older in names.items() if key in whole}
    scaling = {key: value for key, value in whole.items() if key not in ROPE_KEYS["*"]}
    values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    local = rope.get("sliding_attention")
    if model_type in LOCAL_ROPE_THETA and isinstance(local, dict):
        values[LOCAL_ROPE_THETA[model_type]] = local["rope_theta"]
    return values


def least_transformers(config: Mapping[str, Any]) -> str | None:
    """The first release of Transformers that is known to load the model of a `config.json`; None if it is not known.

    Models that hold a language model were not tried, nor configs without the keys of version 4.
    """
    if "text_config" in config or with_older_keys(config) != config:
        return None
    width = (config.get("head_dim") or 0) * (config.get("num_attention_heads") or 0)
    return first_release(str(config.get("model_type")), implied_head_dim=width == config.get("hidden_size"))


def with_older_tokenizer_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `tokenizer_config.json` of Transformers 5 under names that version 4 has, too."""
    values = {key: value for key, value in config.items() if key not in LOADING_ARGUMENTS}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values


def save_processing_class(processing_class: Any, folder: str | os.PathLike[str]) -> None:
    """Save a tokenizer or processor; what was not changed since it was loaded is copied from there byte for byte.

    What was changed is found by saving it and its freshly loaded original, and comparing both. So a changed setting
    costs no other key of the original `tokenizer_config.json`.

    Args:
        processing_class: tokenizer or processor.
        folder: where to write; made if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        now, then = Path(scratch) / "now", Path(scratch) / "then"
        processing_class.save_pretrained(now)
        source = _source(processing_class)
        if source is None or not _save_again(type(processing_class), source, then):
            shutil.copytree(now, folder, dirs_exist_ok=True)
        else:
            _merge(now, then, source, folder)


def _source(processing_class: Any) -> Path | None:
    """The folder that a tokenizer or processor was loaded from, if it is still there."""
    from huggingface_hub import snapshot_download

    inner = getattr(processing_class, "tokenizer", processing_class)
    name = getattr(inner, "name_or_path", None)
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        revision = getattr(inner, "loaded_revision", None)
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(PROCESSOR_FILES), local_files_only=True)
        )
    except (OSError, ValueError):  # not in the cache
        return None


def _save_again(kind: Any, source: Path, folder: Path) -> bool:
    """Load the tokenizer in `source` and save it; False if it cannot be loaded."""
    try:
        kind.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    except Exception:  # whatever a tokenizer class raises: the caller writes all files anew
        return False
    return True


def _merge(now: Path, then: Path, source: Path, folder: Path) -> None:
    """Write the files of `source`, with what differs between `now` and `then`, which was made of `source`."""
    originals = {path.relative_to(source).as_posix(): path for path in _files(source, PROCESSOR_FILES)}
    # A link out of the folder is not followed: its content is written as the tokenizer class saves it, if at all.
    linked = {name for name, path in originals.items() if is_outside_folder(path, source)}
    originals = {name: path for name, path in originals.items() if name not in linked}
    saved, before = ({path.relative_to(root).as_posix() for path in _files(root, ("**/*",))} for root in (now, then))
    changed = {name for name in saved if _content(now / name) != _content(then / name)}
    gone = before - saved
    has_new_template = TEMPLATE_NAME in changed | gone
    if has_new_template:
        originals.pop(LEGACY_TEMPLATE_NAME, None)  # the old template, under a name that version 4 gave it
    other_words = {name for name in changed if not _matches(name, SETTINGS_FILES)}
    for name, path in originals.items():
        # Other forms of a vocabulary that was changed (tokenizer.model, merges.txt) would contradict it.
        if name not in changed | gone and (name in saved or not other_words or _matches(name, SETTINGS_FILES)):
            _copy(path, folder / name)
    for name in (changed - {CONFIG_NAME}) | (linked & saved):
        _copy(now / name, folder / name)
    template = {"chat_template"} if has_new_template else set()
    removed = template | ({"added_tokens_decoder"} if other_words else set())
    settings: dict[str, Any] = {}
    if CONFIG_NAME in changed:
        current, original = _content(now / CONFIG_NAME), _content(then / CONFIG_NAME) or {}
        settings = {key: value for key, value in current.items() if key not in original or original[key] != value}
        removed |= original.keys() - current.keys()
    for name in (CONFIG_NAME, SPECIAL_TOKENS_NAME):
        if (settings or removed) and (name in originals or name in changed):
            values = read_json(originals.get(name, then / name))
            tokens = {key: value for key, value in settings.items() if key in values or name == CONFIG_NAME}
            kept = {key: value for key, value in values.items() if key not in removed}
            write_text(folder / name, json.dumps({**kept, **tokens}, indent=2, ensure_ascii=False) + "\n")


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _copy(source: Path, target: Path) -> None:
    if not target.exists() or not target.samefile(source):
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _content(path: Path) -> Any:
    """What a file says: its bytes, or None if it is missing; of a tokenizer, not how it was loaded and called last."""
    if not path.is_file():
        return None
    if path.name in (VOCABULARY_NAME, CONFIG_NAME):
        return {
            key: value for key, value in read_json(path).items() if key not in {*CALL_SETTINGS, *LOADING_ARGUMENTS}
        }
    return path.read_bytes()
