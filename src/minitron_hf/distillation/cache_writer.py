"""Writes precomputed teacher distributions to disk: the most likely tokens, or drawn ones."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from trl import SFTTrainer

from ..compat import on_device, on_one_device, trains_on_images
from ..data.context import context_length
from ..data.images import ImageCollator, holds_images
from ..data.tokens import tokenizer_digest
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError, MismatchError, UnsupportedModelError, checks_kinds
from ..files import refuse_own_folder, require_writable
from ..hardware import as_dtype
from ..locks import with_locked_folder
from ..losses.fused import next_token_positions
from ..losses.heads import check_output_head, output_head
from ..losses.signals import DenseSignal, TeacherSignal, sampled_signal, top_k_signal
from ..models import evaluating, load_model, load_processor, load_tokenizer, make_fast
from ..weights import model_digest
from .arguments import config_of, model_name
from .assistant_turns import AssistantTurnsMixin
from .batches import (
    LABELS,
    STATES,
    WithRowLengths,
    model_inputs,
    row_of_positions,
    rows_of,
)
from .cache_coding import DTYPES, Coding, refuse_both
from .cache_files import digest_of, require_same, write_manifest, write_rows
from .checks import refuse_virtual_tokens
from .config import DistillationConfig
from .cut_vocabulary import KeptTokens, tokens_of_plan
from .image_cache import ImageSources, image_settings, require_cacheable_images
from .inputs import refuse_image_settings
from .intermediate import needed_states, state_pairs
from .packing import require_documents_apart
from .parallel import forward_of_backbone, is_split
from .rows import StartTokensMixin, WithinContext, limit_to_context, refuse_empty, some_rows
from .teacher_cache import ROW_ARGUMENTS, refuse_uncacheable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..pruning.plan import PruningPlan

logger = logging.getLogger(__name__)


class RowMaker(StartTokensMixin, AssistantTurnsMixin, SFTTrainer):
    """TRL's supervised trainer, for the rows and batches that it makes."""


