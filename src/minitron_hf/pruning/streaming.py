"""Prunes a checkpoint without loading it: reads the teacher's shards and writes the student's, a few rows at a time.

A repair runs the teacher layer by layer (`repair_passes`); refitted weights wait on disk until they are cut. The
teacher is loaded by Transformers as usual, names converted and experts stacked, but of tensors that stay on disk
(`LazyTensor`); `apply_plan` cuts those; and what Transformers would save is written as `save_pretrained` does, each
number read when it is written. What happens to a checkpoint in memory happens here by the same code.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm.auto import tqdm

from ..compat import storage_id
from ..data import DataSource
from ..errors import OutputError, PlanError, UnsupportedModelError, checks_kinds
from ..evaluation.loading import load_reader
from ..families import named_tensors, spec_for
from ..files import refuse_own_folder, remove, replacing_folder, require_free, write_text
from ..hardware import as_device, as_dtype, default_device
from ..models import load_processor, load_tokenizer
from ..privacy import is_outside_folder
from ..publishing.card_values import LEGAL_FILES
from ..saving import save_config, save_processing_class
from ..weights import set_tensor, tensor_values
from .repair import refit, refitted_bytes
from .stored_checkpoint import COPIED_FILES, WEIGHTS_INDEX_NAME, open_checkpoint, saved_tensors
from .stored_layers import for_compute
from .stored_tensors import DTYPES, Computed, LazyTensor, on_disk
from .surgery import apply_plan
from .tokenizers import prune_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import PruningPlan

logger = logging.getLogger(__name__)

#: Files of a processor of images or sound, of which a folder may have either.
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")


@checks_kinds
def prune_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    data: DataSource | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    show_progress: bool = True,
    **repair_arguments: Any,
) -> Path:
    """Prune a checkpoint from folder to folder; only a few rows of one tensor are in memory at a time.

    Long because all arguments are explained.

    The files equal those of `prune_with_plan` and `save_model`, byte for byte. The folder appears when it is complete.
    A repair needs the tensors of one layer, its sums, and its inputs for all calibration tokens, too.

    Args:
        source: the teacher: the folder of a safetensors checkpoint, or a Hub id (which is downloaded into the cache).
        target: folder for the student: weights, configs, plan, and the teacher's tokenizer and legal texts.
        plan: plan for this teacher.
        data: calibration data for a repair, as for `repaired_weights`.
        processing_class: tokenizer for texts, processor for images; default: the teacher's.
        revision: branch, tag or commit on the Hub.
        device: where a repair computes; default: an accelerator if there is one.
        dtype: in which a repair or a change of basis computes; default: as `load_for_compute` chooses.
        max_shard_size: as in `save_pretrained`.
        overwrite: replace the content of `target`.
        show_progress: show a progress bar.
        **repair_arguments: passed on to `repaired_weights` (`num_rows`, `max_length`, `memory_limit`, …).

    Returns:
        `target`.

    Raises:
        PlanError: if the plan has a repair and there is no data, or the reverse.
        HubError: if the teacher cannot be found or downloaded.
        UnsupportedModelError: see `open_checkpoint`.
        MismatchError: if the plan was made for another architecture or other weights.
        OutputError: if `target` holds files already, or the teacher, or the disk has too little space for the student.
    """
    target = Path(target)
    _require_data(plan, data, repair_arguments)
    refuse_own_folder(target, teacher=source)
    require_free(target, overwrite=overwrite, teacher=source)
    teacher = open_checkpoint(source, revision=revision)
    folder = Path(str(teacher.config.name_or_path))
    weights = _student_bytes(teacher, plan)  # refuses the plan of another teacher, before that one's tokenizer
    copied, tokenizer = _companions(folder, plan)
    size = weights + sum(path.stat().st_size for path in copied.values())
    _require_room(target, size)
    if data is not None and processing_class is None:
        processing_class = load_reader(folder, data)
    repair_arguments |= {"processing_class": processing_class, "show_progress": show_progress}
    repair_arguments["device"] = as_device(device or default_device())
    with replacing_folder(target) as temporary:
        student, plan = _build_student(teacher, plan, dtype, data, temporary / "refitted", size, repair_arguments)
        _write_student(temporary, student, plan, copied, tokenizer, max_shard_size, show_progress)
        remove(temporary / "refitted", missing_ok=True)
    return target


def _student_bytes(teacher: PreTrainedModel, plan: PruningPlan) -> int:
    """Bytes of the student's weights."""
    plain = apply_plan(teacher, replace(plan, repair=None, basis=None))
    return sum(tensor.nbytes for tensor in saved_tensors(plain).values())


