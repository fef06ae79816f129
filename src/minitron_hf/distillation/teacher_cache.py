"""What the teacher says of a corpus, in files: training from them needs no teacher in memory.

A cache holds rows as they are trained, tokenised and packed, and for every token that counts the teacher's k most
likely next tokens, their log-probabilities, and the log-probability of all others together (see `losses.TopKSignal`).
It is a folder that `datasets.load_from_disk` reads, with a manifest that says what it was made from.

Columns of a row of T tokens, of which N have a next token that counts: `input_ids` [T], `labels` [T], `seq_lengths` of
the documents in a packed row, `teacher_tokens` [N * k], `teacher_log_probs` [N * k], `teacher_log_tail` [N], and
`teacher_states_I` [N * H_t] for cached hidden states.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo, Features, load_from_disk
from torch import Tensor, nn
from transformers import AutoConfig
from trl import SFTTrainer

from ..errors import MismatchError, OutputError, UnsupportedModelError
from ..files import digest, read_json, replacing_file, require_writable, versions, write_json
from ..losses.divergences import OF_LOGITS
from ..losses.fused import DenseSignal, TopKSignal, check_output_head, next_token_positions, output_head, top_k_signal
from ..models import evaluating, load_model, load_tokenizer, model_digest
from ..pruning.plan import config_values
from ..scoring.importance import tokenizer_digest
from .batches import (
    CACHED,
    LABELS,
    LOG_PROBS,
    LOG_TAIL,
    STATES,
    TOKENS,
    WithRowLengths,
    is_cached,
    model_inputs,
    row_of_positions,
)
from .config import DistillationConfig, is_fast
from .intermediate import state_pairs, wanted_states
from .parallel import forward_of_backbone
from .record import describe_data

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANIFEST_NAME = "teacher_cache.json"
#: Key of the settings in the metadata of every file, by which an interrupted run knows them again.
METADATA_KEY = b"minitron_hf"

#: Arguments that decide which tokens a row has, and which of them count.
ROW_ARGUMENTS = (
    "max_length",
    "packing",
    "packing_strategy",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "eos_token",
    "chat_template_path",
)

DTYPES = {"float16": pa.float16(), "float32": pa.float32()}


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
    """Write what the teacher says of a corpus; goes on where it was interrupted.

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
    output_dir = require_writable(output_dir)
    if processing_class is None:
        name = teacher.config._name_or_path if isinstance(teacher, nn.Module) else teacher
        processing_class = load_tokenizer(name)
    model = load_model(teacher)
    vocab_size = output_head(model).vocab_size
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k}: expected a number from 1 to the {vocab_size} tokens of the vocabulary.")
    text_config = model.config.get_text_config()
    depth = text_config.num_hidden_layers
    pairs = state_pairs(args.hidden_loss, args.embedding_loss, args.hidden_layers, depth, depth)

    args.output_dir, args.push_to_hub, args.max_steps, args.eval_strategy = str(output_dir), False, 1, "no"
    # TRL prepares the rows, the very way it does for training. It changes the model that it is given: here, a copy
    # that shares the weights and nothing else.
    stand_in = copy.copy(model)
    stand_in.config, stand_in.generation_config = copy.deepcopy((model.config, model.generation_config))
    trainer: Any = SFTTrainer(stand_in, args, train_dataset=dataset, processing_class=processing_class)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UnsupportedModelError(
            "A teacher that is sharded by FSDP or DeepSpeed cannot be cached. Launch without, one whole teacher on "
            "every device, or load it with device_map='auto' in one process."
        )
    if not is_fast(model.dtype, trainer.accelerator.device.type == "cpu") and not getattr(
        model, "is_quantized", False
    ):
        logger.info("The teacher is computed in float32: this hardware is slow in %s.", model.dtype)
        model.float()
    check_output_head(model, role="teacher")
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


def refuse_uncacheable(args: DistillationConfig) -> None:
    """Refuse arguments that need the teacher itself.

    Raises:
        MismatchError: naming the argument.
    """
    if args.divergence in OF_LOGITS:
        raise MismatchError(
            f"divergence={args.divergence!r} compares logits, and a cache of the teacher holds probabilities. Use "
            "another divergence, or train with the teacher itself."
        )
    if args.teacher_correction:
        raise MismatchError(
            f"teacher_correction={args.teacher_correction!r}: a cached teacher cannot go on learning. Correct it "
            "beforehand with correct_teacher, then cache it."
        )