@checks_kinds
@with_locked_folder("output_dir")
def cache_teacher_logits(
    teacher: PreTrainedModel | str | os.PathLike[str],
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    num_draws: int | None = None,
    args: DistillationConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    dtype: str = "float16",
    rows_per_file: int = 1024,
    num_rows: int | None = None,
    show_progress: bool = True,
    pruning_plan: PruningPlan | None = None,
) -> Path:
    """Write the teacher's distributions over a corpus to disk; an interrupted call resumes.

    Stored are the `top_k` most likely tokens with the total probability of all others; or, with `num_draws`, tokens
    that are drawn from the distribution, whose mean gradient of the forward KL is that of the whole distribution.

    Files are written atomically, the manifest last. A second call writes the missing files with the same bytes. It
    refuses a folder that was begun with other settings or data. Under `accelerate launch`
    the processes take turns at the files. Long because all arguments are explained.

    Args:
        teacher: a model, or a path or Hub id; moved to the training device.
        dataset: corpus, as for `DistillationTrainer`. Images are not stored.
        output_dir: folder of the cache.
        top_k: number of most likely tokens to store per position; the whole vocabulary stores the exact distribution.
            None: 64, or with `num_draws` none.
        num_draws: draws per position, instead of `top_k`; `args.seed` says which. For `divergence="forward_kl"` only.
            A token that is drawn several times is stored once, with its count.
        args: arguments of the run that will train from the cache. They set the packing into rows, the `temperature`,
            the precision and the batch size (`per_device_eval_batch_size`). With `hidden_loss` or `embedding_loss` the
            cache also holds the teacher's hidden states: 2 bytes per channel and token, which needs much space.
        processing_class: tokenizer, for images the processor; by default the one in the teacher's folder.
        dtype: dtype of log-probabilities and hidden states: `"float16"` (at a log-probability of -8, rounding changes
            the probability by 0.4 %) or `"float32"`; or `"fixed12"`, log-probabilities from -32 to 0 in 12 bits (the
            probability changes by 0.4 % at most) and token ids in ⌈log₂V⌉ bits, with hidden states in float16.
        rows_per_file: rows per file; an interruption loses at most so many. The token rows of a file are held in
            memory, their logits are not.
        num_rows: store at most so many of the token rows, at equal distances, as `max_eval_rows` of the trainer takes
            them; None: all.
        show_progress: show a progress bar.
        pruning_plan: of a student whose vocabulary it cuts. The rows are then those of the student's tokenizer, and
            the distributions those over its tokens, with the probability of all others beside. Other plans change
            nothing.

    Returns:
        The folder, for `load_teacher_cache`.

    Raises:
        DataError: if a number is out of range, the dtype is unknown, or both `top_k` and `num_draws` are given.
        MismatchError: if the folder was begun with other settings or data, or the arguments cannot be trained from a
            cache.
        OutputError: if the folder cannot be written.
        UnsupportedModelError: if the teacher's logits are computed in an unknown way, or it would be sharded.
    """
    require_possible(dtype, top_k, num_draws=num_draws, rows_per_file=rows_per_file, num_rows=num_rows)
    top_k = 64 if top_k is None and num_draws is None else top_k
    args = copy.copy(args or DistillationConfig(os.fspath(output_dir)))
    refuse_uncacheable(args, num_draws=num_draws)
    refuse_own_folder(output_dir, teacher=teacher)
    with_images = holds_images(dataset)
    folder = require_writable(output_dir)
    load = load_processor if with_images else load_tokenizer
    processing_class = processing_class or load(model_name(teacher) or "")
    kept = tokens_of_plan(pruning_plan, config_of(teacher, {}))
    if kept is not None:
        processing_class = kept.tokenizer(processing_class)
    else:
        refuse_other_tokenizers(processing_class, teacher=teacher)
    model = load_model(teacher)
    refuse_virtual_tokens(model)
    if with_images:
        refuse_image_settings(vars(args))
        require_cacheable_images(dataset, processing_class, model.config)
    if top_k is not None:
        _require_top_k(top_k, output_head(model).vocab_size if kept is None else len(kept.ids))
    trainer = row_trainer(model, args, dataset, processing_class, folder)
    make_fast(model, trainer.accelerator.device)
    check_output_head(model, role="teacher")
    require_documents_apart(trainer, teacher=model)
    trainer.train_dataset = some_rows(trainer.train_dataset, num_rows)
    if with_images:
        trainer.train_dataset = ImageSources(trainer.train_dataset, trainer.args.dataset_text_field)
    stored = {"top_k": top_k, "num_draws": num_draws, "dtype": dtype, "rows_per_file": rows_per_file}
    settings = {"teacher": model_digest(model), **cache_settings(trainer, model.config, stored)}
    settings |= {"vocab_size": output_head(model).vocab_size, "computed_in": _computed_in(model, trainer.args)}
    settings |= {} if kept is None else {"vocab_size": len(kept.ids), "kept_tokens": kept.digest}
    with evaluating([model]), row_bar(trainer, show_progress) as bar:
        columns = partial(_columns, model, kept, trainer, settings, bar)
        CacheWriter(folder, trainer, settings, model.config, columns).write(dataset)
    return folder


def require_possible(dtype: str, top_k: int | None, **counts: int | None) -> None:
    num_draws = counts["num_draws"]
    if dtype not in DTYPES:
        raise DataError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    refuse_both(top_k, num_draws, dtype)
    for name, number in counts.items():
        if number is not None and number < 1:
            raise DataError(f"{name}={number}: expected at least 1.")


def _require_top_k(top_k: int, vocab_size: int) -> None:
    if not 1 <= top_k <= vocab_size:
        raise DataError(f"top_k={top_k}: expected a number from 1 to the {vocab_size} tokens of the vocabulary.")


