"""Lazy tensors give the numbers that ordinary tensors have after the same operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitron_hf.pruning import stored_reading
from minitron_hf.pruning.stored_tensors import DTYPES, LazyTensor, lazy_tensors


def pairs(folder: Path, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 11), "cube": (5, 4, 6), "vector": (13,), "number": (), "none": (0, 3)}
    eager = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(eager, folder / "tensors.safetensors")
    found = lazy_tensors(folder / "tensors.safetensors")
    assert found.keys() == eager.keys()
    return [(found[name], eager[name]) for name in shapes]


OPERATIONS = {
    "rows": lambda t: t.index_select(0, torch.tensor([3, 0, 4])),
    "columns": lambda t: t.index_select(-1, torch.tensor([1, 3])),
    "repeated": lambda t: t.index_select(0, torch.tensor([2, 2, 1])),
    "slice": lambda t: t[1:5],
    "strided": lambda t: t[::3],
    "tail": lambda t: t[..., -4:],
    "select": lambda t: t.select(0, -2),
    "inner": lambda t: t.select(1, 1),
    "chunk": lambda t: torch.chunk(t, 2, dim=1)[1],
    "split": lambda t: torch.split(t, [1, 3, t.shape[0] - 4])[1],
    "unbind": lambda t: torch.unbind(t)[3],
    "stack": lambda t: torch.stack([t, t * 2, t + 1]),
    "stack inside": lambda t: torch.stack([t, t + 1], dim=1),
    "cat": lambda t: torch.cat([t, t * 2]),
    "cat inside": lambda t: torch.cat([t + 1, t], dim=-1),
    "experts": lambda t: [c.squeeze(0) for c in torch.chunk(torch.stack([t, t + 1, t * 2]), 3)][2],
    "gate and up": lambda t: torch.cat([torch.stack([t, t + 1]), torch.stack([t * 2, t])], dim=1)[:, 2:6],
    "transpose": lambda t: t.transpose(0, 1),
    "permute": lambda t: t.permute(*reversed(range(t.ndim))).contiguous(),
    "t": lambda t: t.t() if t.ndim == 2 else t.transpose(-1, 0),
    "unsqueeze": lambda t: t.unsqueeze(1)[:, 0],
    "flat": lambda t: t.reshape(-1),
    "halves": lambda t: t[:, : t.shape[1] // 2 * 2].reshape(t.shape[0], -1, 2),
    "cast": lambda t: t.to(torch.float64),
    "arithmetic": lambda t: ((t + 1.5) * 3 - 1.5) / 7,
    "sum": lambda t: t + t * 2,
    "no rule": lambda t: t.flip(0),
    "parameter": lambda t: torch.nn.Parameter(t).detach(),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("first", OPERATIONS)
def test_lazy_tensors_are_the_tensors_they_stand_for(first, tmp_path, monkeypatch):
    """Two operations after each other; read in one piece, in blocks of rows, and value by value."""
    monkeypatch.setattr(stored_reading, "_GAP_BYTES", 8)
    monkeypatch.setattr(stored_reading, "_SPAN_BYTES", 40)
    compared = 0
    for found, expected in pairs(tmp_path):
        for second in OPERATIONS:
            try:
                wanted = OPERATIONS[second](OPERATIONS[first](expected))
            except (IndexError, RuntimeError, TypeError, ValueError):
                continue
            made = OPERATIONS[second](OPERATIONS[first](found))
            assert type(made) is LazyTensor
            assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
            assert made.stride() == wanted.stride() or not wanted.numel()
            assert torch.equal(made.read(), wanted)
            for block_bytes in (30, 1 << 20):
                monkeypatch.setattr(stored_reading, "BLOCK_BYTES", block_bytes)
                pieces = [piece.reshape(-1) for piece in made.blocks()]
                assert torch.equal(torch.cat(pieces), wanted.reshape(-1))
            assert torch.equal(torch.from_numpy(made.reshape(-1)[::3].numpy()), wanted.reshape(-1)[::3])
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read(dtype: torch.dtype, tmp_path: Path):
    for found, expected in pairs(tmp_path, dtype):
        assert found.dtype == dtype
        bits = (lambda t: t.reshape(-1).view(torch.uint8)) if expected.numel() else (lambda t: t)
        assert torch.equal(bits(found.read()), bits(expected))
        if expected.ndim == 2 and len(expected):
            index = torch.tensor([6, 1, 3])
            assert torch.equal(bits(found.index_select(1, index).read()), bits(expected[:, index].contiguous()))


def test_lazy_tensors_are_not_changed_in_place(tmp_path: Path):
    found, _ = pairs(tmp_path)[0]
    with pytest.raises(NotImplementedError, match="in place"):
        found.add_(1)
    assert repr(found) == "LazyTensor(shape=(7, 11), dtype=torch.float32)"


def test_tensors_like_lazy_ones_can_be_filled_and_have_no_memory(tmp_path: Path):
    """Some stock models draw initial values in the shape of a parameter, which they then leave as it was loaded."""
    found, expected = pairs(tmp_path)[0]
    drawn = torch.empty_like(found).uniform_(1, 2).log_()
    assert (drawn.shape, drawn.dtype, drawn.device.type) == (expected.shape, expected.dtype, "meta")
    assert torch.equal(found.read(), expected)
