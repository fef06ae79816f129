"""How many tokens the fused loss takes at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def default_chunk_size(num_tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits exist at one time.

    On a CPU, matrix products gain little beyond 200 tokens. A sixth of the tokens, 224 at most, keeps the logits of
    both models under 0.4 copies of one float32 [N, V] at 1,024 tokens and under 0.06 at 8,192, at any vocabulary;
    where the vocabulary is so small that 16 MB hold more, overhead decides. On an accelerator [chunk, V] is about
    half a GB in bfloat16 however few the tokens: every chunk reads and writes the head's float32 gradient once, which
    takes as long there as the four products of some 250 tokens (by arithmetic, for an H100), so that smaller chunks
    would cost more time.
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