def row_trainer(
    model: PreTrainedModel, args: DistillationConfig, dataset: Any, processing_class: Any, folder: Path
) -> Any:
    """A trainer that makes the rows and batches, as it would for training.

    Args:
        model: the teacher; on the meta device if only its config is needed.
        args: of the run that will train from the cache; changed.
        dataset: the corpus.
        processing_class: the tokenizer.
        folder: of the cache.

    Raises:
        UnsupportedModelError: if the teacher would be sharded.
        MismatchError: if the rows are tokenised only when batches are made.
    """
    args.output_dir, args.push_to_hub, args.max_steps, args.eval_strategy = str(folder), False, 1, "no"
    # TRL changes the model that it is given: here a copy that shares only the weights.
    stand_in: Any = copy.copy(model)
    stand_in.is_quantized = False  # nothing is trained
    stand_in.config, stand_in.generation_config = copy.deepcopy((model.config, model.generation_config))
    if model.device.type == "meta":
        stand_in.to = lambda *args, **kwargs: stand_in
    refuse_empty(dataset, "given")
    limit_to_context(args, teacher=model.config)
    trainer: Any = RowMaker(stand_in, on_one_device(args), train_dataset=dataset, processing_class=processing_class)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_split(model):
        raise UnsupportedModelError(
            "A teacher that is split by FSDP, DeepSpeed or tensor parallelism cannot be cached. Launch without, one "
            "whole teacher on every device, or load it with device_map='auto' in one process."
        )
    if not trains_on_images(trainer):
        _require_token_rows(trainer.train_dataset)
    return trainer


def _computed_in(model: PreTrainedModel, args: DistillationConfig) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else str(model.dtype).removeprefix("torch.")


