"""Writes a teacher cache from the log-probabilities that a server gives.

Shapes: T tokens of a row, N of them count, k most likely tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.images import holds_images
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError, MismatchError, ServerError, checks_kinds
from ..files import digest, refuse_own_folder, require_writable
from ..locks import with_locked_folder
from ..losses.fused import next_token_positions
from ..losses.signals import TopKSignal
from ..models import empty_model, load_config, load_tokenizer
from .batches import LABELS
from .cache_coding import Coding
from .cache_writer import (
    CacheWriter,
    batched,
    cache_settings,
    require_possible,
    row_bar,
    row_collator,
    row_trainer,
)
from .checks import refuse_unknown_tokens
from .config import DistillationConfig
from .rows import some_rows
from .server import TeacherServer
from .teacher_cache import refuse_uncacheable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: What the probabilities of k tokens, each in float32, may sum to.
LARGEST_SUM = 1.001
#: The probability of all other tokens is 1 minus a sum in float32, of which less than this is rounding.
ROUNDING = 2.0**-24


def refuse_images(dataset: Any) -> None:
    """Refuse rows with images, of which a server would get the tokens alone.

    Raises:
        MismatchError: saying what to do instead.
    """
    if holds_images(dataset):
        raise MismatchError(
            "The data holds images, and a server is sent tokens alone. Cache a teacher that is loaded here (leave out "
            "the server), or data without images."
        )


@checks_kinds
@with_locked_folder("output_dir")
def cache_served_teacher(
    server: str,
    teacher: PretrainedConfig | str | os.PathLike[str],
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    server_model: str | None = None,
    top_k: int | None = None,
    args: DistillationConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    dtype: str = "float16",
    rows_per_file: int = 256,
    num_rows: int | None = None,
    num_parallel: int = 8,
    timeout: float = 600.0,
    api_key: str | None = None,
    show_progress: bool = True,
) -> Path:
    """Write a teacher cache from a vLLM server, without the teacher's weights; an interrupted call resumes.

    The folder is that of `cache_teacher_logits` with `top_k`. The server gives the most likely tokens of every
    position; the probability of all others is 1 minus theirs. Every document of a packed row is sent by itself.
    Requests that fail are sent again up to five times, within half a minute.
    Long because all arguments are explained.

    Args:
        server: address of the server, such as `http://localhost:8000`.
        teacher: path or Hub id of the model that the server offers, or its config. Config and tokenizer are read.
        dataset: corpus, as for `DistillationTrainer`.
        output_dir: folder of the cache.
        server_model: the server's name of the model; None: the only one.
        top_k: number of most likely tokens to store per position; None: 64. vLLM gives 20 unless it is started with
            `--max-logprobs`.
        args: arguments of the run that will train from the cache, as for `cache_teacher_logits`.
        processing_class: tokenizer; by default the one in the teacher's folder.
        dtype: of log-probabilities: `"float16"`, `"float32"` or `"fixed12"`.
        rows_per_file: rows per file; an interruption loses at most so many.
        num_rows: store at most so many of the token rows, at equal distances; None: all.
        num_parallel: requests that are under way at a time, of one document each.
        timeout: seconds to wait for an answer.
        api_key: key that the server wants; None: the one in the environment variable `MINITRON_HF_SERVER_API_KEY`.
        show_progress: whether to show a progress bar.

    Returns:
        The folder, for `load_teacher_cache`.

    Raises:
        ServerError: if the server does not answer, or cannot give what is needed.
        MismatchError: if the server has another model or tokenizer, or the arguments cannot be trained from it.
        DataError: if `server` is no address, or a number is out of range.
        OutputError: if the folder cannot be written.
    """
    top_k = 64 if top_k is None else top_k
    require_possible(dtype, top_k, num_draws=None, rows_per_file=rows_per_file, num_rows=num_rows)
    if num_parallel < 1 or not timeout > 0:
        raise DataError(f"num_parallel={num_parallel}, timeout={timeout}: expected at least 1, and more than 0.")
    args = copy.copy(args or DistillationConfig(os.fspath(output_dir)))
    refuse_unserved(args)
    refuse_images(dataset)
    config = load_config(teacher)
    refuse_own_folder(output_dir, teacher=config.name_or_path or None)
    vocab_size = config.get_text_config().vocab_size
    if not 1 <= top_k <= vocab_size:
        raise DataError(f"top_k={top_k}: expected a number from 1 to the {vocab_size} tokens of the vocabulary.")
    processing_class = processing_class or load_tokenizer(config.name_or_path or "")
    refuse_other_tokenizers(processing_class, teacher=config.name_or_path or None)
    asked = check_server(server, processing_class, top_k, model=server_model, api_key=api_key, timeout=timeout)
    folder = require_writable(output_dir)
    trainer = row_trainer(empty_model(config), args, dataset, processing_class, folder)
    trainer.train_dataset = some_rows(trainer.train_dataset, num_rows)
    refuse_unknown_tokens(trainer.train_dataset, vocab_size, processing_class)
    _require_context(trainer.train_dataset, asked)
    stored = {"top_k": top_k, "num_draws": None, "dtype": dtype, "rows_per_file": rows_per_file}
    settings = {**cache_settings(trainer, config, stored), "vocab_size": vocab_size, "computed_in": "server"}
    settings |= {"server_model": asked.model, "teacher": digest("served", asked.model)}
    with row_bar(trainer, show_progress) as bar:
        columns = _ServedColumns(asked, trainer, settings, config, num_parallel, bar)
        CacheWriter(folder, trainer, settings, config, columns).write(dataset)
    return folder


def refuse_unserved(args: DistillationConfig) -> None:
    """Refuse arguments that need more of the teacher than a server gives.

    Raises:
        MismatchError: naming the argument.
    """
    refuse_uncacheable(args)
    if args.temperature != 1:
        raise MismatchError(
            f"temperature={args.temperature}: a server gives probabilities of prompts at temperature 1, and those of "
            "k tokens at another one cannot be computed from them. Use temperature=1, or cache the teacher from its "
            "weights."
        )
    for name in ("hidden_loss", "embedding_loss"):
        if getattr(args, name) is not None:
            raise MismatchError(
                f"{name}={getattr(args, name)!r} needs the teacher's hidden states, which no server gives. Leave it "
                "out, or cache the teacher from its weights."
            )


def check_server(
    url: str,
    tokenizer: Any,
    top_k: int,
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout: float = 600.0,
) -> TeacherServer:
    """Find the model of a server, and try what a cache will ask it.

    Args:
        url: address of the server.
        tokenizer: the teacher's.
        top_k: number of most likely tokens.
        model: the server's name of the model; None: the only one.
        api_key: key that the server wants.
        timeout: seconds to wait for an answer.

    Raises:
        ServerError: if it does not answer, or cannot give what a cache needs.
        MismatchError: if it has no such model, or another tokenizer.
    """
    server = TeacherServer.connect(url, model, api_key=api_key, timeout=timeout)
    server.require_tokenizer(tokenizer)
    ids = tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
    _require_log_probs(server, server.most_likely(ids, top_k)[1])
    return server


def _require_log_probs(server: TeacherServer, log_probs: NDArray[np.float64]) -> None:
    if not np.isfinite(log_probs).all() or (np.exp(np.minimum(log_probs, 9)).sum(-1) > LARGEST_SUM).any():
        raise ServerError(
            f"The server {server.url} gave numbers that are not log-probabilities: those of a position exceed 1 in "
            "all. Start vLLM with --logprobs-mode raw_logprobs, its default."
        )


def _require_context(rows: Any, server: TeacherServer) -> None:
    """Refuse documents that the server cannot read."""
    if server.context is None:
        return
    batches = rows.with_format("numpy").iter(1024)
    longest = max((max(_lengths(row)) for batch in batches for row in _rows_of(batch)), default=0)
    if longest >= server.context:
        raise MismatchError(
            f"A document has {longest} tokens, and the server {server.url} reads {server.context}, of which one is "
            f"generated. Start vLLM with --max-model-len {longest + 1}, or set max_length={server.context - 1}."
        )


def _rows_of(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return ({name: batch[name][i] for name in batch} for i in range(len(batch["input_ids"])))


def _lengths(row: Mapping[str, Any]) -> list[int]:
    """Lengths of the documents of a row."""
    lengths = [int(length) for length in row.get("seq_lengths", ())]
    return lengths or [len(row["input_ids"])]


@dataclass(frozen=True)
class _ServedColumns:
    """The teacher's columns of rows, asked of a server.

    Attributes:
        server: of the teacher.
        trainer: makes batches.
        settings: of the cache.
        config: the teacher's.
        num_parallel: requests under way at a time.
        bar: shows how many rows there are.
    """

    server: TeacherServer
    trainer: Any
    settings: Mapping[str, Any]
    config: PretrainedConfig
    num_parallel: int
    bar: Any

    def __call__(self, rows: list[Any], first: int) -> Iterator[Iterable[Mapping[str, Any]]]:
        """The columns of each row, batch by batch; `first` is the number of the first row."""
        self.bar.update(first - self.bar.n)  # rows of earlier files, which exist
        stopped = threading.Event()
        server, pool = replace(self.server, stopped=stopped), ThreadPoolExecutor(self.num_parallel)
        try:
            yield from batched(self._in_order(rows, server, pool), self.trainer.args.per_device_eval_batch_size)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _in_order(self, rows: Sequence[Any], server: TeacherServer, pool: ThreadPoolExecutor) -> Iterator[Any]:
        waiting: deque[tuple[Any, NDArray[np.int64], list[Future[Any]]]] = deque()
        collator = row_collator(self.trainer, self.config)
        remaining = iter(rows)
        while True:
            while sum(len(futures) for *_, futures in waiting) < 2 * self.num_parallel:
                row = next(remaining, None)
                if row is None:
                    break
                positions = next_token_positions(collator([row])[LABELS])[0].numpy()
                ends = np.cumsum(_lengths(row))
                documents = np.split(np.asarray(row["input_ids"]), ends[:-1])
                asked = [self._ask(pool, server, one.tolist()) for one in documents]
                waiting.append((row, positions, asked))
            if not waiting:
                return
            row, positions, asked = waiting.popleft()
            yield self._columns_of(row, positions, [future.result() for future in asked])
            self.bar.update()

    def _ask(self, pool: ThreadPoolExecutor, server: TeacherServer, tokens: list[int]) -> Future[Any]:
        ask: Callable[..., Any] = server.most_likely
        return pool.submit(ask, tokens, self.settings["top_k"])

    def _columns_of(self, row: Any, positions: NDArray[np.int64], found: Sequence[Any]) -> Mapping[str, Any]:
        """The columns of a row.

        Args:
            row: of the trainer.
            positions: [N], positions of the tokens that are followed by one that counts.
            found: of each document, what `TeacherServer.most_likely` returned.
        """
        vocab_size, top_k = self.settings["vocab_size"], self.settings["top_k"]
        nothing = np.zeros((1, top_k))  # the last token of a document is followed by none
        tokens = np.concatenate([part for ids, _ in found for part in (ids, nothing.astype(np.int64))])[positions]
        log_probs = np.concatenate([part for _, values in found for part in (values, nothing)])[positions]
        if tokens.size and tokens.max() >= vocab_size:
            raise MismatchError(
                f"The server {self.server.url} gave the token {tokens.max()}, and the teacher's config has "
                f"{vocab_size} tokens. Name the teacher that the server serves."
            )
        _require_log_probs(self.server, log_probs)
        signal = TopKSignal(
            torch.from_numpy(tokens),
            torch.from_numpy(log_probs),
            torch.from_numpy(_log_tail(log_probs, vocab_size)),
            vocab_size,
        )
        return Coding.of(self.settings).columns(signal, [len(tokens)])[0]


def _log_tail(log_probs: NDArray[np.float64], vocab_size: int) -> NDArray[np.float64]:
    """Log of the probability of all tokens but the k most likely ones, [N].

    It is 1 minus the sum of the k, and at most V - k times the k-th, which none of the others exceeds. Where that sum
    is 1 but for rounding, the bound says more.
    """
    rest = np.maximum(1.0 - np.exp(log_probs).sum(-1), ROUNDING)
    most = (vocab_size - log_probs.shape[-1]) * np.exp(log_probs[:, -1])
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.minimum(rest, most)))