# ---- Writing ----


def _groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def _digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("input_ids", LABELS, "seq_lengths")
    return digest(*(np.asarray(row.get(name, ()), dtype="<i4").tobytes() for row in rows for name in columns))


@torch.no_grad()
def _said_of(
    model: Any, batch: Mapping[str, Any], trainer: Any, settings: Mapping[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """The teacher's columns of every row of a batch, on the CPU: [N, …] each."""
    batch = trainer._prepare_inputs(dict(batch))
    positions, _ = next_token_positions(batch[LABELS])
    extra = {"output_hidden_states": settings["states"]} if settings["states"] else {}
    with trainer.accelerator.autocast():
        with forward_of_backbone(model):
            output = model(**model_inputs(batch), **extra, use_cache=False)
        head = output_head(model)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions).to(head.weight.device)
        said = top_k_signal(DenseSignal(hidden, head), settings["top_k"], temperature=settings["temperature"])
    dtype = getattr(torch, settings["dtype"])
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
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


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
        with pa.memory_map(os.fspath(path)) as source:
            reader = pa.ipc.open_stream(source)
            schema = reader.schema
            num_tokens += sum(len(batch.column(LOG_TAIL).flatten()) for batch in reader)
    rows = digest(*(file["digest"] for file in files))
    write_json(folder / "dataset_info.json", asdict(DatasetInfo(features=Features.from_arrow_schema(schema))))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file["file"]} for file in files],
        "_fingerprint": digest(settings, rows).removeprefix("sha256:")[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": "numpy",
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)
    manifest = {
        "format": 1,
        "versions": versions(),
        "settings": settings,
        "teacher": {
            "name_or_path": config._name_or_path or None,
            "revision": getattr(config, "_commit_hash", None),
            "config": json.loads(config.to_json_string(use_diff=False)),
        },
        "data": {"given": describe_data(dataset), "digest": rows},
        "num_rows": sum(file["num_rows"] for file in files),
        "num_tokens": num_tokens,
        "num_bytes": sum(file["num_bytes"] for file in files),
        "files": files,
    }
    write_json(folder / MANIFEST_NAME, manifest)


# ---- Reading ----


@dataclass(frozen=True)
class TeacherCache:
    """Rows with what the teacher says of them, for `DistillationTrainer`'s `train_dataset` or `eval_dataset`.

    Attributes:
        dataset: the rows. `dataclasses.replace(cache, dataset=cache.dataset.select(…))` is a part of a cache.
        manifest: what it was made from.
    """

    dataset: Dataset
    manifest: Mapping[str, Any]

    @property
    def teacher_config(self) -> PretrainedConfig:
        """Config of the teacher, with the name that it was loaded by."""
        values = config_values(self.manifest["teacher"]["config"])
        config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        config._name_or_path = self.manifest["teacher"]["name_or_path"] or ""
        config._commit_hash = self.manifest["teacher"]["revision"]
        return config

    @property
    def vocab_size(self) -> int:
        """Tokens of the teacher's distributions."""
        size: int = self.manifest["settings"]["vocab_size"]
        return size

    def require_arguments(self, args: DistillationConfig, *, packing: bool) -> None:
        """Refuse arguments under which the rows, or what is needed of them, would be others.

        Args:
            args: of the run.
            packing: whether documents would be packed: of training and evaluation one may be.

        Raises:
            MismatchError: naming the argument.
        """
        refuse_uncacheable(args)
        settings = self.manifest["settings"]
        wanted = {"temperature": args.temperature, **{name: getattr(args, name) for name in ROW_ARGUMENTS}}
        wanted["packing"] = packing
        if not packing and not settings["packing"]:
            del wanted["packing_strategy"]
        for name, value in wanted.items():
            if settings[name] != value:
                raise MismatchError(
                    f"The teacher cache was written with {name}={settings[name]!r}, this run has {value!r}. Set "
                    f"{name}={settings[name]!r}, or cache the teacher again."
                )

    def require_states(self, states: Sequence[int]) -> None:
        """Refuse a cache without hidden states that are to be compared.

        Raises:
            MismatchError: naming them.
        """
        kept = self.manifest["settings"]["states"]
        if absent := sorted(set(states) - set(kept)):
            raise MismatchError(
                f"hidden_loss and embedding_loss need the teacher's hidden states {absent}, and the cache holds "
                f"{kept or 'none'}. Cache the teacher again with these arguments, or train with the teacher itself."
            )

    def require_tokenizer(self, processing_class: PreTrainedTokenizerBase | Any) -> None:
        """Refuse another tokenizer.

        Raises:
            MismatchError: if its vocabulary differs.
        """
        if tokenizer_digest(processing_class) != self.manifest["settings"]["tokenizer"]:
            raise MismatchError(
                "The teacher cache was written with another tokenizer: the vocabularies differ, so its token ids "
                "would mean something else. Pass the tokenizer of the teacher as processing_class, or cache it again."
            )

    def require_teacher(self, teacher: PreTrainedModel) -> None:
        """Refuse another teacher than the one that was cached.

        Raises:
            MismatchError: if its weights differ.
        """
        if model_digest(teacher) != self.manifest["settings"]["teacher"]:
            raise MismatchError(
                f"The teacher cache was written by another teacher ({self.manifest['teacher']['name_or_path']}) than "
                "teacher_model: the weights differ. Pass that one, or leave teacher_model out."
            )


