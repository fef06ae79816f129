"""Writes precomputed top-k teacher logits to disk."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import DatasetInfo, Features
from torch import Tensor, nn
from trl import SFTTrainer

from ..compat import commit_hash, dataset_state, on_device
from ..data.context import context_length
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import MismatchError, UnsupportedModelError
from ..files import digest, known_digest, replacing_file, require_writable, versions, write_json
from ..formats import FORMATS, migrate, write_artefact
from ..hardware import as_dtype
from ..locks import holding
from ..losses.fused import next_token_positions
from ..losses.heads import check_output_head, output_head
from ..losses.signals import DenseSignal, top_k_signal
from ..models import evaluating, load_model, load_tokenizer, make_fast
from ..scoring.calibration import tokenizer_digest
from ..weights import model_digest
from .batches import (
    LABELS,
    LOG_PROBS,
    LOG_TAIL,
    STATES,
    TOKENS,
    WithRowLengths,
    model_inputs,
    row_of_positions,
)
from .checks import refuse_own_folder
from .config import DistillationConfig
from .intermediate import state_pairs, wanted_states
from .packing import require_documents_apart
from .parallel import forward_of_backbone
from .record import describe_data
from .rows import BeginsRows, WithinContext, keep_within_context, require_rows
from .teacher_cache import DTYPES, MANIFEST_NAME, METADATA_KEY, ROW_ARGUMENTS, ROWS_KIND, refuse_uncacheable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class RowMaker(BeginsRows, SFTTrainer):
    """TRL's supervised trainer, for the rows and batches that it makes."""


