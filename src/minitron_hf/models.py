"""Loads models, configs and tokenizers with clear errors, and counts and fingerprints them."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .compat import (
    CONFIG_NAME_KEY,
    decoder_types,
    forget_autocast,
    forward_before_autocast,
    has_image_text_class,
    note_commit,
    sound_text_class,
    without_deepspeed_config,
)
from .errors import DataError, UnsupportedModelError
from .families.tensors import is_quantised, own_parameters, text_config
from .files import digest
from .formats import INDICES_NAME, PLAN_NAME, read_artefact
from .hardware import as_device, as_dtype, default_device, is_fast, one_dtype
from .loading_errors import first_line as first_line
from .loading_errors import loading_error
from .names import is_repo_id, local_folder, local_path
from .privacy import is_outside_folder
from .weights import require_complete, without_gguf_remains

logger = logging.getLogger(__name__)

#: Fields of a generation config that only sampling reads.
SAMPLING_FIELDS = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")

#: Config fields that do not define the network: its author, how it is run, stored or decoded.
BOOKKEEPING_FIELDS = frozenset(
    {
        CONFIG_NAME_KEY,
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def load_model(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model, complete or not at all.

    If a checkpoint lacks parameters or holds them in another shape, Transformers fills them with random values and
    warns. Here this is an error.

    Args:
        model_or_path: a folder or a Hub id; a model object is returned without a trainer's wrappers (`plain_model`).
        dtype: None or `"auto"` keeps the dtype of the checkpoint.
        device: device to move the model to; None: the device that `from_pretrained` chose.
        revision: branch, tag or commit on the Hub.
        **kwargs: passed on to `from_pretrained` (`token`, `quantization_config`, …).

    Returns:
        The model, in evaluation mode.

    Raises:
        HubError: if the folder or repository cannot be found or read.
        UnsupportedModelError: if it does not hold a complete causal language model of a class in Transformers.
        DataError: if there is no such dtype.
        MismatchError: if `torch_dtype`, the old name of `dtype`, is given with another value.
    """
    if isinstance(model_or_path, torch.nn.Module):
        return plain_model(model_or_path)
    dtype = one_dtype(dtype, kwargs)
    name = _checked_name(model_or_path)
    names = ("token", "trust_remote_code", "local_files_only", "cache_dir", "gguf_file")
    shared = {name: kwargs[name] for name in names if name in kwargs}
    config = kwargs.pop("config", None) or load_config(name, revision=revision, **shared)
    try:
        loaded: Any = auto_class(config).from_pretrained(
            name,
            config=config,
            dtype=dtype or "auto",
            **_given(revision=revision),
            **{"trust_remote_code": False, "ignore_mismatched_sizes": True, **kwargs, "output_loading_info": True},
        )
    except Exception as error:
        raise loading_error("model", name, error, revision) from error
    model, report = without_gguf_remains(loaded[0]), loaded[1]
    require_complete(model, name, report)
    return model if device is None else model.to(device)


