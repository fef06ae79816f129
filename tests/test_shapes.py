"""Shapes: the published search spaces, exact counts and caches, and choices that differ."""

from __future__ import annotations

import contextlib
import itertools
import math
import re

import pytest
import torch
from transformers import LlamaConfig, NemotronConfig

from minitron_hf.errors import PlanError
from minitron_hf.models import count_parameters
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.shapes import (
    cache_bytes,
    counted_cost,
    enumerate_shapes,
    filter_by_budgets,
    memory_bytes,
    require_budgets,
    select_diverse,
)
from minitron_hf.sizes.student import student_config
from pocket import POCKETS, cuttable, pocket_config, pocket_model, pocket_tokens

#: Nemotron-4 15B (Muralidharan et al. 2024).
NEMOTRON = NemotronConfig(
    num_hidden_layers=32,
    hidden_size=6144,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=24576,
    vocab_size=256000,
)
RATIOS = [f"{ratio}*hidden_size" for ratio in (2.5, 3, 3.5, 4)]


def nemotron_parameters(layers: int, heads: int, ffn: int, hidden: int) -> int:
    """Written out: q and o, k and v, up and down, two LayerNorms with biases; final norm, embeddings, head."""
    layer = 2 * hidden * heads * 128 + 2 * hidden * 8 * 128 + 2 * hidden * ffn + 4 * hidden
    return layers * layer + 2 * hidden + 2 * 256000 * hidden


@pytest.fixture(scope="module")
def eight_billion():
    space = {
        "num_hidden_layers": [29, 30, 31, 32],
        "num_attention_heads": [32, 48],
        "hidden_size": [4096, 4608, 5120, 5632, 6144],
        "intermediate_size": RATIOS,
    }
    return enumerate_shapes(NEMOTRON, space)


def test_the_published_8b_space(eight_billion):
    assert len(eight_billion.shapes) == 4 * 2 * 5 * 4
    found = filter_by_budgets(eight_billion.shapes, {"max_parameters": 8.5e9}, 1 - 7.8 / 8.5, counted_cost)
    rows = {tuple(shape.sizes[axis] for axis in ("layers", "heads", "ffn", "hidden")) for shape in found}
    assert rows == {
        (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096),
        (31, 32, 12800, 5120), (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096),
        (30, 32, 12800, 5120), (30, 32, 16128, 4608), (30, 48, 13824, 4608), (30, 48, 16384, 4096),
        (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
    }  # fmt: skip


@pytest.mark.slow
def test_the_published_4b_space():
    space = {
        "num_hidden_layers": [29, 30, 31, 32],
        "num_attention_heads": [24, 32, 48],
        "hidden_size": [2560, 3072, 3584, 4096, 4608],
        "intermediate_size": RATIOS,
    }
    found = enumerate_shapes(NEMOTRON, space).shapes
    for shape in found:
        assert shape.num_parameters == nemotron_parameters(
            *(shape.sizes[a] for a in ("layers", "heads", "ffn", "hidden"))
        )
    assert len([shape for shape in found if abs(shape.num_parameters / 4e9 - 1) <= 0.05]) == 18


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "mixtral", "qwen2_moe"])
def test_counts_are_those_of_the_stock_model(name: str):
    config = pocket_config(name)
    names = sorted(cuttable(name) - {"num_key_value_heads", "num_experts"})
    space = {size: [0.5, 1.0] for size in names if size != "hidden_size" or not POCKETS[name].coupled}
    shapes = enumerate_shapes(config, space, PrunerConfig(multiple_of=1)).shapes
    assert len(shapes) > 4
    for shape in shapes:
        assert shape.num_parameters == count_parameters(student_config(config, shape.request))
    assert [shape.num_parameters for shape in shapes] == sorted((s.num_parameters for s in shapes), reverse=True)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", POCKETS)
def test_counts_are_those_of_the_student_in_every_family(name: str):
    """All widths at once, then depth: layers may hold unequal sizes, and lack what others have."""
    config = pocket_config(name)
    widths = {size: [0.5] for size in sorted(cuttable(name)) if size != "num_hidden_layers"}
    coupled = {"hidden_size"} if {"num_attention_heads", "mamba_num_heads", "conv_dim"} & widths.keys() else set()
    for space in ({size: widths[size] for size in widths.keys() - coupled}, {"num_hidden_layers": [3]}):
        with contextlib.suppress(PlanError):  # depths that leave no possible model
            for shape in enumerate_shapes(config, space, PrunerConfig(multiple_of=1)).shapes:
                assert shape.num_parameters == count_parameters(student_config(config, shape.request))