def _build_student(
    teacher: PreTrainedModel,
    plan: PruningPlan,
    dtype: str | torch.dtype | None,
    data: DataSource | None,
    folder: Path,
    size: int,
    repair_arguments: Mapping[str, Any],
) -> tuple[PreTrainedModel, PruningPlan]:
    """The student, whose tensors are on disk, and the plan with the notes of its repair.

    Args:
        teacher: its tensors are on disk.
        plan: the plan.
        dtype: see `prune_checkpoint`.
        data: see there.
        folder: for refitted weights, which stay until the student is written; made where there are any.
        size: bytes of the student's files.
        repair_arguments: of `refit`.
    """
    if not plan.repair and plan.basis is None:
        return apply_plan(teacher, plan), plan
    computed = for_compute(teacher, repair_arguments["device"], None if dtype in (None, "auto") else as_dtype(dtype))
    refitted = None
    notes: list[str] = []
    if plan.repair:
        assert data is not None
        _require_room(folder.parent, size, refitted_bytes(computed, plan))
        refitted = on_disk(refit(computed, plan, data, notes=notes, **repair_arguments), folder)
    student = apply_plan(computed, plan, repaired=refitted)
    theirs = named_tensors(teacher)
    for name, source, _ in spec_for(teacher.config).student_tensors(theirs, student.config, plan.layers_kept):
        set_tensor(student, name, tensor_values(student, name).detach().to(theirs[source].dtype))
    student.tie_weights()
    return student, plan.with_notes(*notes)


def _require_data(plan: PruningPlan, data: DataSource | None, repair_arguments: Mapping[str, Any]) -> None:
    """Refuse a repair without data, and the reverse."""
    if plan.repair and data is None:
        raise PlanError(
            f"This plan has the repair {plan.repair!r}, which needs calibration data. Call "
            "prune_checkpoint(source, target, plan, data=texts), or plan without repair."
        )
    if not plan.repair and (data is not None or repair_arguments):
        names = ", ".join(["data"] * (data is not None) + [*repair_arguments])
        raise PlanError(f"This plan has no repair, so {names} would have no effect. Plan with PrunerConfig(repair=…).")


def _write_student(
    target: Path,
    student: PreTrainedModel,
    plan: PruningPlan,
    copied: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
    show_progress: bool,
) -> None:
    """Write weights, configs, the plan, and copies of the teacher's files.

    Args:
        target: folder.
        student: its tensors are on disk.
        plan: the plan.
        copied: name → the teacher's file.
        tokenizer: the student's, where the teacher's is not copied.
        max_shard_size: see `prune_checkpoint`.
        show_progress: see there.
    """
    tensors: dict[str, LazyTensor] = saved_tensors(student)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Pruning", disable=not show_progress) as progress:
        _write_weights(target, tensors, student.num_parameters(), max_shard_size, progress)
    for name, path in copied.items():
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if tokenizer is not None:
        save_processing_class(tokenizer, target)
    plan.save_pretrained(target)
    if student.can_generate():
        student.generation_config.save_pretrained(target)
    student.config.architectures = [type(student).__name__]
    student.config.dtype = str(student.dtype).removeprefix("torch.")
    save_config(student.config, target)


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


def _companions(folder: Path, plan: PruningPlan) -> tuple[dict[str, Path], Any]:
    """The teacher's files to copy, and the student's tokenizer or processor where it is another one; else None."""
    if plan.vocabulary is None:
        return _copied_files(folder, COPIED_FILES), None
    load = load_processor if any((folder / name).is_file() for name in PROCESSOR_CONFIGS) else load_tokenizer
    return _copied_files(folder, LEGAL_FILES), prune_tokenizer(load(folder), plan)


def _copied_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The teacher's files that go with the student by their names, without links to what lies elsewhere."""
    copied = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    linked = [path for path in copied if is_outside_folder(path, folder)]
    if linked:
        names = ", ".join(path.name for path in linked)
        logger.warning("%s: links out of the folder are not copied into the student (%s).", folder, names)
    return {str(path.relative_to(folder)): path for path in copied if path not in linked}


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


def _require_room(target: Path, size: int, waiting: int = 0) -> None:
    """Refuse a student that the disk cannot hold, with refitted weights that wait until it is written."""
    parents: Iterable[Path] = (path for path in target.absolute().parents if path.is_dir())
    parent = next(iter(parents))
    free = shutil.disk_usage(parent).free
    if free < size + waiting:
        what = f", and its refitted weights {waiting:,} meanwhile" if waiting else ""
        raise OutputError(
            f"The student needs {size:,} bytes{what}, and the disk of {parent} has {free:,} left. "
            "Free space or choose another folder."
        )
