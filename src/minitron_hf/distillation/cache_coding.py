"""Columns of a cached row: what a teacher cache stores of N positions, as numbers or packed into bits.

Three layouts:

- `top_k` tokens in `float16` or `float32`: token ids and log-probabilities as numbers of whole bytes.
- `top_k` tokens in `fixed12`: ids in ⌈log₂V⌉ bits, log-probabilities in 12 bits.
- `num_draws` drawn tokens: ids in ⌈log₂V⌉ bits and their counts in ⌈log₂(D + 1)⌉ bits, as many as differ; per position
  the number of entries in ⌈log₂(D + 2)⌉ bits and the entropy in 16 bits.

Shapes: N tokens of a row that count, k or m tokens stored of each, V vocabulary, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..losses.signals import SampledSignal, TopKSignal

#: Columns of a cached row. Position by position: tokens and log-probabilities, N * k each; tails of all other tokens.
TOKENS, LOG_PROBS, LOG_TAIL = "teacher_tokens", "teacher_log_probs", "teacher_log_tail"
#: Of drawn tokens: how often each was drawn, how many entries a position has, the teacher's entropy.
COUNTS, LENGTHS, ENTROPY = "teacher_counts", "teacher_lengths", "teacher_entropy"
#: Of packed rows: V and k, or V and D, which the reader of a row needs.
CODING = "teacher_coding"
#: Of students that lack some of the teacher's tokens: its probability of all others (`signals.kept_logits`).
KEPT_SHARE = "teacher_kept_share"
SIGNAL_COLUMNS = (TOKENS, LOG_PROBS, LOG_TAIL, COUNTS, LENGTHS, ENTROPY, CODING, KEPT_SHARE)

#: How log-probabilities are stored. `FIXED` is a fixed-point number of 12 bits.
FIXED = "fixed12"
DTYPES = {"float16": pa.float16(), "float32": pa.float32(), FIXED: pa.uint8()}
#: Fixed-point log-probabilities lie from -32 (a probability of 1e-14) to 0, in equal steps of 0.0078.
FIXED_BITS, FIXED_RANGE = 12, 32.0
ENTROPY_BITS = 16


# ---- Bits ----


def bits_for(count: int) -> int:
    """Bits of the numbers from 0 to `count` - 1, at least one."""
    return max(1, (count - 1).bit_length())


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Numbers of `bits` bits one after the other, the highest bit first; the last byte is filled up with zeros."""
    numbers = np.asarray(values, dtype=np.int64).reshape(-1)
    found = np.empty((len(numbers), bits), dtype=np.uint8)
    for place in range(bits):
        found[:, place] = numbers >> (bits - 1 - place) & 1
    return np.packbits(found)


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """The first `count` numbers of `pack`."""
    found = np.unpackbits(np.asarray(packed, dtype=np.uint8), count=count * bits).reshape(count, bits)
    numbers = np.zeros(count, dtype=np.int64)
    for place in range(bits):
        numbers = numbers << 1 | found[:, place]
    return numbers


def quantise(values: Tensor, largest: float, bits: int) -> NDArray[np.int64]:
    """Numbers from 0 to `largest` in equal steps; each is at most half a step away, those beyond are moved inside."""
    steps = (1 << bits) - 1
    scaled = (values.double().nan_to_num(posinf=largest) * (steps / largest)).round().clamp(0, steps)
    return scaled.to(torch.int64).numpy()


def restore(codes: NDArray[Any], largest: float, bits: int) -> Tensor:
    """The numbers of `quantise`, in float32."""
    return torch.from_numpy(np.asarray(codes, dtype=np.float64) * (largest / ((1 << bits) - 1))).float()