@holding("output_dir")
def cache_teacher_logits(
    teacher: PreTrainedModel | str | os.PathLike[str],
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    top_k: int = 64,
    args: DistillationConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    dtype: str = "float16",
    rows_per_file: int = 1024,
) -> Path:
    """Write the top-k teacher logits of a corpus; an interrupted call resumes.

    Files appear one after another, whole or not at all; the manifest comes last. A run that is started again writes
    the missing ones, with the same bytes, and refuses a folder that was begun with other settings or data. Under
    `accelerate launch` the processes take turns at the files.

    Args:
        teacher: a model, or a path or Hub id; moved to the training device.
        dataset: corpus, as for `DistillationTrainer`.
        output_dir: where the cache goes.
        top_k: tokens to keep of every distribution; at the size of the vocabulary nothing is lost.
        args: of the run that will train from the cache: what makes rows out of documents, `temperature`, precision and
            `per_device_eval_batch_size`. Where `hidden_loss` or `embedding_loss` is set, the teacher's hidden states
            that they need are kept too: 2 bytes for every channel, which is much.
        processing_class: tokenizer; loaded from the teacher's path when left out.
        dtype: of log-probabilities and states: `"float16"` (at a log-probability of -8, rounding changes the
            probability by 0.4 %) or `"float32"`.
        rows_per_file: what an interruption can cost. The rows are needed in memory, what is said of them is not.

    Returns:
        The folder, for `load_teacher_cache`.

    Raises:
        ValueError: if a number or dtype makes no sense.
        MismatchError: if the folder was begun with other settings or data, or the arguments cannot be trained from a
            cache.
        OutputError: if the folder cannot be written.
        UnsupportedModelError: if the teacher's logits are computed in an unknown way, or it would be sharded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file={rows_per_file}: expected at least 1.")
    args = copy.copy(args or DistillationConfig(os.fspath(output_dir)))
    refuse_uncacheable(args)
    refuse_own_folder(output_dir, teacher=teacher)
    output_dir = require_writable(output_dir)
    if processing_class is None:
        name: Any = teacher.config.name_or_path if isinstance(teacher, nn.Module) else teacher
        processing_class = load_tokenizer(name)
    refuse_other_tokenizers(processing_class, teacher=teacher)
    model = load_model(teacher)
    vocab_size = output_head(model).vocab_size
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k}: expected a number from 1 to the {vocab_size} tokens of the vocabulary.")
    text_config = model.config.get_text_config()
    depth = text_config.num_hidden_layers
    layers: Any = args.hidden_layers  # a string was parsed by the arguments
    pairs = state_pairs(args.hidden_loss, args.embedding_loss, layers, depth, depth)

    args.output_dir, args.push_to_hub, args.max_steps, args.eval_strategy = str(output_dir), False, 1, "no"
    # TRL prepares the rows, the very way it does for training. It changes the model that it is given: here, a copy
    # that shares the weights and nothing else.
    stand_in: Any = copy.copy(model)
    stand_in.is_quantized = False  # nothing is trained
    stand_in.config, stand_in.generation_config = copy.deepcopy((model.config, model.generation_config))
    require_rows(dataset, "given")
    keep_within_context(args, teacher=model.config)
    trainer: Any = RowMaker(stand_in, args, train_dataset=dataset, processing_class=processing_class)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UnsupportedModelError(
            "A teacher that is sharded by FSDP or DeepSpeed cannot be cached. Launch without, one whole teacher on "
            "every device, or load it with device_map='auto' in one process."
        )
    make_fast(model, trainer.accelerator.device)
    check_output_head(model, role="teacher")
    _require_token_rows(trainer.train_dataset)
    require_documents_apart(trainer, teacher=model)
    settings = {
        "teacher": model_digest(model),
        "tokenizer": tokenizer_digest(trainer.processing_class),
        "temperature": args.temperature,
        "top_k": top_k,
        "vocab_size": vocab_size,
        "states": wanted_states(pairs, "teacher"),
        "dtype": dtype,
        "computed_in": "bfloat16"
        if args.bf16
        else "float16"
        if args.fp16
        else str(model.dtype).removeprefix("torch."),
        "rows_per_file": rows_per_file,
        **{name: getattr(args, name) for name in ROW_ARGUMENTS},
    }

    collator = WithRowLengths(trainer.data_collator) if trainer.padding_free else trainer.data_collator
    collator = WithinContext(collator, context_length(model.config))
    files = []
    with evaluating([model]):
        for number, rows in enumerate(_groups(trainer.train_dataset, rows_per_file)):
            path = output_dir / f"data-{number:05d}.arrow"
            described = {**settings, "rows": _digest_of(rows)}
            files.append({"file": path.name, "num_rows": len(rows), "digest": described["rows"]})
            if path.exists():
                _require_same(path, described)
            elif number % trainer.accelerator.num_processes == trainer.accelerator.process_index:
                batches = (
                    _said_of(model, collator(batch), trainer, settings)
                    for batch in _groups(rows, args.per_device_eval_batch_size)
                )
                _write(path, rows, batches, described)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        _finish(output_dir, files, settings, model.config, dataset)
    trainer.accelerator.wait_for_everyone()
    return output_dir


# ---- Writing ----


def _groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def _digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("input_ids", LABELS, "seq_lengths")
    return digest(*(np.asarray(row.get(name, ()), dtype="<i4").tobytes() for row in rows for name in columns))


def _require_token_rows(rows: Any) -> None:
    """Refuse rows that become tokens only when batches are made (images and texts): nothing could be trained on them.

    Raises:
        MismatchError: naming the columns.
    """
    columns = sorted(next(iter(rows)))
    if "input_ids" not in columns:
        raise MismatchError(
            f"The rows have the columns {', '.join(columns)} and no input_ids: they are tokenised when batches are "
            "made, so a cache could neither know nor hold them. Train with the teacher itself, or tokenise them first."
        )


@torch.no_grad()
def _said_of(
    model: Any, batch: Mapping[str, Any], trainer: Any, settings: Mapping[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """The teacher's columns of every row of a batch, on the CPU: [N, …] each."""
    batch = on_device(trainer, batch)
    positions, _ = next_token_positions(batch[LABELS])
    extra = {"output_hidden_states": settings["states"]} if settings["states"] else {}
    with trainer.accelerator.autocast():
        with forward_of_backbone(model):
            output = model(**model_inputs(batch), **extra, use_cache=False)
        head = output_head(model)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions).to(head.weight.device)
        said = top_k_signal(DenseSignal(hidden, head), settings["top_k"], temperature=settings["temperature"])
    dtype = as_dtype(settings["dtype"])
    # Not below the smallest number of the dtype: a token of the k has a probability.
    log_probs = said.log_probs.clamp(min=torch.finfo(dtype).min)
    columns = {TOKENS: said.tokens.to(torch.int32), LOG_PROBS: log_probs.to(dtype), LOG_TAIL: said.log_tail.to(dtype)}
    for index in settings["states"]:
        columns[f"{STATES}{index}"] = output.hidden_states[index].flatten(0, 1)[positions].to(dtype)
    row, num_rows = row_of_positions(batch)
    counts = torch.bincount(row[positions], minlength=num_rows).tolist()
    parts = {name: column.cpu().split(counts) for name, column in columns.items()}
    return ({name: parts[name][i] for name in parts} for i in range(num_rows))


