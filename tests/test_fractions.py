"""Fractions: what they are rounded to, what follows from them, and those that would come to no change."""

from __future__ import annotations

import contextlib
import itertools
import json
import math

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, StableLmConfig

from minitron_hf.errors import MinitronError, PlanError
from minitron_hf.families import FIELD_OF_AXIS, PRUNER_FIELDS, spec_for
from minitron_hf.pruning.iterations import iterate_importance
from minitron_hf.pruning.masking import masked_units
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.resolve import resolve_sizes
from minitron_hf.sizes.shapes import enumerate_shapes
from minitron_hf.sizes.student import student_config
from pocket import (
    POCKETS,
    cuttable,
    float64_throughout,
    pocket_config,
    pocket_model,
    pocket_tokens,
)
from test_cli import minitron

#: Multi-head attention: as many KV heads as heads. Heads and residual stream of StableLM only move together.
MULTI_HEAD = {
    "llama": {"num_key_value_heads": 12},
    "mistral": {"num_key_value_heads": 12},
    "olmo2": {"num_key_value_heads": 12},
    "phi3": {"num_key_value_heads": 12},
    "stablelm": {"num_key_value_heads": 6},
    "olmoe": {"num_key_value_heads": 6},
}


def cut(config: PretrainedConfig, **request) -> dict[str, int]:
    """The sizes that change."""
    before = spec_for(config).sizes(config)
    sizes, _ = resolve_sizes(spec_for(config), config, PrunerConfig(**request))
    assert sizes == spec_for(config).sizes(student_config(config, PrunerConfig(**request)))
    return {FIELD_OF_AXIS[axis]: size for axis, size in sizes.items() if size != before[axis]}


# Multi-head attention


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention_cuts_heads_and_kv_heads_together(name: str):
    config = pocket_config(name, **MULTI_HEAD[name])
    half = config.num_attention_heads // 2
    both = {"num_attention_heads": half, "num_key_value_heads": half}
    stream = {"hidden_size": config.hidden_size // 2} if POCKETS[name].config.head_dim * 6 == 48 and half == 3 else {}
    for request in ({"num_attention_heads": 0.5}, {"num_attention_heads": half}, {"num_key_value_heads": 0.5}, both):
        assert cut(config, **request, multiple_of=1) == {**both, **stream}
    if stream:
        assert cut(config, hidden_size=0.5, multiple_of=1) == {**both, **stream}


def test_the_cut_of_multi_head_attention_is_the_masked_teacher():
    teacher = pocket_model("llama", num_key_value_heads=12)
    scores = estimate_importance(teacher, metric="random")
    plan = make_plan(teacher, PrunerConfig(num_attention_heads=0.5), scores)
    assert "num_key_value_heads follows num_attention_heads to 6: there is one for each." in plan.notes
    assert plan.kept["heads"].tolist() == plan.kept["kv"].tolist()
    student, tokens = apply_plan(teacher, plan), pocket_tokens(2, 12)
    assert student.config.num_key_value_heads == student.config.num_attention_heads == 6
    with float64_throughout(), torch.no_grad(), masked_units(teacher, plan):
        expected = teacher(tokens, use_cache=False).logits
    with float64_throughout(), torch.no_grad():
        assert (student(tokens, use_cache=False).logits - expected).abs().max() < 1e-12


# No change


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        (LlamaConfig(num_key_value_heads=1), {"num_key_value_heads": 0.5}, "there is only one. Give num_attention_h"),
        (LlamaConfig(num_key_value_heads=8), {"num_attention_heads": 0.9}, "to a multiple of 8. Give 24 or fewer"),
        (
            LlamaConfig(),
            {"num_attention_heads": 0.5, "num_key_value_heads": 1.0},
            "Give a smaller num_key_value_heads",
        ),
        (pocket_config("llama"), {"num_hidden_layers": 0.99}, "num_hidden_layers=0.99 of 5 .*all 5. Give 4 or fewer"),
        (pocket_config("mistral"), {"hidden_size": 0.95, "multiple_of": 12}, "to a multiple of 12. Give 24 or fewer"),
        (pocket_config("mixtral"), {"num_experts": 0.99}, "num_experts=0.99 of 6 comes to no change"),
        (pocket_config("mixtral", num_experts_per_tok=6), {"num_experts": 0.5}, "num_experts=3: this model needs"),
        (pocket_config("granitemoehybrid", num_local_experts=0), {"num_experts": 0.5}, "this model has none"),
        (StableLmConfig(num_key_value_heads=32), {"hidden_size": 0.99}, "multiple of 80. Give 2480 or fewer"),
    ],
)
def test_fractions_that_come_to_no_change_are_refused(config: PretrainedConfig, request_: dict, message: str):
    with pytest.raises(PlanError, match=message):
        cut(config, **request_)


@pytest.mark.parametrize("name", POCKETS)
def test_every_fraction_of_every_family_cuts_or_is_refused(name: str):
    config = pocket_config(name)
    spec = spec_for(config)
    before = spec.sizes(config)
    for size, fraction in itertools.product(sorted(cuttable(name)), (0.5, 0.97)):
        with contextlib.suppress(PlanError):
            sizes, _ = resolve_sizes(spec, config, PrunerConfig(**{size: fraction}))
            assert sizes[PRUNER_FIELDS[size]] < before[PRUNER_FIELDS[size]], f"{size}={fraction}"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_next", "stablelm"])
