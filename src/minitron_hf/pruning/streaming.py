"""Prunes a checkpoint without loading it: reads the teacher's shards and writes the student's, a few rows at a time.

The teacher is loaded by Transformers as usual, names converted and experts stacked, but of tensors that stay on disk
(`LazyTensor`); `apply_plan` cuts those; and what Transformers would save is written as `save_pretrained` does, each
number read when it is written. What happens to a checkpoint in memory happens here by the same code.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..compat import as_stored, generation_config_inside, names_not_saved, storage_id
from ..errors import HubError, OutputError, PlanError, UnsupportedModelError, shortened
from ..families import spec_for
from ..files import local_folder, read_json, replacing_folder, require_empty, write_text
from ..models import empty_model, first_line, load_config
from ..privacy import is_outside_folder
from ..publishing.card_values import LEGAL_FILES
from ..saving import PROCESSOR_FILES, save_config
from .stored_tensors import DTYPES, Computed, LazyTensor, lazy_tensors
from .surgery import apply_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .plan import PruningPlan

logger = logging.getLogger(__name__)

WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
#: Files beside the weights that the student takes over: tokenizer, chat templates, legal texts.
COPIED_FILES = (*PROCESSOR_FILES, *LEGAL_FILES)


def prune_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    revision: str | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Prune a checkpoint from folder to folder; only a few rows of one tensor are in memory at a time.

    The files equal those of `apply_plan` and `save_model`, byte for byte. The folder appears when it is complete.

    Args:
        source: the teacher: the folder of a safetensors checkpoint, or a Hub id (which is downloaded into the cache).
        target: folder for the student: weights, configs, the plan, and the teacher's tokenizer and legal texts.
        plan: plan for this teacher.
        revision: branch, tag or commit on the Hub.
        max_shard_size: as in `save_pretrained`.
        overwrite: replace the content of `target`.
        show_progress: show a progress bar.

    Returns:
        `target`.

    Raises:
        HubError: if the teacher cannot be found or downloaded.
        UnsupportedModelError: see `open_checkpoint`.
        MismatchError: if the plan was made for another architecture or other weights.
        OutputError: if `target` holds files already, or the disk has too little space for the student.
    """
    target = Path(target)
    _require_no_basis(plan)
    if not overwrite:
        require_empty(target)
    teacher = open_checkpoint(source, revision=revision)
    folder = Path(str(teacher.config.name_or_path))
    student = apply_plan(teacher, plan)
    tensors: dict[str, LazyTensor] = _saved_tensors(student)
    copied = _copied_files(folder)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _require_room(target, size + sum(path.stat().st_size for path in copied))
    with (
        replacing_folder(target) as temporary,
        tqdm(total=size, unit="B", unit_scale=True, desc="Pruning", disable=not show_progress) as progress,
    ):
        _write_weights(temporary, tensors, student.num_parameters(), max_shard_size, progress)
        for path in copied:
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        plan.save_pretrained(temporary)
        if student.can_generate():
            student.generation_config.save_pretrained(temporary)
        student.config.architectures = [type(student).__name__]
        student.config.dtype = str(student.dtype).removeprefix("torch.")
        save_config(student.config, temporary)
    return target


def _require_no_basis(plan: PruningPlan) -> None:
    if plan.basis is not None:
        raise PlanError(
            "This plan rotates the residual stream (hidden_basis), which needs the teacher in memory. Call "
            "apply_plan(model, plan), or plan without hidden_basis."
        )


