"""Sizes of the chunks of tokens in the fused loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def default_chunk_size(num_tokens: int, vocab_size: int, device: torch.device) -> int:
    """Number of tokens whose logits are in memory at one time.

    On a CPU, matrix products gain little beyond 200 tokens. A sixth of the tokens, 224 at most, keeps the peak
    logits memory of both models, relative to one float32 [N, V], under 0.4 at 1,024 tokens and under 0.06 at 8,192.
    With a small vocabulary a chunk holds as many tokens as fit into 16 MB, to limit the overhead.

    On an accelerator [chunk, V] is about half a GB in bfloat16, however few the tokens. Every chunk reads and writes
    the head's float32 gradient once, which takes as long as the four products of some 250 tokens (by arithmetic, for
    an H100), so smaller chunks would be slower.
    """
    if device.type == "cpu":
        return max(128, min(224, -(-num_tokens // 6)), (1 << 22) // vocab_size)
    return max(128, (1 << 28) // vocab_size // 128 * 128)


def even_slices(length: int, largest: int) -> Iterator[slice]:
    """Cut `range(length)` into the fewest slices of at most `largest`, longest first, as equal as possible."""
    count = -(-length // largest)
    start = 0
    for index in range(count):
        stop = start + (length - start + count - index - 1) // (count - index)
        yield slice(start, stop)
        start = stop