def test_all_of_it_and_nothing_said_stay_the_identity(name: str):
    config = pocket_config(name)
    sizes = spec_for(config).sizes(config)
    assert cut(config) == {}
    for axis in sorted(axis for field, axis in PRUNER_FIELDS.items() if field in cuttable(name)):
        for same in (1.0, sizes[axis]):
            assert cut(config, **{FIELD_OF_AXIS[axis]: same}) == {}


@pytest.mark.parametrize("fraction", [0.5, 20])
def test_sizes_that_no_layer_has_are_refused(fraction, tmp_path):
    """All layers have experts, and the config still says how wide an MLP would be."""
    config = pocket_config("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=1)
    message = rf"intermediate_size={fraction}: .* no layer has .* It has .*moe_intermediate_size"
    with pytest.raises(PlanError, match=message):
        make_plan(config, PrunerConfig(intermediate_size=fraction))
    with pytest.raises(PlanError, match="no layer has these units"):
        enumerate_shapes(config, {"intermediate_size": [fraction]})
    config.save_pretrained(tmp_path / "teacher")
    for command in (["plan"], ["fit", "--device", "H100"]):
        result = minitron(*command, tmp_path / "teacher", "--intermediate-size", fraction)
        assert result.returncode == 2
        assert "no layer has these units" in result.stderr
    values = {
        "teacher": str(tmp_path / "teacher"),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": "a.txt", "eval": "a.txt"},
    }
    (tmp_path / "a.txt").write_text("text\n", encoding="utf-8")
    with pytest.raises(MinitronError, match="no layer has these units"):
        check_recipe(Recipe.from_dict({**values, "prune": {"intermediate_size": fraction}}))


def test_rounds_of_scoring_may_come_to_no_change_at_first():
    """One layer of five goes in two rounds: half of it is none."""
    model = pocket_model("llama", dtype=torch.float32)
    request = PrunerConfig(num_attention_heads=9)
    rows = [pocket_tokens(12, seed=seed).tolist() for seed in range(2)]
    scores = iterate_importance(model, request, rows, iterations=4, max_length=12, show_progress=False)
    assert make_plan(model, request, scores).sizes["heads"]["student"] == 9


# Rounding


def large(**sizes) -> LlamaConfig:
    return LlamaConfig(num_attention_heads=32, num_key_value_heads=8, head_dim=128, **sizes)


@pytest.mark.parametrize(
    ("teacher", "fraction", "expected"),
    [
        (14336, 0.65, 9216),  # Llama-3.1-8B, as Sreenivas et al. 2024 pruned it to 4B
        (14336, 0.8, 11520),  # Mistral-NeMo-12B, as Sreenivas et al. 2024 pruned it to 8B
        (24576, 0.375, 9216),  # Nemotron-4-15B, as Muralidharan et al. 2024 pruned it to 4B
        (11008, 0.5, 5504),  # Llama-2-7B, as Sheared-LLaMA cut it to 1.3B
        (11008, 0.628, 6912),  # and to 2.7B
        (4096, 0.75, 3072),
        (5120, 0.8, 4096),
        (4096, 0.7, 2816),
        (2048, 0.65, 1344),
        (2040, 0.65, 1328),  # small: a multiple of 8
        (172, 0.5, 88),
    ],
)
def test_fractions_of_large_sizes_are_rounded_to_what_kernels_like(teacher: int, fraction: float, expected: int):
    for field in ("intermediate_size", "hidden_size"):
        request = {field: fraction}
        if field == "hidden_size" and teacher % 32:
            continue  # Llama's config insists on a multiple of the heads
        assert cut(large(**{field: teacher}), **request) == {field: expected}
        step = next((step for step in (256, 128, 64) if teacher >= 32 * step), 8)
        assert expected % min(step, 64) == 0
        assert abs(expected - fraction * teacher) <= step / 2


def test_rounding_further_than_before_is_noted_and_can_be_chosen():
    config = large(hidden_size=4096, intermediate_size=14336)
    spec = spec_for(config)
    _, [note] = resolve_sizes(spec, config, PrunerConfig(intermediate_size=0.65, hidden_size=0.75))
    assert "intermediate_size=0.65 of 14336 is rounded to 9216, a multiple of 256" in note
    for request, expected in (
        ({"intermediate_size": 0.65, "multiple_of": 8}, 9320),
        ({"intermediate_size": 9319}, 9319),
        ({"intermediate_size": 9320}, 9320),
    ):
        sizes, notes = resolve_sizes(spec, config, PrunerConfig(**request))
        assert (sizes["ffn"], notes) == (expected, [])
    assert json.loads(json.dumps(PrunerConfig().to_dict()))["multiple_of"] is None


def test_steps_of_large_models_are_legal_too():
    """GPT-NeoX-20B's residual stream is as wide as its 64 heads of 96 dimensions."""
    config = AutoConfig.for_model("gpt_neox", hidden_size=6144, num_attention_heads=64, intermediate_size=24576)
    sizes = cut(config, hidden_size=0.7)
    assert sizes["hidden_size"] == 96 * sizes["num_attention_heads"]
    assert sizes["hidden_size"] % math.lcm(64, 96) == 0