def load_for_compute(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model as `hardware` says: on an accelerator where there is one, in the stored dtype where that is fast.

    No weight is rounded unless a narrower dtype is asked for. A model object keeps its device and dtype.

    Args:
        model_or_path: a folder, a Hub id or a model object.
        dtype: None or `"auto"`: the checkpoint's, or float32 where the device is slow in that.
        device: None: `hardware.default_device`.
        **kwargs: as for `load_model`. With `device_map` the weights stay where it puts them.

    Raises:
        MinitronError: see `load_model`.
    """
    dtype = one_dtype(dtype, kwargs)
    device = default_device() if device is None else as_device(device)
    model = load_model(model_or_path, dtype=dtype, **kwargs)
    if isinstance(model_or_path, torch.nn.Module):
        return model
    if dtype in (None, "auto"):
        make_fast(model, device)
    placed = getattr(model, "hf_device_map", None) is not None or is_quantised(model)
    return model if placed else model.to(device)  # type: ignore[arg-type] # transformers hides torch's signature


def make_fast(model: PreTrainedModel, device: str | torch.device) -> None:
    """Give a model float32 weights where a device is slow in the dtype that they have; quantised ones stay."""
    if not is_quantised(model) and not is_fast(model.dtype, device):
        logger.info("%s is computed in float32: this hardware is slow in %s.", type(model).__name__, model.dtype)
        model.float()


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype in which a checkpoint is stored, as its config says; None where it does not."""
    return None if config.dtype is None else as_dtype(config.dtype)


def plain_model(model: Any) -> Any:
    """The model without the wrappers of a trainer in this process, and without traces of GGUF.

    Accelerate leaves a trained model under autocast, so that float32 weights would be computed in half precision, and
    a wrapper for several processes around it. The given object is not changed: trained on, it behaves as before.
    """
    model = without_gguf_remains(extract_model_from_parallel(model))
    original = forward_before_autocast(model)
    if original is None:
        return model
    plain = copy.copy(model)  # shares the weights
    forget_autocast(plain)
    plain.forward = types.MethodType(original.__func__, plain) if hasattr(original, "__func__") else original
    return plain


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that builds a whole model; for one with a language model inside, not the language model alone."""
    if text_config(config) is config and (config.model_type in decoder_types() or not has_image_text_class(config)):
        return AutoModelForCausalLM
    if has_image_text_class(config):
        return AutoModelForImageTextToText
    return sound_text_class(config) or AutoModelForCausalLM


def load_config(
    name_or_path: PretrainedConfig | str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
) -> PretrainedConfig:
    """Load a model's config, without its weights.

    Args:
        name_or_path: a folder or a Hub id; a config object is returned as it is.
        revision: branch, tag or commit on the Hub.
        **kwargs: passed on to `AutoConfig.from_pretrained`.

    Raises:
        HubError: if the folder or repository cannot be found or read.
        UnsupportedModelError: if it has no valid `config.json`, or Transformers does not know its architecture.
    """
    if isinstance(name_or_path, PretrainedConfig):
        return name_or_path
    name = _checked_name(name_or_path)
    file = kwargs.get("gguf_file", "config.json")
    if Path(name).is_dir() and not (Path(name) / file).is_file():
        raise UnsupportedModelError(
            f"The folder {name!r} has no {file}, so it is not a Transformers model. "
            "Pass the folder that save_pretrained wrote."
        )
    try:
        config = AutoConfig.from_pretrained(
            name, **_given(revision=revision), **{"trust_remote_code": False, **kwargs}
        )
    except Exception as error:
        raise loading_error("config", name, error, revision) from error
    if not Path(name).is_dir():
        note_commit(config, name, revision, file, kwargs.get("cache_dir"))
    return config


def load_tokenizer(
    name_or_path: PreTrainedTokenizerBase | str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name_or_path: a folder or a Hub id; or a tokenizer, which is returned; or a processor, whose tokenizer is
            returned.
        revision: branch, tag or commit on the Hub.
        **kwargs: passed on to `AutoTokenizer.from_pretrained`.

    Raises:
        HubError: if the folder or repository cannot be found or read.
        DataError: if it holds no tokenizer.
    """
    tokenizer = getattr(name_or_path, "tokenizer", name_or_path)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    name = _checked_name(name_or_path)
    _require_own_templates(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, **{"trust_remote_code": False, **_given(revision=revision), **kwargs}
        )
    except Exception as error:
        raise loading_error("tokenizer", name, error, revision) from error
    # Documents may be longer than the context: rows are cut from them. TRL and chat templates pass no `verbose=False`.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    tokenizer.loaded_revision = revision  # so that `save_model` finds the files again
    return tokenizer


def read_chat_template(source: str, setting: str = "chat_template_path") -> str:
    """The chat template that a setting names.

    Args:
        source: a Jinja file, or the folder or Hub id of a tokenizer.
        setting: its name, for messages.

    Raises:
        DataError: if there is none.
        HubError: if the repository cannot be read.
    """
    path = local_path(source, what=setting, error=DataError)
    if path is not None and path.is_file():
        if path.suffix not in (".jinja", ".j2"):
            raise DataError(f"{setting}={source!r}: TRL reads files that end with .jinja or .j2. Rename it.")
        return path.read_text(encoding="utf-8")
    if path is None and not is_repo_id(source):
        raise DataError(f"{setting}={source!r}: there is no such file, folder or Hub id.")
    template: str | None = load_tokenizer(source).chat_template
    if template is None:
        raise DataError(f"{setting}={source!r}: this tokenizer has no chat template.")
    return template


def load_processor(name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load the processor of a vision-language model.

    Args:
        name_or_path: a folder or a Hub id.
        **kwargs: passed on to `AutoProcessor.from_pretrained`.

    Raises:
        HubError: if the folder or repository cannot be found or read.
        DataError: if it holds no processor.
    """
    name = _checked_name(name_or_path)
    _require_own_templates(Path(name))
    try:
        return AutoProcessor.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except Exception as error:
        raise loading_error("processor", name, error, kwargs.get("revision")) from error


def _require_own_templates(folder: Path) -> None:
    """Refuse chat templates that are links out of their folder: any text is one, and is saved with every student."""
    for path in (*folder.glob("chat_template*"), *folder.glob("additional_chat_templates/*")):
        if is_outside_folder(path, folder):
            raise DataError(f"{path} is a link out of its folder. Put a copy of the chat template in its place.")


def cut_plan_files(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> tuple[Path, Path] | None:
    """Both files of the plan of a student whose vocabulary was cut, from its folder or its repository on the Hub.

    Args:
        name_or_path: folder or Hub id, whose files are downloaded into the cache.
        revision: branch, tag or commit on the Hub.

    Returns:
        None where there are no such files, or the Hub cannot be asked for them.
    """
    from huggingface_hub import hf_hub_download

    name = os.path.expanduser(os.fspath(name_or_path))
    plan, indices = Path(name) / PLAN_NAME, Path(name) / INDICES_NAME
    with contextlib.suppress(OSError, ValueError):  # no repository, or no such file in it
        if not Path(name).is_dir():
            plan = Path(hf_hub_download(name, PLAN_NAME, revision=revision))
            indices = Path(hf_hub_download(name, INDICES_NAME, revision=plan.parent.name))  # of the same commit
    if not plan.is_file() or not indices.is_file() or read_artefact(plan).get("vocabulary") is None:
        return None
    return plan, indices


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The stock model of a config on the meta device: names and shapes of all parameters, no memory for them.

    Raises:
        UnsupportedModelError: if Transformers has no causal language model for the config, or cannot build it.
    """
    try:
        with torch.device("meta"), without_deepspeed_config():
            # A copy, because building a model may write its attention implementation into the config.
            # A config class of remote code exists only where its code was trusted when it was loaded.
            trusted = type(config).__module__.startswith("transformers_modules.")
            model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trusted)
            return model
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"Transformers has no causal language model for model_type {config.model_type!r}. "
                "Pass a decoder-only language model."
            ) from error
        raise UnsupportedModelError(
            f"Transformers cannot build a {config.model_type!r} model from this config: {first_line(error)}"
        ) from error