def cache_settings(trainer: Any, config: PretrainedConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the contents of a cache, apart from the teacher and the rows.

    Args:
        trainer: makes the rows.
        config: the teacher's.
        stored: `top_k`, `num_draws`, `dtype` and `rows_per_file`.
    """
    args = trainer.args
    depth = config.get_text_config().num_hidden_layers
    layers: Any = args.hidden_layers  # a string was parsed by the arguments
    pairs = state_pairs(args.hidden_loss, args.embedding_loss, layers, depth, depth)
    return {
        "tokenizer": tokenizer_digest(trainer.processing_class),
        "temperature": args.temperature,
        **stored,
        **({} if stored["num_draws"] is None else {"seed": args.seed}),
        "states": needed_states(pairs, "teacher"),
        **{name: getattr(args, name) for name in ROW_ARGUMENTS},
        **image_settings(trainer),
    }


@dataclass(frozen=True)
class CacheWriter:
    """Writes the files of one cache.

    Attributes:
        folder: of the cache.
        trainer: makes rows and batches.
        settings: what decides the contents.
        config: the teacher's.
        columns: rows of a file and the number of the first one → the teacher's columns of every row, batch by batch.
    """

    folder: Path
    trainer: Any
    settings: Mapping[str, Any]
    config: PretrainedConfig
    columns: Callable[[list[Any], int], Iterator[Iterable[Mapping[str, Any]]]]

    def write(self, dataset: Any) -> None:
        """Write the missing files, and then the manifest.

        Args:
            dataset: the corpus, as it was given, for the manifest.
        """
        trainer = self.trainer
        files, first = [], 0
        for number, rows in enumerate(batched(trainer.train_dataset, self.settings["rows_per_file"])):
            path = self.folder / f"data-{number:05d}.arrow"
            described = {**self.settings, "rows": digest_of(rows)}
            files.append({"file": path.name, "num_rows": len(rows), "digest": described["rows"]})
            if path.exists():
                require_same(path, described)
            elif number % trainer.accelerator.num_processes == trainer.accelerator.process_index:
                write_rows(path, rows, self.columns(rows, first), described)
            first += len(rows)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            write_manifest(self.folder, files, self.settings, self.config, dataset)
        trainer.accelerator.wait_for_everyone()


def row_bar(trainer: Any, show_progress: bool) -> Any:
    """A progress bar over the rows of a trainer in the main process; a stream does not know how many it has."""
    rows = trainer.train_dataset
    total, shows = len(rows) if isinstance(rows, Sized) else None, show_progress and trainer.is_world_process_zero()
    return tqdm(total=total, desc="Caching", unit="row", disable=not shows)


def row_collator(trainer: Any, config: PretrainedConfig) -> Any:
    """The trainer's collator, which also checks lengths and, where rows are joined, tells theirs."""
    collator, rows = trainer.data_collator, trainer.train_dataset
    if isinstance(rows, ImageSources):
        images = ImageCollator.around(collator, trainer.processing_class, config)
        return rows.collator(WithinContext(images, context_length(config)))
    return WithinContext(WithRowLengths(collator) if trainer.padding_free else collator, context_length(config))


def _columns(
    model: PreTrainedModel,
    kept: KeptTokens | None,
    trainer: Any,
    settings: Mapping[str, Any],
    bar: Any,
    rows: list[Any],
    first: int,
) -> Iterator[Iterable[dict[str, Any]]]:
    """The teacher's columns of each row, batch by batch; `first` is the number of the first row."""
    bar.update(first - bar.n)  # rows of earlier files, which exist or are another process's
    # The rows are the student's: its config has other ids of images than the teacher's.
    collator = row_collator(trainer, model.config if kept is None else kept.plan.build_student_config(model.config))
    for batch in batched(rows, trainer.args.per_device_eval_batch_size):
        numbers = range(first, first := first + len(batch))
        yield _teacher_columns(model, kept, collator(batch), trainer, settings, numbers)
        bar.update(len(batch))


# ---- Writing ----


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def _require_token_rows(rows: Any) -> None:
    """Refuse rows that are tokenised only when batches are made.

    Raises:
        MismatchError: naming the columns.
    """
    columns = sorted(next(iter(rows)))
    if "input_ids" not in columns:
        raise MismatchError(
            f"The rows have the columns {', '.join(columns)} and no input_ids: they are tokenised when batches are "
            "made, so a cache cannot hold them. Train with the teacher itself, or tokenise them first."
        )


@torch.no_grad()
def _teacher_columns(
    model: Any,
    kept: KeptTokens | None,
    batch: Mapping[str, Any],
    trainer: Any,
    settings: Mapping[str, Any],
    numbers: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The teacher's columns of every row of a batch, on the CPU.

    Args:
        model: the teacher.
        kept: its tokens that the student has; None: all.
        batch: of the collator.
        trainer: knows the device and the precision.
        settings: of the cache.
        numbers: of the rows in the corpus.

    Returns:
        For every row: column → numbers of its N tokens that count, one after the other; with images, its tokens too.
    """
    tokens_of_rows = rows_of(batch) if trains_on_images(trainer) else None
    batch = on_device(trainer, batch)
    row, num_rows = row_of_positions(batch)
    positions, _ = next_token_positions(batch[LABELS])
    extra = {"output_hidden_states": settings["states"]} if settings["states"] else {}
    with trainer.accelerator.autocast():
        with forward_of_backbone(model):
            given = model_inputs(batch) if kept is None else kept.inputs_of_teacher(model_inputs(batch))
            output = model(**given, **extra, use_cache=False)
        head = output_head(model)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions).to(head.weight.device)
        dense, temperature = DenseSignal(hidden, head, None if kept is None else kept.ids), settings["temperature"]
        counts = torch.bincount(row[positions], minlength=num_rows).tolist()
        signal: TeacherSignal
        if settings["num_draws"] is None:
            signal = top_k_signal(dense, settings["top_k"], temperature=temperature)
        else:
            offsets = torch.cat([_offsets(settings["seed"], *which) for which in zip(numbers, counts, strict=True)])
            signal = sampled_signal(dense, settings["num_draws"], offsets, temperature=temperature)
    coding = Coding.of(settings)
    found = coding.columns(signal, counts)
    if tokens_of_rows is not None:
        found = [{**tokens, **columns} for tokens, columns in zip(tokens_of_rows, found, strict=True)]
    for index in settings["states"]:
        states = output.hidden_states[index].flatten(0, 1)[positions].to(as_dtype(coding.floats))
        for columns, part in zip(found, states.cpu().split(counts), strict=True):
            columns[f"{STATES}{index}"] = part.numpy().reshape(-1)
    return iter(found)


def _offsets(seed: int, row: int, count: int) -> Tensor:
    """A uniform number in [0, 1) for each position of a row, whatever other rows there are: float64 [count].

    The generator counts, so that nothing depends on earlier rows; 32 bits of it are exact in later sums.
    """
    numbers = np.random.Philox(key=[seed, row]).random_raw(count) >> np.uint64(32)
    return torch.from_numpy(numbers.astype(np.float64) / 2**32)