def _schema(names: Iterable[str], settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> pa.Schema:
    token = pa.uint16() if settings["vocab_size"] <= 1 << 16 else pa.int32()
    value = DTYPES[settings["dtype"]]
    types = {TOKENS: token, LOG_PROBS: value, LOG_TAIL: value, **{f"{STATES}{i}": value for i in settings["states"]}}
    fields = [pa.field(name, pa.list_(types.get(name, pa.int32()))) for name in (*names, *types)]
    numbered = {"format": FORMATS[ROWS_KIND], **metadata}
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(numbered, sort_keys=True)})


def _write(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    batches: Iterable[Iterable[Mapping[str, Tensor]]],
    described: Mapping[str, Any],
) -> None:
    names = [name for name in ("input_ids", LABELS, "seq_lengths") if name in rows[0]]
    schema = _schema(names, described, described)
    remaining = iter(rows)
    with replacing_file(path) as temporary, pa.ipc.new_stream(os.fspath(temporary), schema) as writer:
        for batch in batches:
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            for said in batch:
                row = next(remaining)
                for name in names:
                    columns[name].append(np.asarray(row[name], dtype=np.int32))
                for name, values in said.items():
                    columns[name].append(values.numpy().reshape(-1))
            writer.write_batch(pa.record_batch([_lists(columns[f.name], f.type) for f in schema], schema=schema))


def _lists(values: Sequence[Any], of: pa.ListType) -> pa.Array:
    offsets = np.cumsum([0, *map(len, values)])
    flat = pa.array(np.concatenate(values).astype(of.value_type.to_pandas_dtype()), type=of.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), flat)


def _require_same(path: Path, described: Mapping[str, Any]) -> None:
    """Refuse to go on with a file that was made from something else."""
    try:
        with pa.memory_map(os.fspath(path)) as source:
            found = json.loads(pa.ipc.open_stream(source).schema.metadata[METADATA_KEY])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise MismatchError(
            f"{path} is no file of a teacher cache ({error}). Choose another folder, or empty this one."
        ) from error
    found = migrate(found, path, ROWS_KIND)
    for name, value in described.items():
        if found.get(name) != value:
            raise MismatchError(
                f"{path} was written with {name}={found.get(name)!r}, this run has {value!r}. Choose another folder, "
                "or delete this one."
            )


def _finish(
    folder: Path,
    files: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
    config: PretrainedConfig,
    dataset: Any,
) -> None:
    """Write what makes the folder a dataset, and then the manifest."""
    if left := sorted({path.name for path in folder.glob("data-*.arrow")} - {file["file"] for file in files}):
        raise MismatchError(
            f"{folder} holds {', '.join(left)}, for which the dataset has no rows: it was begun with a longer one. "
            "Choose another folder, or delete this one."
        )
    num_tokens = 0
    for file in files:
        path = folder / file["file"]
        file["num_bytes"] = path.stat().st_size
        file["sha256"] = known_digest(path)
        with pa.memory_map(os.fspath(path)) as source:
            reader = pa.ipc.open_stream(source)
            schema = reader.schema
            num_tokens += sum(len(batch.column(LOG_TAIL).flatten()) for batch in reader)
    rows = digest(*(file["digest"] for file in files))
    write_json(folder / "dataset_info.json", asdict(DatasetInfo(features=Features.from_arrow_schema(schema))))
    fingerprint = digest(settings, rows).removeprefix("sha256:")[:16]
    write_json(folder / "state.json", dataset_state([file["file"] for file in files], fingerprint))
    manifest = {
        "versions": versions(),
        "settings": settings,
        "teacher": {
            "name_or_path": config.name_or_path or None,
            "revision": commit_hash(config),
            "config": json.loads(config.to_json_string(use_diff=False)),
        },
        "data": {"given": describe_data(dataset), "digest": rows},
        "num_rows": sum(file["num_rows"] for file in files),
        "num_tokens": num_tokens,
        "num_bytes": sum(file["num_bytes"] for file in files),
        "files": files,
    }
    write_artefact(folder / MANIFEST_NAME, manifest)
