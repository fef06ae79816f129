"""Reductions against sums written out, and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from minitron_hf.scoring.reductions import reduce_routed, reduce_rows, reduce_sequence, row_terms

REDUCTIONS = ["mean", "l2", "var"]


def naive_reduce(values: list[float], reduction: str) -> float:
    if reduction == "l2":
        return math.sqrt(math.fsum(value * value for value in values))
    if reduction == "mean":
        return math.fsum(abs(value) for value in values) / len(values)
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def random_values(*shape: int) -> torch.Tensor:
    return 2 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_does_not_count_even_if_it_is_nan(reduction: str):
    """Some attention kernels return NaN for positions that may look at nothing."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    values = random_values(3, 5, 4).masked_fill(~mask[..., None], torch.nan)
    found = reduce_sequence(values, mask, reduction)
    for row in range(3):
        for unit in range(4):
            expected = naive_reduce(values[row, mask[row], unit].tolist(), reduction)
            assert found[row, unit].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_routed_is_the_same_with_zeros_elsewhere(reduction: str):
    """Rows of 5, 2 and 0 tokens and one that sends none; tokens are given in any order."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for row, count in enumerate((5, 2, 0, 3)):
        mask[row, :count] = True
    where = torch.tensor([[1, 1], [0, 4], [0, 0], [1, 0], [0, 2]])
    values = random_values(5, 3)
    dense = torch.zeros(4, 5, 3, dtype=torch.float64)
    dense[where[:, 0], where[:, 1]] = values
    found = reduce_routed(values, where[:, 0], mask.sum(1), reduction)
    torch.testing.assert_close(found, reduce_sequence(dense, mask, reduction), rtol=1e-12, atol=0)
    assert found[:2].min() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_may_come_in_batches(reduction: str):
    values = random_values(7, 3)
    sums = row_terms(values[:4]) + row_terms(values[4:])
    expected = [naive_reduce(values[:, unit].tolist(), reduction) for unit in range(3)]
    assert reduce_rows(sums, 7, reduction).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_precision_is_reduced_in_float32(reduction: str):
    """1,024 ones sum to 256 in bfloat16; the squares of 1,000 do not fit into float16."""
    ones = torch.ones(1, 1024, 1, dtype=torch.bfloat16)
    large = torch.full((1, 8, 1), 1000.0, dtype=torch.float16)
    for values in (ones, large):
        found = reduce_sequence(values, None, reduction)
        assert found.dtype == torch.float32
        expected = naive_reduce(values.flatten().tolist(), reduction)
        assert found.item() == pytest.approx(expected, rel=1e-6)
        rows = torch.zeros(values.shape[1], dtype=torch.int64)
        routed = reduce_routed(values[0], rows, torch.tensor([values.shape[1]]), reduction)
        assert routed.item() == pytest.approx(expected, rel=1e-6)
