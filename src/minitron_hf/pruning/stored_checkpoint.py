"""Opens checkpoints as models whose tensors stay on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from ..compat import as_stored, generation_config_inside, names_not_saved
from ..errors import HubError, UnsupportedModelError, shortened
from ..families import spec_for
from ..files import read_json
from ..models import empty_model, first_line, load_config
from ..names import local_folder
from ..publishing.card_values import LEGAL_FILES
from ..saving import PROCESSOR_FILES
from .stored_tensors import LazyTensor, lazy_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
#: Files beside the weights that the student takes over: tokenizer, chat templates, legal texts.
COPIED_FILES = (*PROCESSOR_FILES, *LEGAL_FILES)


def is_streamable(source: str | os.PathLike[str], *, revision: str | None = None) -> bool:
    """Whether a teacher is stored as safetensors; a model on the Hub is downloaded if so.

    Args:
        source: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        HubError: if it cannot be found or downloaded.
    """
    load_config(source, revision=revision)
    return bool(weight_names(_local_folder(source, revision)))


def _local_folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a checkpoint; a model on the Hub is downloaded, without files that are not needed."""
    found = local_folder(source)
    if found is not None:
        return found
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.json", *COPIED_FILES]))
        wanted = weight_names(folder) or [WEIGHTS_NAME]
        return Path(snapshot_download(str(source), revision=folder.name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise HubError(
            f"Cannot download {str(source)!r}: {first_line(error)} Check the connection and the space in the cache, "
            "or pass a local folder."
        ) from error


def weight_names(folder: Path) -> list[str]:
    """Names of the safetensors files of a checkpoint: one, or those that the index names. Empty if there are none."""
    if (folder / WEIGHTS_NAME).is_file():
        return [WEIGHTS_NAME]
    if (folder / WEIGHTS_INDEX_NAME).is_file():
        index = folder / WEIGHTS_INDEX_NAME
        named = read_json(index).get("weight_map")
        names: set[Any] = set(named.values()) if isinstance(named, dict) else {None}
        if strange := [
            name for name in names if not isinstance(name, str) or name != os.path.basename(name) or not name
        ]:
            raise UnsupportedModelError(
                f"{index} names {', '.join(map(repr, strange[:3]))}, expected files in its own folder. Save the model "
                "again with save_pretrained."
            )
        return sorted(names)
    return []


def open_checkpoint(source: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedModel:
    """The model that Transformers would load, with tensors that stay on disk: shapes at once, numbers when asked for.

    It can be planned with and cut, and has the digest of the loaded model. It cannot compute.

    Args:
        source: the folder of a safetensors checkpoint, or a Hub id (which is downloaded into the cache).
        revision: branch, tag or commit on the Hub.

    Raises:
        HubError: if it cannot be found or downloaded.
        UnsupportedModelError: if it is not a complete safetensors checkpoint of a family that can be pruned, without
            missing, surplus or other tensors.
    """
    config = load_config(source, revision=revision)
    spec_for(config)
    folder = _local_folder(source, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"The checkpoint {str(folder)!r} is quantised, so its rows and columns are not units of the model. "
            "Prune the unquantised checkpoint, and quantise the student."
        )
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"The folder {str(folder)!r} has an adapter beside the model, which Transformers puts on top of it. Merge "
            "it (`PeftModel.merge_and_unload`), save the model into another folder, and prune that."
        )
    model = _load_lazily(folder, config)
    model.config.name_or_path = str(folder)
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # like Transformers: the generation settings of the model's config
        model.generation_config = generation_config_inside(folder)
    return model


def _stored_tensors(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, by their names in it.

    Raises:
        UnsupportedModelError: if it holds no safetensors files, or not all of them.
    """
    names = weight_names(folder)
    if not names:
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern))
        found = f"only {', '.join(others[:3])}" if others else "no weights"
        raise UnsupportedModelError(
            f"{str(folder)!r} holds neither {WEIGHTS_NAME} nor {WEIGHTS_INDEX_NAME} ({found}), and only safetensors "
            "can be read in parts. Load it with load_model and save it with save_pretrained, which writes "
            "safetensors; or prune it in memory with apply_plan."
        )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UnsupportedModelError(
            f"{folder / WEIGHTS_INDEX_NAME} names {len(absent)} files that are not there: {shortened(absent)}. "
            "Copy or download the checkpoint again."
        )
    stored: dict[str, LazyTensor] = {}
    for name in names:
        stored |= lazy_tensors(folder / name)
    return stored


def _load_lazily(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Have Transformers load a checkpoint whose tensors stay on disk.

    Raises:
        UnsupportedModelError: if tensors are missing, surplus or of another shape.
    """
    stored = _stored_tensors(folder)
    stock: Any = type(empty_model(config))
    try:
        model, report = stock.from_pretrained(
            None,
            config=config,
            state_dict=stored,
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        absent = sorted(saved_tensors(empty_model(config)).keys() - stored.keys())
        raise UnsupportedModelError(
            f"The tensors of {str(folder)!r} do not make up a {stock.__name__}"
            f"{f' ({shortened(absent)} missing)' if absent else ''}: {first_line(error)} "
            "Check that the whole checkpoint was copied, and that it belongs to its config.json."
        ) from error
    problems = [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(
            f"{name} is {tuple(found)}, expected {tuple(expected)}"
            for name, found, expected in sorted(report["mismatched_keys"], key=str)
        ),
        *(f"{name} is not part of the model" for name in sorted(report["unexpected_keys"])),
    ]
    if problems:
        raise UnsupportedModelError(
            f"The checkpoint {str(folder)!r} is not exactly a {stock.__name__}: {shortened(problems, '; ')}. "
            "Expected a complete causal language model, its head included; check that the whole checkpoint was "
            "copied, and that it is not a base model or an adapter."
        )
    loaded: PreTrainedModel = model
    return loaded


def saved_tensors(model: PreTrainedModel) -> dict[str, Any]:
    """What `save_pretrained` would write, under the names and in the layout of the family's checkpoints."""
    state: dict[str, Any] = model.state_dict()
    for name in names_not_saved(model):
        state.pop(name, None)
    # Which tensors are one and the same, tensors without memory are asked by the parameters that they belong to.
    metas = {name: getattr(tensor, "meta", tensor) for name, tensor in state.items()}
    return {name: tensor.contiguous() for name, tensor in as_stored(model, state, metas).items()}