def test_what_cannot_be_cut_is_counted_with_the_reason():
    space = {"hidden_size": [24, 25, 26], "num_attention_heads": [6, 12]}
    found = enumerate_shapes(pocket_config("llama"), space)
    assert [shape.name for shape in found.shapes] == [
        "hidden_size=24 num_attention_heads=12",
        "hidden_size=24 num_attention_heads=6",
    ]
    assert sum(found.refused.values()) == 4
    with pytest.raises(PlanError, match="No shape of this space can be cut"):
        enumerate_shapes(pocket_config("llama"), {"hidden_size": [25]})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"num_experts": [2]}, "a 'llama' model has no num_experts"),
        ({"hidden_size": 24}, "hidden_size=24: expected a list"),
        ({"intermediate_size": ["two*hidden_size"]}, r"expected a size, a fraction, or such as '2\.5"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(space, message):
    with pytest.raises(PlanError, match=message):
        enumerate_shapes(pocket_config("llama"), space)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe"])
def test_cache_is_what_the_model_fills(name: str):
    """Also beyond a sliding window."""
    model = pocket_model(name, dtype=torch.float32)
    cache = model(pocket_tokens(2, 23), use_cache=True).past_key_values
    expected = sum(
        tensor.numel() * 4 for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None
    )
    found = cache_bytes(model.config, context_length=23, batch_size=2, dtype=torch.float32)
    assert found == expected > 0
    both = memory_bytes(model.config, 1000, context_length=23, batch_size=2, dtype=torch.float32)
    assert both == 4000 + found


def test_different_shapes_are_the_best_of_their_surroundings(eight_billion):
    shapes = filter_by_budgets(eight_billion.shapes, {"max_parameters": 8.5e9}, 0.1, counted_cost)
    cost = {shape.name: index * 7 % 15 for index, shape in enumerate(shapes)}
    chosen = select_diverse(shapes, 5, cost=lambda shape: cost[shape.name])
    assert len(chosen) == 5
    assert chosen[0] == min(shapes, key=lambda shape: cost[shape.name])

    logs = {shape.name: [math.log(size) for size in shape.sizes.values()] for shape in shapes}
    spans = [max(column) - min(column) or 1 for column in zip(*logs.values(), strict=True)]

    def distance(one, other):
        pairs = zip(logs[one.name], logs[other.name], spans, strict=True)
        return max(abs(a - b) / span for a, b, span in pairs)

    nearest = min(distance(one, other) for one, other in itertools.combinations(chosen, 2))
    largest = [
        distance(*pair) for pair in itertools.combinations(sorted(shapes, key=lambda s: -s.num_parameters)[:5], 2)
    ]
    assert nearest > min(largest)  # than the five largest are
    assert select_diverse(shapes[:3], 5) == shapes[:3]


def test_sizes_of_0_are_no_obstacle_to_a_diverse_selection():
    """DeepSeek-V2-Lite has no bottleneck before its queries."""
    config = pocket_config("deepseek_v3", q_lora_rank=None)
    shapes = enumerate_shapes(config, {"intermediate_size": [0.25, 0.5, 0.75, 1.0]}).shapes
    assert any(0 in shape.sizes.values() for shape in shapes)
    assert len(select_diverse(shapes, 2)) == 2


def test_names_are_short_and_complete():
    [shape] = enumerate_shapes(LlamaConfig(num_hidden_layers=4), {"intermediate_size": [0.5]}).shapes
    assert shape.name == "intermediate_size=5504"
    assert shape.request == PrunerConfig(intermediate_size=5504)


def test_the_nearest_smaller_shape_is_named_with_the_tolerance_that_takes_it():
    shapes = enumerate_shapes(pocket_model("llama").config, {"intermediate_size": [0.25, 0.5]}).shapes
    larger, smaller = (shape.num_parameters for shape in shapes)
    budgets = {"max_parameters": larger - 1}
    with pytest.raises(PlanError, match="The nearest smaller one is intermediate_size=") as refused:
        require_budgets(shapes, budgets, 0.0, counted_cost)
    assert f"max_parameters {smaller:,}" in str(refused.value)
    named = float(re.search(r"tolerance=([\d.]+) takes it", str(refused.value))[1])
    assert [shape.num_parameters for shape in require_budgets(shapes, budgets, named, counted_cost)] == [smaller]
    assert (1 - (named - 0.01)) * (larger - 1) > smaller
    with pytest.raises(PlanError, match=f"costs so little: max_parameters is {smaller:,} to {larger:,}"):
        require_budgets(shapes, {"max_parameters": smaller - 1}, 0.5, counted_cost)