def savable_generation_config(config: GenerationConfig) -> GenerationConfig:
    """A copy that Transformers saves, of the generation config of a published model.

    Some have a temperature or the like without `do_sample`, which is then set, or with `do_sample=False`, under which
    these values have no effect and are left out. Transformers saves them as they are, but not once a trainer has added
    a token id to them.

    Raises:
        DataError: if it is invalid in another way.
    """
    config = copy.deepcopy(config)
    greedy: dict[str, Any] = dict.fromkeys(SAMPLING_FIELDS)
    for changes in ({}, {"do_sample": True} if config.do_sample is None else greedy):
        for name, value in changes.items():
            setattr(config, name, value)
        try:
            config.validate(strict=True)
            return config
        except ValueError as error:
            invalid = error
    raise DataError(f"The generation config of the model cannot be saved: {invalid}\nMend its generation_config.json.")


def count_parameters(config_or_model: PretrainedConfig | PreTrainedModel, *, embeddings: bool = True) -> int:
    """Number of parameters; tied ones count once.

    Args:
        config_or_model: a config is counted on the meta device, without memory for weights. So is a quantised model,
            whose stored tensors pack several parameters into one element.
        embeddings: False leaves out the token embedding and the output head (the Minitron papers report
            both numbers); learned position embeddings stay in.

    Raises:
        UnsupportedModelError: see `empty_model`.
    """
    model = config_or_model
    if is_quantised(model):
        model = model.config
    if isinstance(model, PretrainedConfig):
        model = empty_model(model)
    excluded: set[int] = set()
    if not embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                excluded.update(id(parameter) for parameter in module.parameters())
    return sum(parameter.numel() for _, parameter in own_parameters(model) if id(parameter) not in excluded)


def architecture_digest(config: PretrainedConfig) -> str:
    """Digest of the config fields that define the network: all but `BOOKKEEPING_FIELDS`.

    Returns:
        `"sha256:<hex>"`.
    """

    def essential(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            key: essential(value) if isinstance(value, dict) else value
            for key, value in fields.items()
            if key not in BOOKKEEPING_FIELDS
        }

    return digest({**essential(config.to_diff_dict()), "model_type": config.model_type})


@contextlib.contextmanager
def evaluating(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Put models into evaluation mode, and afterwards every module back into the mode it had."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _checked_name(name_or_path: str | os.PathLike[str]) -> str:
    """The name as a string; refuses files, and paths where nothing is."""
    if not isinstance(name_or_path, str | os.PathLike):
        saved = " Save it first, and pass its folder." if hasattr(name_or_path, "save_pretrained") else ""
        raise UnsupportedModelError(f"Expected a folder or a Hub id, got {type(name_or_path).__name__}.{saved}")
    local_folder(name_or_path)
    return os.path.expanduser(os.fspath(name_or_path))


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}
