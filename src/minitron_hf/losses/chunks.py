"""Sizes of the chunks of tokens in the fused loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def default_chunk_size(
    num_tokens: int, vocab_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> int:
    """Number of tokens whose logits are in memory at one time.

    On a CPU in float32, matrix products gain little beyond 200 tokens. A sixth of the tokens, 224 at most, keeps the
    peak logits memory of both models, relative to one float32 [N, V], under 0.4 at 1,024 tokens and under 0.06 at
    8,192. Half-precision products are so fast that adding a chunk's product to the head's float32 gradient takes
    longer. Chunks of a quarter of the tokens, 1,024 at most, halve the time of the loss (V = 49,152, H = 576), and
    the logits of both models are at most a quarter of one float32 [N, V] from 512 tokens on.
    With a small vocabulary a chunk holds as many tokens as fit into 16 MB, to limit the overhead.

    On an accelerator [chunk, V] is about half a GB in bfloat16, however few the tokens. Every chunk reads and writes
    the head's float32 gradient once, which takes as long as the four products of some 250 tokens (by arithmetic, for
    an H100), so smaller chunks would be slower.

    Args:
        num_tokens: N.
        vocab_size: V.
        device: of the products.
        dtype: of the products.
    """
    half_gigabyte = max(128, (1 << 28) // vocab_size // 128 * 128)
    if device.type != "cpu":
        return half_gigabyte
    size = min(1024, -(-num_tokens // 4), half_gigabyte) if dtype.itemsize < 4 else min(224, -(-num_tokens // 6))
    return max(128, size, (1 << 22) // vocab_size)


def even_slices(length: int, largest: int) -> Iterator[slice]:
    """Cut `range(length)` into the fewest slices of at most `largest`, longest first, as equal as possible."""
    count = -(-length // largest)
    start = 0
    for index in range(count):
        stop = start + (length - start + count - index - 1) // (count - index)
        yield slice(start, stop)
        start = stop