def _write_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], num_parameters: int, max_shard_size: int | str, progress: tqdm
) -> None:
    """Write safetensors files as `save_pretrained` does: one, or shards and their index."""
    shards = split_state_dict_into_shards_factory(
        dict(tensors),
        max_shard_size=max_shard_size,
        filename_pattern="model{suffix}.safetensors",
        # Tensors that share memory go into one shard.
        get_storage_size=lambda tensor: tensor.meta.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: storage_id(tensor.meta),
    )
    for name, names in shards.filename_to_tensors.items():
        _write_safetensors(folder / name, {name: tensors[name] for name in names}, progress)
    if shards.is_sharded:
        metadata = {"total_parameters": num_parameters, **shards.metadata}
        index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
        write_text(folder / WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copied_files(folder: Path) -> list[Path]:
    """The teacher's files that go with the student, without links to what lies elsewhere."""
    copied = [path for pattern in COPIED_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    linked = [path for path in copied if is_outside_folder(path, folder)]
    if linked:
        names = ", ".join(path.name for path in linked)
        logger.warning("%s: links out of the folder are not copied into the student (%s).", folder, names)
    return [path for path in copied if path not in linked]


def is_streamable(source: str | os.PathLike[str], *, revision: str | None = None) -> bool:
    """Whether a teacher is stored as safetensors; a model on the Hub is downloaded if so.

    Args:
        source: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        HubError: if it cannot be found or downloaded.
    """
    load_config(source, revision=revision)
    return bool(_weight_names(_local_folder(source, revision)))


# The teacher


def _local_folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a checkpoint; a model on the Hub is downloaded, without files that are not needed."""
    found = local_folder(source)
    if found is not None:
        return found
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.json", *COPIED_FILES]))
        wanted = _weight_names(folder) or [WEIGHTS_NAME]
        return Path(snapshot_download(str(source), revision=folder.name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise HubError(
            f"Cannot download {str(source)!r}: {first_line(error)} Check the connection and the space in the cache, "
            "or pass a local folder."
        ) from error


def _weight_names(folder: Path) -> list[str]:
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
    names = _weight_names(folder)
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
        absent = sorted(_saved_tensors(empty_model(config)).keys() - stored.keys())
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


# The student


def _saved_tensors(model: PreTrainedModel) -> dict[str, Any]:
    """What `save_pretrained` would write, under the names and in the layout of the family's checkpoints."""
    state: dict[str, Any] = model.state_dict()
    for name in names_not_saved(model):
        state.pop(name, None)
    # Which tensors are one and the same, tensors without memory are asked by the parameters that they belong to.
    metas = {name: getattr(tensor, "meta", tensor) for name, tensor in state.items()}
    return {name: tensor.contiguous() for name, tensor in as_stored(model, state, metas).items()}


def _write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], progress: tqdm) -> None:
    """Write the file that `safetensors.torch.save_file` would, reading a block at a time."""
    rank = {dtype: position for position, dtype in enumerate(DTYPES.values())}
    label = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-rank[item[1].dtype], item[0]))
    ends = list(itertools.accumulate(tensor.nbytes for _, tensor in ordered))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, tensor), start, end in zip(ordered, [0, *ends], ends):
        header[name] = {"dtype": label[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _read_ahead(
            _finite(block, name, tensor) for name, tensor in ordered for block in tensor.blocks()
        ):
            file.write(block.reshape(-1).view(torch.uint8).numpy().data)
            progress.update(block.nbytes)
            del block  # before the next but one is read
        file.flush()
        os.fsync(file.fileno())


def _finite(block: torch.Tensor, name: str, tensor: LazyTensor) -> torch.Tensor:
    """A block of a tensor, unless computed values of it exceed the range of float16."""
    if block.dtype == torch.float16 and isinstance(tensor.recipe, Computed) and bool(block.isinf().any()):
        raise UnsupportedModelError(
            f"{name}: a value exceeds the range of float16, {torch.finfo(torch.float16).max:,.0f}. Save the teacher "
            "in bfloat16 or float32 and prune that."
        )
    return block.contiguous()


def _read_ahead(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same blocks, each of them read while the one before is written."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, blocks, None)
        while (block := upcoming.result()) is not None:
            upcoming = reader.submit(next, blocks, None)
            yield block


def _require_room(target: Path, size: int) -> None:
    """Refuse a student that the disk cannot hold."""
    parents: Iterable[Path] = (path for path in target.absolute().parents if path.is_dir())
    parent = next(iter(parents))
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OutputError(
            f"The student needs {size:,} bytes, and the disk of {parent} has {free:,} left. "
            "Free space or choose another folder."
        )