def bytes_per_position(
    vocab_size: int,
    *,
    top_k: int | None = None,
    entries: float = 0,
    num_draws: int | None = None,
    dtype: str = "float16",
) -> float:
    """Bytes that a cache stores per position, beside the row's own tokens.

    With `top_k` k: k·(⌈log₂V⌉ + 12)/8 + 2 in `fixed12`, k·(t + b) + b otherwise, with b bytes of a log-probability and
    t = 2 bytes of a token up to V = 65,536, else 4. With `num_draws` D and m entries: (16 + ⌈log₂(D + 2)⌉ +
    m·(⌈log₂V⌉ + ⌈log₂(D + 1)⌉))/8. Every packed column of a row is filled up to whole bytes.

    Args:
        vocab_size: V.
        top_k: k.
        entries: m, mean number of entries; with 0, the most there can be: min(D + 1, V).
        num_draws: D.
        dtype: of the log-probabilities.
    """
    if num_draws is not None:
        entries = entries or min(num_draws + 1, vocab_size)
        entry = bits_for(vocab_size) + bits_for(num_draws + 1)
        return (ENTROPY_BITS + bits_for(num_draws + 2) + entries * entry) / 8
    assert top_k is not None
    if dtype == FIXED:
        return top_k * (bits_for(vocab_size) + FIXED_BITS) / 8 + 2
    size = 2 if dtype == "float16" else 4
    return top_k * ((2 if vocab_size <= 1 << 16 else 4) + size) + size


# ---- Writing ----


def refuse_both(top_k: int | None, num_draws: int | None, dtype: str) -> None:
    """Refuse the most likely tokens and drawn ones in one cache, and log-probabilities that drawn tokens lack.

    Raises:
        DataError: naming the setting.
    """
    if num_draws is None:
        return
    if top_k is not None:
        raise DataError(
            f"top_k={top_k} and num_draws={num_draws}: a cache holds the most likely tokens or drawn ones. Leave out "
            "one of them."
        )
    if dtype == FIXED:
        raise DataError(
            f"dtype={dtype!r} with num_draws={num_draws}: drawn tokens have counts instead of log-probabilities, and "
            "are packed in any case. Leave out dtype."
        )