def load_teacher_cache(folder: str | os.PathLike[str]) -> TeacherCache:
    """Open what `cache_teacher_logits` wrote; the rows stay on disk.

    Raises:
        OutputError: if there is no cache, or an unfinished one.
        MismatchError: if a file is missing or incomplete.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).is_file():
        begun = len(list(folder.glob("data-*.arrow")))
        raise OutputError(
            f"{folder} holds no finished teacher cache: no {MANIFEST_NAME}, {begun} file(s) of rows. "
            "Run cache_teacher_logits, which goes on where it was interrupted."
        )
    manifest = read_json(folder / MANIFEST_NAME)
    if manifest.get("format") != 1:
        raise MismatchError(f"{folder / MANIFEST_NAME} has format {manifest.get('format')}, expected 1.")
    for file in manifest["files"]:
        path = folder / file["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != file["num_bytes"]:
            raise MismatchError(
                f"{path} has {size} bytes, the manifest says {file['num_bytes']}. Copy the whole folder again, or "
                "delete that file and the manifest and run cache_teacher_logits."
            )
    return TeacherCache(load_from_disk(os.fspath(folder)), manifest)


def opened(data: Any, role: str) -> tuple[Any, list[TeacherCache]]:
    """A dataset, or several by name, with caches replaced by their rows; and the caches.

    Raises:
        MismatchError: if cached rows come without their manifest.
    """
    if isinstance(data, Mapping):
        parts = {name: opened(part, role) for name, part in data.items()}
        return {name: rows for name, (rows, _) in parts.items()}, [
            cache for _, found in parts.values() for cache in found
        ]
    if isinstance(data, TeacherCache):
        return data.dataset, [data]
    if is_cached(getattr(data, "column_names", None)):
        raise MismatchError(
            f"{role} holds rows of a teacher cache without its manifest, so nothing tells whether they fit. Pass "
            "load_teacher_cache(folder), or dataclasses.replace(cache, dataset=rows) for a part of it."
        )
    return data, []


def cached_signal(batch: Mapping[str, Any], positions: Tensor, vocab_size: int, states: Sequence[int]) -> Any:
    """What a batch of cached rows says of the teacher at `positions`: the signal, and the hidden states in `states`.

    Raises:
        MismatchError: if other tokens count than when the cache was written.
    """
    said = batch[CACHED]
    if len(said.log_tail) != len(positions):
        raise MismatchError(
            f"{len(positions)} tokens of a batch count, and the teacher cache holds {len(said.log_tail)}: the rows or "
            "labels were changed. Pass the cached rows as they are, without a data_collator that changes labels."
        )
    tokens, log_probs, log_tail = (x.to(positions.device) for x in (said.tokens, said.log_probs, said.log_tail))
    signal = TopKSignal(tokens, log_probs, log_tail, vocab_size)
    return signal, tuple(said.states[index].to(positions.device) for index in states)