@dataclass(frozen=True)
class Coding:
    """How the teacher's distributions of one cache are stored.

    Attributes:
        vocab_size: V.
        top_k: k; None of drawn tokens.
        num_draws: D; None of the most likely tokens.
        dtype: a name in `DTYPES`.
        cuts: whether the student lacks some of the teacher's tokens.
    """

    vocab_size: int
    top_k: int | None
    num_draws: int | None
    dtype: str
    cuts: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Coding:
        """The coding that the settings of a cache ask for."""
        how = (settings["top_k"], settings["num_draws"], settings["dtype"])
        return cls(settings["vocab_size"], *how, settings.get("kept_tokens") is not None)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column → type of its numbers."""
        return {**self._types, **({KEPT_SHARE: DTYPES[self.floats]} if self.cuts else {})}

    @property
    def _types(self) -> dict[str, pa.DataType]:
        byte, short, number = pa.uint8(), pa.uint16(), pa.int32()
        if self.num_draws is not None:
            return {TOKENS: byte, COUNTS: byte, LENGTHS: byte, ENTROPY: short, CODING: number}
        if self.dtype == FIXED:
            return {TOKENS: byte, LOG_PROBS: byte, LOG_TAIL: short, CODING: number}
        token, value = short if self.vocab_size <= 1 << 16 else number, DTYPES[self.dtype]
        return {TOKENS: token, LOG_PROBS: value, LOG_TAIL: value}

    @property
    def positions(self) -> str:
        """The column that has one number per position."""
        return LOG_TAIL if self.num_draws is None else ENTROPY

    @property
    def floats(self) -> str:
        """Name of the dtype of hidden states beside the distributions."""
        return "float16" if self.dtype == FIXED else self.dtype

    def columns(self, signal: Any, counts: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
        """The columns of each row.

        Args:
            signal: a `TopKSignal` or `SampledSignal` of all rows of a batch, N tokens in all.
            counts: how many of them are of each row.
        """
        fields = {name: value for name, value in vars(signal).items() if isinstance(value, Tensor)}
        parts = {name: value.cpu().split(list(counts)) for name, value in fields.items()}
        rows = (
            type(signal)(**{name: part[i] for name, part in parts.items()}, vocab_size=self.vocab_size)
            for i in range(len(counts))
        )
        return [
            {**(self._drawn(row) if isinstance(row, SampledSignal) else self._most_likely(row)), **self._share(row)}
            for row in rows
        ]

    def _share(self, row: SampledSignal | TopKSignal) -> dict[str, NDArray[Any]]:
        dtype = torch.float16 if self.floats == "float16" else torch.float32
        return {} if row.kept_share is None else {KEPT_SHARE: row.kept_share.to(dtype).numpy()}

    def _drawn(self, row: SampledSignal) -> dict[str, NDArray[Any]]:
        assert self.num_draws is not None
        counts = (row.weights * self.num_draws).round().to(torch.int64)
        stored = counts > 0
        stored[:, 0] = True
        entropy = quantise(row.entropy, math.log(self.vocab_size) or 1.0, ENTROPY_BITS)
        return {
            TOKENS: pack(row.tokens[stored].numpy(), bits_for(self.vocab_size)),
            COUNTS: pack(counts[stored].numpy(), bits_for(self.num_draws + 1)),
            LENGTHS: pack(stored.sum(-1).numpy(), bits_for(self.num_draws + 2)),
            ENTROPY: entropy.astype(np.uint16),
            CODING: np.array([self.vocab_size, self.num_draws], dtype=np.int32),
        }

    def _most_likely(self, row: TopKSignal) -> dict[str, NDArray[Any]]:
        assert self.top_k is not None
        if self.dtype == FIXED:
            return {
                TOKENS: pack(row.tokens.numpy(), bits_for(self.vocab_size)),
                LOG_PROBS: pack(quantise(-row.log_probs, FIXED_RANGE, FIXED_BITS), FIXED_BITS),
                LOG_TAIL: quantise(-row.log_tail, FIXED_RANGE, FIXED_BITS).astype(np.uint16),
                CODING: np.array([self.vocab_size, self.top_k], dtype=np.int32),
            }
        dtype = torch.float16 if self.dtype == "float16" else torch.float32
        # Not below the smallest number of the dtype: each of the k tokens has a probability above 0.
        log_probs = row.log_probs.clamp(min=torch.finfo(dtype).min).to(dtype)
        return {
            TOKENS: row.tokens.to(torch.int32).numpy().reshape(-1),
            LOG_PROBS: log_probs.numpy().reshape(-1),
            LOG_TAIL: row.log_tail.to(dtype).numpy(),
        }


# ---- Reading ----


def decode(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, bool]:
    """What `Coding.columns` stored of some rows.

    Args:
        rows: cached rows of one cache.
        columns: names of their columns.

    Returns:
        Tokens [N, m], their log-probabilities or weights [N, m], log of the tails or entropies [N], and whether the
        tokens were drawn; of all rows one after the other.
    """
    if COUNTS in columns:
        return (*_decode_drawn(rows), True)
    if CODING in columns:
        return (*_decode_fixed(rows), False)
    tail = _joined(rows, LOG_TAIL)
    shape = (len(tail), -1) if len(tail) else (0, 1)
    tokens, log_probs = (_joined(rows, name).reshape(shape) for name in (TOKENS, LOG_PROBS))
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(log_probs), torch.from_numpy(tail), False


def _joined(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[Any]:
    return np.concatenate([np.asarray(row[name]) for row in rows])


def _decode_fixed(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, codes = [], []
    vocab_size, top_k = (int(number) for number in rows[0][CODING])
    for row in rows:
        count = len(row[LOG_TAIL]) * top_k
        tokens.append(unpack(row[TOKENS], bits_for(vocab_size), count))
        codes.append(unpack(row[LOG_PROBS], FIXED_BITS, count))
    log_probs, log_tail = (
        -restore(x, FIXED_RANGE, FIXED_BITS) for x in (np.concatenate(codes), _joined(rows, LOG_TAIL))
    )
    return torch.from_numpy(np.concatenate(tokens)).view(-1, top_k), log_probs.view(-1, top_k), log_tail


def _decode_drawn(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, counts, lengths = [], [], []
    vocab_size, num_draws = (int(number) for number in rows[0][CODING])
    for row in rows:
        lengths.append(unpack(row[LENGTHS], bits_for(num_draws + 2), len(row[ENTROPY])))
        stored = int(lengths[-1].sum())
        tokens.append(unpack(row[TOKENS], bits_for(vocab_size), stored))
        counts.append(unpack(row[COUNTS], bits_for(num_draws + 1), stored))
    entries = torch.from_numpy(np.concatenate(lengths))
    width = int(entries.max()) if len(entries) else 1
    filled = torch.arange(width) < entries[:, None]
    token = torch.zeros(filled.shape, dtype=torch.long)
    weight = torch.zeros(filled.shape)
    token[filled] = torch.from_numpy(np.concatenate(tokens))
    weight[filled] = torch.from_numpy(np.concatenate(counts)).float() / num_draws
    return token, weight, restore(_joined(rows, ENTROPY), math.log(vocab_size) or 1.0, ENTROPY_BITS)
