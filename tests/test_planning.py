"""Plans: what is refused, what is chosen (against brute force), what is counted, what is written."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from minitron_hf.errors import HubError, MismatchError, OutputError, PlanError, UnsupportedModelError
from minitron_hf.families import spec_for
from minitron_hf.models import architecture_digest, count_parameters, empty_model
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from minitron_hf.weights import model_digest
from pocket import POCKETS, cuttable, pocket_config, pocket_model

NAMES = list(POCKETS)


def scores_for(config: PretrainedConfig, seed: int = 0, **given: torch.Tensor) -> ImportanceScores:
    """Scores of no model in particular, for a config."""
    generator = torch.Generator().manual_seed(seed)
    spec = spec_for(config)
    sizes = spec.sizes(config)
    layers = sizes["layers"]
    axes = {
        axis.name: torch.rand(spec.units(axis.name, config), generator=generator)
        for axis in spec.axes
        if axis.prunable and axis.name != "layers"
    }
    blocks = torch.rand(layers, layers, generator=generator)
    digests = {"model": None, "architecture": architecture_digest(config), "tokenizer": None, "data": None}
    values = {**axes, "blocks": blocks.masked_fill(torch.ones_like(blocks).tril(-1).bool(), torch.nan), **given}
    return ImportanceScores({axis: values[axis] for axis in axes}, values["blocks"], {"metric": "test"}, digests)


def plan_of(config: PretrainedConfig, scores: ImportanceScores | None = None, **request) -> PruningPlan:
    return make_plan(config, PrunerConfig(**request), scores or scores_for(config))


# Refusals


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("llama", {"hidden_size": 48}, "hidden_size=48 is larger than the teacher's 36"),
        ("llama", {"intermediate_size": 53}, "intermediate_size=53 is larger than the teacher's 52"),
        ("llama", {"num_attention_heads": 15}, "num_attention_heads=15 is larger than the teacher's 12"),
        ("llama", {"num_key_value_heads": 6}, "num_key_value_heads=6 is larger than the teacher's 3"),
        ("llama", {"num_hidden_layers": 1}, "cannot hold the 1 first and 1 last layers"),
        ("llama", {"num_hidden_layers": 3, "keep_last_layers": 3}, "num_hidden_layers=3 cannot hold"),
        ("llama", {"num_hidden_layers": 6}, "num_hidden_layers=6 is larger than the teacher's 5"),
        ("mistral", {"num_attention_heads": 7}, "num_attention_heads must be one of [3, 6, 9, 12]"),
        ("mistral", {"num_key_value_heads": 2, "num_attention_heads": 10}, "one of [2, 4, 6, 8]"),
        ("llama", {"hidden_size": 28}, "multiples of num_attention_heads=12. Nearest: 24 or 36."),
        ("llama", {"hidden_size": 11}, "multiples of num_attention_heads=12. Nearest: 12."),
        ("llama", {"num_attention_heads": 9, "hidden_size": 34}, "num_attention_heads=9. Nearest: 27 or 36."),
        ("llama", {"num_key_value_heads": 2, "num_attention_heads": 8}, "num_attention_heads=8. Nearest: 32."),
        ("minicpm3", {"hidden_size": 30, "num_attention_heads": 2}, "dim_model_base=9 is scaled with it, and only"),
        ("minicpm3", {"hidden_size": 30, "num_attention_heads": 2}, "multiples of 4. Nearest: 28 or 32."),
        ("minicpm3", {"hidden_size": 16, "num_attention_heads": 3}, "num_attention_heads=3. Nearest: 12 or 24."),
        ("gpt2", {"hidden_size": 24, "num_attention_heads": 4}, "Nearest: hidden_size=32 with num_attention_heads=4."),
        ("gpt_neox", {"hidden_size": 40, "num_attention_heads": 4}, "hidden_size=40 and num_attention_heads=4 do not"),
        ("gpt2", {"hidden_size": 30}, "= 8 × num_attention_heads (heads keep their 8 dimensions). Nearest: 24 or 32."),
        ("gpt2", {"hidden_size": 3}, "Nearest: 8."),
        ("glm4_moe", {"num_experts": 5}, "with n_group=2: every kept group keeps equally many of its 3, so num_"),
        ("glm4_moe", {"num_experts": 5}, "must be one of [4, 6]. Nearest: 4 or 6."),
        ("glm4_moe", {"num_experts": 3}, "must be one of [4, 6]. Nearest: 4."),
        ("glm4_moe", {"num_experts": 2}, "num_experts=2: this model needs at least 4 (num_experts_per_tok*n_gr"),
        ("glm4_moe", {"moe_intermediate_size": 9, "shared_expert_intermediate_size": 30}, "= 4 × moe_int"),
        ("mixtral", {"num_experts": 1}, "num_experts=1: this model needs at least 2 (num_experts_per_tok). Keep 2"),
        ("gpt2", {"num_key_value_heads": 1}, "models of type 'gpt2' have no such size. They have num_hidden_layers, "),
        ("gpt_neox", {"num_key_value_heads": 0.5}, "models of type 'gpt_neox' have no such size"),
        ("llama", {"layers_to_drop": [1], "num_hidden_layers": 3}, "dropping 1 of 5 layers leaves 4"),
        ("llama", {"layers_to_drop": [], "num_hidden_layers": 3}, "dropping 0 of 5 layers leaves 5"),
        ("llama", {"layers_to_drop": [1], "num_hidden_layers": 0.5}, "leaves 4. Give one of them"),
        ("llama", {"layers_to_drop": [1, 5]}, "names layer 5, but the teacher has layers 0 to 4"),
        ("llama", {"layers_to_drop": [0, 1, 2, 3, 4]}, "names every layer"),
        ("qwen3_5_text", {"layers_to_drop": [0, 3]}, "of layer_types full_attention. Keep one of [0, 3]."),
        ("olmo_hybrid", {"layers_to_drop": [1, 2, 4]}, "of layer_types linear_attention. Keep one of [1, 2, 4]."),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused(name: str, request_: dict, message: str):
    config = pocket_config(name)
    for refused in (
        lambda: plan_of(config, **request_),
        lambda: make_plan(config, PrunerConfig(**request_)),  # before the scores are missed
        lambda: student_config(config, PrunerConfig(**request_)),
    ):
        with pytest.raises(PlanError) as caught:
            refused()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"hidden_size": 0.0}, "hidden_size=0.0: a fraction to keep lies in (0, 1]"),
        ({"hidden_size": 1.5}, "hidden_size=1.5: a fraction"),
        ({"intermediate_size": -0.5}, "intermediate_size=-0.5: a fraction"),
        ({"intermediate_size": math.nan}, "intermediate_size=nan: a fraction"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: at least one unit"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: at least one unit"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True: expected a number"),
        ({"hidden_size": "64"}, "hidden_size='64': expected a number"),
        ({"layers_to_drop": [1, 2, 1]}, "names a layer twice"),
        ({"layers_to_drop": [-1]}, "expected a list of layer indices, counted from 0"),
        ({"layers_to_drop": [True]}, "expected a list of layer indices"),
        ({"layers_to_drop": ["1"]}, "expected a list of layer indices"),
        ({"layers_to_drop": 3}, "layers_to_drop=3: expected a list"),
        ({"layers_to_drop": "1,2"}, "layers_to_drop='1,2': expected a list"),
        ({"multiple_of": 0}, "multiple_of=0: expected a positive integer"),
        ({"multiple_of": 8.0}, "multiple_of=8.0: expected a positive integer"),
        ({"multiple_of": True}, "multiple_of=True: expected a positive integer"),
        ({"keep_first_layers": -1}, "keep_first_layers=-1: expected a number of layers"),
        ({"keep_last_layers": 0.5}, "keep_last_layers=0.5: expected a number of layers"),
        ({"contiguous": "no"}, "contiguous='no': expected true or false"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_requests_that_make_no_sense_are_refused(request_: dict, message: str):
    with pytest.raises(PlanError) as caught:
        PrunerConfig(**request_)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"hidden_size": 24, "intermediate_size": 20}, "Cutting hidden_size, intermediate_size needs importance"),
        ({"num_hidden_layers": 2}, "Cutting num_hidden_layers needs importance scores"),
        ({"layers_to_drop": [1], "num_attention_heads": 0.5}, "Cutting num_attention_heads needs importance scores"),
    ],
)  # fmt: skip
def test_choices_need_scores(request_: dict, message: str):
    with pytest.raises(PlanError) as caught:
        make_plan(pocket_config("mistral"), PrunerConfig(**request_))
    assert message in str(caught.value)


def test_depth_that_changes_the_attention_scale_is_refused():
    """GPT-2's flag divides attention by the layer's index, and the student's layers have other indices."""
    config = pocket_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    for request in ({"num_hidden_layers": 3}, {"layers_to_drop": [0]}):
        with pytest.raises(PlanError, match=r"num_hidden_layers .* scale_attn_by_inverse_layer_idx=True"):
            plan_of(config, **request)
    assert plan_of(config, hidden_size=24, intermediate_size=16).sizes["layers"] == {"teacher": 4, "student": 4}


def test_refusals_of_the_stock_config_are_passed_on():
    class Picky(MistralConfig):
        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            if self.hidden_size == 24:
                raise ValueError("24 is one of the sizes that it cannot hold")

    config = Picky(**pocket_config("mistral").to_dict())
    with pytest.raises(PlanError, match=r"(?s)stock Picky refuses these sizes.*24 is one of the sizes"):
        student_config(config, PrunerConfig(hidden_size=24))
    assert student_config(config, PrunerConfig(hidden_size=16)).hidden_size == 16


def test_the_factors_of_longrope_stay_because_stream_and_heads_are_cut_alike():
    """Phi-3 wants one factor per rotated pair of hidden_size / heads dimensions, whatever head_dim says."""
    config = pocket_config("phi3-longrope")
    for request in ({"hidden_size": 24}, {"num_attention_heads": 3}, {"hidden_size": 24, "num_attention_heads": 3}):
        student = student_config(config, PrunerConfig(**request))
        assert (student.hidden_size, student.num_attention_heads) == (24, 3)
        assert student.rope_parameters == config.rope_parameters
    with pytest.raises(PlanError, match=r"the stock 'phi3' classes only hold hidden_size = 8 × num_attention_heads"):
        student_config(config, PrunerConfig(hidden_size=32, num_attention_heads=3))
    with pytest.raises(PlanError, match=r"the stock 'gpt2' classes only hold"):
        plan_of(pocket_config("gpt2"), hidden_size=33)


def test_scores_of_another_model_are_refused():
    config = pocket_config("llama")
    with pytest.raises(MismatchError, match="another architecture"):
        plan_of(config, scores_for(pocket_config("mistral")), hidden_size=24)
    scores = estimate_importance(pocket_model("llama"), metric="random")
    with pytest.raises(MismatchError, match="other weights"):
        make_plan(pocket_model("llama", seed=1), PrunerConfig(hidden_size=24), scores)


def test_unknown_fields_are_refused():
    with pytest.raises(
        PlanError,
        match=r"no field hiden_size, width\. Did you mean 'hidden_size'\? Expected: hidden_size, intermediate_size",
    ):
        PrunerConfig.from_dict({"width": 3, "hiden_size": 4})


# Sizes


@pytest.mark.parametrize(
    ("name", "request_", "expected"),
    [
        ("mistral", {"hidden_size": 0.5}, {"hidden": 16}),  # 18 → the nearest multiple of 8
        ("mistral", {"hidden_size": 0.6}, {"hidden": 24}),
        ("mistral", {"hidden_size": 0.5, "multiple_of": 1}, {"hidden": 18}),
        ("mistral", {"intermediate_size": 0.5, "multiple_of": 16}, {"ffn": 32}),
        ("mistral", {"intermediate_size": 0.01}, {"ffn": 8}),  # never nothing
        ("mistral", {"intermediate_size": 0.99}, {"ffn": 48}),
        ("mistral", {"intermediate_size": 1.0, "hidden_size": 1.0}, {}),  # everything, multiple or not
        ("mistral", {"num_hidden_layers": 0.5}, {"layers": 2}),
        ("mistral", {"num_hidden_layers": 0.01, "keep_first_layers": 0}, {"layers": 1}),
        ("mistral", {"num_attention_heads": 0.6}, {"heads": 6}),  # a multiple of the 3 KV heads
        ("mistral", {"num_attention_heads": 0.3, "num_key_value_heads": 0.7}, {"heads": 4, "kv": 2}),
        ("mistral", {"layers_to_drop": [0, 3], "num_hidden_layers": 0.6}, {"layers": 3}),
        ("llama", {"hidden_size": 0.5}, {"hidden": 24}),  # a multiple of 8 and of the 12 heads
        ("llama", {"hidden_size": 0.5, "multiple_of": 1}, {"hidden": 24}),
        ("llama", {"hidden_size": 0.5, "num_attention_heads": 6, "multiple_of": 1}, {"hidden": 18, "heads": 6}),
        ("minicpm3", {"hidden_size": 0.6, "num_attention_heads": 2, "multiple_of": 1}, {"hidden": 20, "heads": 2}),
        ("gpt2", {"hidden_size": 0.5}, {"hidden": 16, "heads": 2}),
        ("gpt2", {"num_attention_heads": 0.6}, {"hidden": 24, "heads": 3}),
        ("gpt2", {"num_attention_heads": 3, "hidden_size": 24}, {"hidden": 24, "heads": 3}),
        ("gpt_neox", {"hidden_size": 0.8, "multiple_of": 1}, {"hidden": 32, "heads": 4}),
    ],
)
def test_sizes(name: str, request_: dict, expected: Mapping[str, int]):
    config = pocket_config(name)
    plan = plan_of(config, **request_)
    before = spec_for(config).sizes(config)
    assert {axis: sizes["student"] for axis, sizes in plan.sizes.items()} == {**before, **expected}
    assert {axis: sizes["teacher"] for axis, sizes in plan.sizes.items()} == before
    from_config = student_config(config, PrunerConfig(**request_))
    assert spec_for(config).sizes(from_config) == {**before, **expected}
    assert spec_for(config).sizes(plan.build_student_config()) == {**before, **expected}


def test_whole_groups_go_when_only_kv_heads_are_cut():
    plan = plan_of(pocket_config("mistral"), num_key_value_heads=2)
    assert (plan.sizes["kv"]["student"], plan.sizes["heads"]["student"]) == (2, 8)
    for groups, heads in zip(plan.kept["kv"], plan.kept["heads"]):
        assert heads.tolist() == [4 * group + each for group in groups for each in range(4)]
    assert any("num_attention_heads follows num_key_value_heads to 8" in note for note in plan.notes)
    # A fraction of the heads never exceeds what the kept groups have.
    plan = plan_of(pocket_config("mistral"), num_key_value_heads=0.34, num_attention_heads=0.9)
    assert (plan.sizes["kv"]["student"], plan.sizes["heads"]["student"]) == (1, 4)


def test_state_space_heads_stay_in_equal_groups():
    with pytest.raises(PlanError, match=r"mamba_num_heads must be one of \[2, 4, 6, 8\]"):
        plan_of(pocket_config("nemotron_h"), mamba_num_heads=5)
    plan = plan_of(pocket_config("falcon_h1"), mamba_num_heads=0.6, mamba_head_dim=5)
    assert plan.student["config"]["mamba_n_heads"] == 4
    assert plan.student["config"]["mamba_d_ssm"] == 20


def test_layers_whose_kinds_follow_from_a_period():
    """Jamba's pocket has attention in layers 1 and 3, experts in 0, 2 and 4."""
    config = pocket_config("jamba")
    for seed in range(4):
        assert plan_of(config, scores_for(config, seed), num_hidden_layers=3).layers_kept in ((0, 1, 4), (0, 3, 4))
    assert plan_of(config, layers_to_drop=[0, 1]).layers_kept == (2, 3, 4)
    with pytest.raises(PlanError, match=r"their layers_block_type follow from attn_layer_period and attn_"):
        plan_of(config, layers_to_drop=[0])


def test_parts_that_the_stock_model_lacks_are_not_promised():
    teacher = pocket_config("nemotron_h", num_nextn_predict_layers=1)
    assert plan_of(teacher, layers_to_drop=[1]).build_student_config().num_nextn_predict_layers == 0


def test_infinite_limits_survive_a_plan():
    plan = plan_of(pocket_config("falcon_h1"), layers_to_drop=[1])
    assert plan.build_student_config().time_step_limit == (0.0, math.inf)


def test_a_size_that_follows_is_noted():
    assert "num_attention_heads follows hidden_size to 3" in plan_of(pocket_config("gpt2"), hidden_size=24).notes[0]
    assert (
        "hidden_size follows num_attention_heads to 16"
        in plan_of(pocket_config("gpt2"), num_attention_heads=2).notes[0]
    )
    assert plan_of(pocket_config("mistral"), hidden_size=24).notes == ()


def test_a_large_block_of_layers_is_noted():
    deep = LlamaConfig(num_hidden_layers=12, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    [note] = plan_of(deep, num_hidden_layers=4).notes
    assert "8 of 12 layers go as one block" in note
    assert "contiguous=False" in note
    for request in ({"num_hidden_layers": 5}, {"num_hidden_layers": 4, "contiguous": False}):
        assert plan_of(deep, **request).notes == ()
    assert plan_of(deep, layers_to_drop=list(range(2, 10))).notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_student_config_keeps_everything_else(name: str):
    teacher = pocket_config(name)
    before = copy.deepcopy(teacher.to_dict())
    heads = 6 if "num_attention_heads" in cuttable(name) and "kv" in spec_for(teacher).refused else 3
    request = {"intermediate_size": 24, "hidden_size": 24, "num_attention_heads": heads}
    own = (POCKETS[name].widths or {}).get("everything", {})
    request |= {field: own[field] for field in request if field in own}
    request = {field: size for field, size in request.items() if field in cuttable(name)}
    student = student_config(teacher, PrunerConfig(**request, norm_compensation=False))  # which moves eps
    assert type(student) is type(teacher)
    assert teacher.to_dict() == before
    changed = {key for key, value in student.to_dict().items() if before.get(key) != value}
    assert changed <= {
        "hidden_size", "intermediate_size", "num_attention_heads", "n_embd", "n_inner", "n_head", "head_dim",
        "prefix_dense_intermediate_size", "num_attention_heads_per_layer",
        "num_mtp_layers", "num_nextn_predict_layers",  # a student has no layers that predict further tokens
        "word_embed_proj_dim", "ffn_dim", "ffn_hidden_size", "num_kv_heads", "num_heads", "transformers_version",
        "dense_intermediate_size",
        "dff",
        "mamba_d_ssm", "mamba_n_heads",
        "block_auto_adjust_ff_dim", "intermediate_size_mlp",
        *(() if POCKETS[name].kv else ("num_key_value_heads",)),
        *(field for field, *_ in spec_for(teacher).config_rules.scaled_fields),
    }  # fmt: skip
    if POCKETS[name].attention_out:
        assert spec_for(student).sizes(student)["head_dim"] == (8 if POCKETS[name].coupled else 10)


def test_per_layer_lists_are_sliced_and_counts_recounted():
    config = pocket_config("qwen2")  # layers 0 and 1 full, 2 to 4 sliding
    kept = student_config(config, PrunerConfig(layers_to_drop=[0, 3]))
    assert kept.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert kept.max_window_layers == 1
    assert config.layer_types.count("full_attention") == config.max_window_layers == 2


def test_layers_stay_with_those_that_they_use():
    """Layers 4 and 5 of six use what layer 3 computes."""
    types = ["full"] * 4 + ["shared"] * 2
    lists = {"layer_types": None, "mlp_layer_types": None}
    config = pocket_config("glm_moe_dsa", num_hidden_layers=6, indexer_types=types, **lists)
    for drop in ([3], [3, 4], [0, 3, 5]):
        with pytest.raises(
            PlanError, match=r"\(indexer_types 'shared'\) uses what layer 3 computes. Keep layer 3 too"
        ):
            student_config(config, PrunerConfig(layers_to_drop=drop))
    assert student_config(config, PrunerConfig(layers_to_drop=[2, 4])).indexer_types == ["full"] * 3 + ["shared"]
    assert student_config(config, PrunerConfig(layers_to_drop=[3, 4, 5])).indexer_types == ["full"] * 3

    blocks = torch.full((6, 6), 9.0)
    blocks[3, 3], blocks[3, 4], blocks[1, 1], blocks[1, 2] = 0, 0, 1, 1  # layer 3 is the least important
    scores = scores_for(config, blocks=blocks.masked_fill(torch.ones_like(blocks).tril(-1).bool(), torch.nan))
    assert plan_of(config, scores, num_hidden_layers=5).layers_dropped == (1,)
    assert plan_of(config, scores, num_hidden_layers=4).layers_dropped == (1, 2)
    free = {"contiguous": False, "keep_last_layers": 0}
    assert plan_of(config, scores, num_hidden_layers=5, **free).layers_dropped == (1,)
    assert plan_of(config, scores, num_hidden_layers=2, **free).layers_dropped == (1, 2, 4, 5)
    blocks[4, 4], blocks[5, 5] = 0.5, 0.5
    scores = scores_for(config, blocks=blocks.masked_fill(torch.ones_like(blocks).tril(-1).bool(), torch.nan))
    assert plan_of(config, scores, num_hidden_layers=3, **free).layers_dropped == (3, 4, 5)


def test_fields_that_the_stock_class_divides_by_a_size_scale_with_it():
    """MiniCPM3's branches count scale_depth/√layers, and its logits dim_model_base/hidden_size."""
    teacher = pocket_config("minicpm3", scale_depth=2, dim_model_base=27)
    student = student_config(teacher, PrunerConfig(hidden_size=24, layers_to_drop=[0, 3, 4]))
    assert student.scale_depth / 2**0.5 == pytest.approx(2 / 5**0.5, rel=1e-15)
    assert student.logits_scaling == teacher.logits_scaling == 36 / 27
    assert type(student.dim_model_base) is int
    narrow = student_config(teacher, PrunerConfig(intermediate_size=24))
    assert (narrow.scale_depth, narrow.dim_model_base) == (2, 27)


@pytest.mark.parametrize(
    ("request_", "neurons"),
    [({"layers_to_drop": [1]}, 52), ({"intermediate_size": 31}, 31), ({"intermediate_size": 0.5}, 24)],
    ids=str,
)
def test_a_size_that_the_stock_class_rounds_is_written_out(request_: dict, neurons: int):
    """LFM2's class makes 52 neurons of 78; of 52 it would make 36 the next time."""
    teacher = pocket_config("lfm2")
    assert (teacher.intermediate_size, teacher.block_auto_adjust_ff_dim) == (78, True)
    student = student_config(teacher, PrunerConfig(**request_))
    assert (student.intermediate_size, student.block_auto_adjust_ff_dim) == (neurons, False)
    assert AutoModelForCausalLM.from_config(student).model.layers[0].feed_forward.w1.out_features == neurons


def kinds_kept(config: PretrainedConfig, blocks: list[float] | None = None, **request) -> str:
    """Initials of the layers that stay, where single layers (or blocks that start with them) have these scores."""
    scores = scores_for(config)
    if blocks is not None:
        scores.blocks[:] = torch.tensor(blocks)[:, None]
    return "".join(kind[0] for kind in plan_of(config, scores, **request).build_student_config().layer_types)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_choice_of_layers_leaves_one_of_every_kind_that_is_needed(contiguous: bool):
    """Full attention in layers 0 and 3 of five; the scores would drop both, and then all of linear attention."""
    request = {"contiguous": contiguous, "keep_first_layers": 0, "keep_last_layers": 0}
    assert kinds_kept(pocket_config("qwen3_5_text"), [0, 1, 2, 3, 4], num_hidden_layers=1, **request) == "f"
    assert kinds_kept(pocket_config("olmo_hybrid"), [4, 1, 0, 5, 2], num_hidden_layers=2, **request) in ("fl", "lf")
    assert student_config(
        pocket_config("qwen3_5_text"), PrunerConfig(num_hidden_layers=1, keep_first_layers=0)
    ).layer_types == ["full_attention"]
    with pytest.raises(PlanError, match=r"without a layer of layer_types full_attention\. Keep one of \[0, 3\]"):
        plan_of(pocket_config("qwen3_5_text"), num_hidden_layers=1, keep_first_layers=0, contiguous=contiguous)


@pytest.mark.parametrize(
    ("drop", "sparse"),
    [([0], [0, 1, 2]), ([1], [1, 2]), ([4], [1, 2, 3]), ([1, 2, 3], []), ([0, 4], [0, 1, 2]), ([2, 3, 4], [1])],
)
def test_a_range_of_sparse_layers_is_recounted(drop: list[int], sparse: list[int]):
    """Layers 1 to 3 of 5 have experts."""
    plan = make_plan(pocket_config("ernie4_5_moe"), PrunerConfig(layers_to_drop=drop))
    student = empty_model(plan.build_student_config())
    found = [n for n, layer in enumerate(student.model.layers) if hasattr(layer.mlp, "experts")]
    assert found == sparse


def test_sparse_layers_that_no_range_describes_are_refused():
    """Layers 1, 3 and 5 of 7: without the layer 2 between them, numbers 2, 3 and 5 are no multiples of anything."""
    config = pocket_config(
        "ernie4_5_moe", num_hidden_layers=7, moe_layer_start_index=0, moe_layer_end_index=6, moe_layer_interval=2
    )
    with pytest.raises(PlanError, match="moe_layer_start_index, moe_layer_end_index, moe_layer_interval describe"):
        make_plan(config, PrunerConfig(layers_to_drop=[2]))
    assert student_config(config, PrunerConfig(layers_to_drop=[0, 2, 4, 6])).moe_layer_interval == 1
    assert student_config(config, PrunerConfig(layers_to_drop=[5, 6])).moe_layer_interval == 2


def test_sizes_listed_by_layer_are_written_for_every_layer():
    config = pocket_config("laguna")
    student = student_config(config, PrunerConfig(num_attention_heads=6, layers_to_drop=[1]))
    assert student.num_attention_heads_per_layer == [6] * 4
    config.num_attention_heads_per_layer = [12, 12, 6, 12, 12]
    with pytest.raises(UnsupportedModelError, match=r"differ in num_attention_heads_per_layer=\[12, 12, 6, 12, 12\]"):
        student_config(config, PrunerConfig(hidden_size=24))


def test_routing_that_differs_by_layer_needs_as_many_experts_as_the_most():
    config = pocket_config("hunyuan_v1_moe")  # two or one of six
    with pytest.raises(PlanError, match=r"num_experts=1: this model needs at least 2 \(moe_topk\)"):
        student_config(config, PrunerConfig(num_experts=1))
    assert student_config(config, PrunerConfig(layers_to_drop=[1, 2])).moe_topk == [2, 2, 1]


def test_layers_that_predict_further_tokens_do_not_stay():
    config = pocket_config("glm4_moe", num_nextn_predict_layers=1)
    assert config.num_mtp_layers == 1
    assert student_config(config, PrunerConfig(hidden_size=24)).num_mtp_layers == 0


def test_a_teacher_without_head_dim_keeps_it():
    """head_dim follows from hidden_size / heads in this config, and must not move with them."""
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=4, intermediate_size=20, num_hidden_layers=1, vocab_size=9
    )
    student = student_config(config, PrunerConfig(hidden_size=24, num_attention_heads=2, num_key_value_heads=2))
    assert student.head_dim == 12


# Published shapes (Sreenivas et al. 2024, table 1)

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
NEMO_12B = MistralConfig(
    hidden_size=5120,
    intermediate_size=14336,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=131072,
)


@pytest.mark.parametrize(
    ("teacher", "request_", "total", "without_embeddings"),
    [
        (LLAMA_8B, {"hidden_size": 3072, "intermediate_size": 9216}, 4_512_746_496, 3_724_741_632),
        (LLAMA_8B, {"hidden_size": 0.75, "intermediate_size": 0.643}, 4_512_746_496, 3_724_741_632),
        (LLAMA_8B, {"num_hidden_layers": 16}, 4_540_469_248, 3_489_796_096),
        (LLAMA_8B, {"layers_to_drop": range(15, 31)}, 4_540_469_248, 3_489_796_096),
        (NEMO_12B, {"hidden_size": 4096, "intermediate_size": 11520}, 8_414_105_600, 7_340_363_776),
        (LLAMA_8B, {}, 8_030_261_248, 6_979_588_096),
        (NEMO_12B, {}, 12_247_782_400, 10_905_605_120),
    ],
    ids=["Llama 4B width", "Llama 4B width by fractions", "Llama 4B depth", "Llama 4B depth by index", "NeMo 8B",
         "Llama 8B", "NeMo 12B"],
)  # fmt: skip
def test_published_shapes(teacher: PretrainedConfig, request_: dict, total: int, without_embeddings: int):
    if request_.get("intermediate_size") == 0.643:
        request_ = {**request_, "multiple_of": 512}
    config = PrunerConfig(**request_)
    from_config = student_config(teacher, config)
    assert count_parameters(from_config) == total
    assert count_parameters(from_config, embeddings=False) == without_embeddings
    plan = make_plan(teacher, config, scores_for(teacher))
    assert plan.student["num_parameters"] == total
    assert plan.student["num_parameters_without_embeddings"] == without_embeddings
    assert plan.student["config"]["head_dim"] == 128
    assert plan.student["config"]["num_key_value_heads"] == 8
    if config == PrunerConfig(num_hidden_layers=16):
        assert len(plan.layers_dropped) == 16
        assert plan.layers_dropped == tuple(range(plan.layers_dropped[0], plan.layers_dropped[0] + 16))


def test_a_model_on_the_meta_device_is_as_good_as_its_config():
    config = pocket_config("qwen3")
    request = PrunerConfig(hidden_size=24, num_hidden_layers=3)
    from_config, from_model = (make_plan(one, request, scores_for(config)) for one in (config, empty_model(config)))
    assert from_model.to_dict() == from_config.to_dict()
    assert from_model.digest == from_config.digest


# Counting


def random_request(name: str, chance: random.Random) -> dict:
    """A request that can be met."""
    config = POCKETS[name].config
    spec = spec_for(config)
    sizes = spec.sizes(config)
    request: dict = {"multiple_of": chance.choice([1, 2, 8]), "contiguous": chance.random() < 0.5}
    request |= {"keep_first_layers": 0, "keep_last_layers": chance.choice([0, 1])}
    for field, axis, least in (
        ("intermediate_size", "ffn", 1),
        ("moe_intermediate_size", "moe_ffn", 1),
        ("shared_expert_intermediate_size", "shared_ffn", 1),
        ("num_experts", "experts", 4),
        ("mamba_head_dim", "ssm_dim", 1),
    ):
        if axis == "shared_ffn" and POCKETS[name].shared_coupled:
            continue  # follows
        if axis == "moe_ffn" and POCKETS[name].experts_coupled:
            continue  # likewise
        if field in cuttable(name) and chance.random() < 0.7:
            most = sizes[axis]
            step = sizes.get("router_groups", 1) if axis == "experts" else 1
            whole = step * chance.randint(least // step, most // step)
            rounded = step if axis in ("experts", "ssm_dim") else request["multiple_of"]
            request[field] = chance.choice([whole, chance.uniform(least / most, 1 - 0.51 * rounded / most)])
    if "mamba_num_heads" in cuttable(name) and not POCKETS[name].ssm_coupled:
        groups = sizes["ssm_groups"]
        request["mamba_num_heads"] = groups * chance.randint(1, sizes["ssm_heads"] // groups)
    depth, least = chance.random(), max(1, len(spec.needed_kinds), 2 * len(spec.layer_rules.fixed_ends))
    if "num_hidden_layers" not in cuttable(name):
        depth = 1.0
    if spec.needed_kinds:
        request["keep_last_layers"] = 0
    if POCKETS[name].depths:
        request |= {"contiguous": True, "keep_first_layers": 1, "keep_last_layers": 1}
        request |= chance.choice([{}, *POCKETS[name].depths.values()])
    elif depth < 0.4:
        fraction = chance.uniform((least - 0.5) / sizes["layers"], 1 - 0.51 / sizes["layers"])
        request["num_hidden_layers"] = chance.choice([chance.randint(least, sizes["layers"]), fraction])
    elif depth < 0.7:
        needed = {next(i for i, k in enumerate(getattr(config, f)) if k in kinds) for f, kinds in spec.needed_kinds}
        needed |= {
            i for f, kind in spec.layer_rules.reusing_layers for i, k in enumerate(getattr(config, f)) if k != kind
        }
        needed |= {fixed % sizes["layers"] for fixed in spec.layer_rules.fixed_ends}
        droppable = sorted(set(range(sizes["layers"])) - needed)
        request["layers_to_drop"] = chance.sample(
            droppable, chance.randint(0, min(len(droppable), sizes["layers"] - 1))
        )
    if not {"num_attention_heads", "hidden_size"} <= cuttable(name):
        if "hidden_size" in cuttable(name):
            step = POCKETS[name].hidden_step
            request["hidden_size"] = step * chance.randint(1, sizes["hidden"] // step)
    elif "kv" in sizes or not POCKETS[name].coupled:
        groups = sizes.get("kv", 1)
        kv = chance.randint(1, groups) if "num_key_value_heads" in cuttable(name) else groups
        counts = [kv * each for each in range(1, sizes["heads"] // groups + 1)]
        steps = {heads: math.lcm(heads, POCKETS[name].hidden_step) for heads in counts}
        heads = chance.choice([heads for heads, step in steps.items() if step <= sizes["hidden"]])
        request |= {"num_attention_heads": heads, **({"num_key_value_heads": kv} if "kv" in sizes else {})}
        legal = range(steps[heads], sizes["hidden"] + 1, steps[heads])
        request["hidden_size"] = chance.choice([chance.choice(legal), None])
        if POCKETS[name].coupled:
            request["hidden_size"] = None  # follows
        if request["hidden_size"] is None and spec.multiples and sizes["hidden"] % heads:
            request["hidden_size"] = legal[-1]
    else:
        whole = sizes[dict(spec.groups)["heads"]] if spec.groups else 1
        heads = whole * chance.randint(1, sizes["heads"] // whole)
        field, size = chance.choice([("hidden_size", 8 * heads), ("num_attention_heads", heads)])
        rounded = max(whole, 2)  # heads, or channels of as many heads and of multiples of 8
        request[field] = chance.choice([size, chance.uniform(0.05, 1 - 0.51 * rounded / sizes["heads"])])
    return request


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NAMES)
def test_any_possible_request(name: str):
    """Kept indices are ascending, in range and as many as promised; the count is that of the stock student."""
    chance = random.Random(name)
    config = pocket_config(name)
    for seed in range(5):
        request = random_request(name, chance)
        plan = plan_of(config, scores_for(config, seed), **request)
        before, after = ({axis: s[which] for axis, s in plan.sizes.items()} for which in ("teacher", "student"))
        layers = after["layers"]
        assert sorted((*plan.layers_kept, *plan.layers_dropped)) == list(range(before["layers"]))
        assert len(plan.layers_kept) == layers
        assert list(plan.layers_kept) == sorted(plan.layers_kept)
        assert plan.kept.keys() == {axis for axis in after if axis != "layers" and after[axis] < before[axis]}, request
        for axis, kept in plan.kept.items():
            assert kept.dtype == np.int64
            within = spec_for(config).axis[axis].within
            per_layer = (layers, after[axis]) if within is None else (layers, after[within], after[axis])
            assert kept.shape == ((after[axis],) if axis == "hidden" else per_layer)
            for row in kept.reshape(-1, after[axis]):
                assert list(row) == sorted(set(row.tolist()))
                assert 0 <= row.min() <= row.max() < before[axis]
        if "kv" in before and "heads" in plan.kept:
            each = before["heads"] // before["kv"]
            for position in range(layers):
                groups = plan.kept["kv"][position] if "kv" in plan.kept else range(before["kv"])
                belongs_to = (plan.kept["heads"][position] // each).tolist()
                assert belongs_to == [g for g in groups for _ in range(after["heads"] // after["kv"])]
        if "ssm_heads" in plan.kept and (groups := before.get("ssm_groups")):
            belongs_to = (plan.kept["ssm_heads"] // (before["ssm_heads"] // groups)).tolist()
            assert all(row == sorted([*range(groups)] * (after["ssm_heads"] // groups)) for row in belongs_to)
        for name_, axis in (("hidden_size", "hidden"), ("intermediate_size", "ffn"), ("num_hidden_layers", "layers")):
            if isinstance(request.get(name_), int):
                assert after[axis] == request[name_]
        student = AutoModelForCausalLM.from_config(plan.build_student_config())
        assert plan.student["num_parameters"] == sum(parameter.numel() for parameter in student.parameters())
        ends = {*student.get_input_embeddings().parameters(), *student.get_output_embeddings().parameters()}
        embeddings = sum(parameter.numel() for parameter in ends)
        assert plan.student["num_parameters"] - embeddings == plan.student["num_parameters_without_embeddings"]
        assert plan.teacher["num_parameters"] == count_parameters(config)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config(), GPT2Config(), GPTNeoXConfig(), Phi3Config()],
    ids=lambda config: config.model_type,
)
def test_plans_at_published_sizes_need_no_weights(config: PretrainedConfig):
    plan = plan_of(config, hidden_size=0.5, intermediate_size=0.5, num_hidden_layers=0.5)
    assert plan.student["num_parameters"] == count_parameters(plan.build_student_config())
    assert plan.student["num_parameters"] < 0.5 * plan.teacher["num_parameters"]


# Choices


def brute_force(scores: torch.Tensor, count: int, units: range) -> list[int]:
    """The subset with the largest sum; of equally good ones, the one that comes first."""
    best = max(itertools.combinations(units, count), key=lambda subset: sum(scores[unit].item() for unit in subset))
    return list(best)


@pytest.mark.parametrize("seed", range(4))
def test_highest_scores_stay(seed: int):
    config = pocket_config("mistral", intermediate_size=11, hidden_size=9)
    scores = scores_for(config, seed)
    plan = plan_of(config, scores, intermediate_size=4, hidden_size=5, layers_to_drop=[1, 2])
    assert plan.kept["hidden"].tolist() == brute_force(scores.axes["hidden"], 5, range(9))
    for position, layer in enumerate((0, 3, 4)):
        assert plan.kept["ffn"][position].tolist() == brute_force(scores.axes["ffn"][layer], 4, range(11))


@pytest.mark.parametrize("seed", range(4))
def test_heads_are_chosen_within_the_groups_that_stay(seed: int):
    config = pocket_config("mistral")  # 3 groups of 4 heads
    scores = scores_for(config, seed)
    plan = plan_of(config, scores, num_key_value_heads=2, num_attention_heads=4)
    for layer in range(5):
        groups = brute_force(scores.axes["kv"][layer], 2, range(3))
        assert plan.kept["kv"][layer].tolist() == groups
        heads = [
            head
            for group in groups
            for head in brute_force(scores.axes["heads"][layer], 2, range(4 * group, 4 * group + 4))
        ]
        assert plan.kept["heads"][layer].tolist() == heads
    all_groups = plan_of(config, scores, num_attention_heads=3)
    for layer in range(5):
        heads = [brute_force(scores.axes["heads"][layer], 1, range(4 * group, 4 * group + 4))[0] for group in range(3)]
        assert all_groups.kept["heads"][layer].tolist() == heads


def test_whole_groups_go_with_their_heads():
    """As many heads in every group as before: none is chosen, all of the kept groups stay."""
    config = pocket_config("mistral")
    scores = scores_for(config)
    plan = plan_of(config, scores, num_key_value_heads=2, num_attention_heads=8)
    for layer in range(5):
        expected = [4 * group + query for group in plan.kept["kv"][layer] for query in range(4)]
        assert plan.kept["heads"][layer].tolist() == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("keep", "first", "last"), [(1, 0, 0), (2, 1, 0), (2, 1, 1), (4, 1, 1), (4, 0, 2), (3, 2, 0)])
def test_least_important_block_between_the_protected_layers_goes(seed: int, keep: int, first: int, last: int):
    config = pocket_config("llama")
    scores = scores_for(config, seed)
    drop = 5 - keep
    importance = {start: scores.blocks[start, start + drop - 1].item() for start in range(keep + 1)}
    allowed = {s: value for s, value in importance.items() if s >= first and s + drop <= 5 - last}
    start = min(allowed, key=allowed.__getitem__)
    plan = plan_of(config, scores, num_hidden_layers=keep, keep_first_layers=first, keep_last_layers=last)
    assert plan.layers_dropped == tuple(range(start, start + drop))


def test_the_first_and_the_last_layer_are_protected_unless_named():
    config = pocket_config("llama")
    for seed in range(20):
        kept = plan_of(config, scores_for(config, seed), num_hidden_layers=2).layers_kept
        assert kept == (0, 4)
        kept = plan_of(config, scores_for(config, seed), num_hidden_layers=3, contiguous=False).layers_kept
        assert {0, 4} < set(kept)
    assert plan_of(config, layers_to_drop=[0, 4]).layers_kept == (1, 2, 3)


@pytest.mark.parametrize("seed", range(6))
def test_least_important_layers_go_one_by_one(seed: int):
    config = pocket_config("llama")
    scores = scores_for(config, seed)
    plan = plan_of(config, scores, num_hidden_layers=2, contiguous=False, keep_first_layers=0, keep_last_layers=0)
    assert list(plan.layers_kept) == brute_force(scores.blocks.diagonal(), 2, range(5))


def test_layers_named_are_the_layers_dropped():
    plan = plan_of(pocket_config("llama"), layers_to_drop=[3, 0])
    assert plan.layers_dropped == (0, 3)
    assert plan.layers_kept == (1, 2, 4)


def test_ties_go_to_the_lower_index():
    config = pocket_config("mistral")
    scores = scores_for(config)
    level = ImportanceScores(
        {axis: torch.ones_like(tensor) for axis, tensor in scores.axes.items()},
        scores.blocks * 0 + 1,
        scores.settings,
        scores.digests,
    )
    plan = plan_of(config, level, hidden_size=3, intermediate_size=2, num_attention_heads=4, num_key_value_heads=2)
    assert plan.kept["hidden"].tolist() == [0, 1, 2]
    assert plan.kept["ffn"].tolist() == [[0, 1]] * 5
    assert plan.kept["kv"].tolist() == [[0, 1]] * 5
    assert plan.kept["heads"].tolist() == [[0, 1, 4, 5]] * 5
    assert plan_of(config, level, num_hidden_layers=3).layers_dropped == (1, 2)
    assert plan_of(config, level, num_hidden_layers=3, contiguous=False).layers_dropped == (1, 2)


def test_plan_is_a_function_of_its_inputs():
    config = pocket_config("llama")
    request = {"hidden_size": 24, "intermediate_size": 9, "num_hidden_layers": 3}
    one, same, other = (plan_of(config, scores_for(config, seed), **request) for seed in (0, 0, 1))
    assert one.to_dict() == same.to_dict()
    assert one.digest == same.digest != other.digest


# Files


def test_plan_file_has_the_documented_form(tmp_path: Path):
    model = pocket_model("llama")
    model.config._name_or_path = "owner/teacher"
    scores = estimate_importance(model, metric="random", seed=4)
    plan = make_plan(model, PrunerConfig(hidden_size=24, num_hidden_layers=3), scores)
    assert plan.save_pretrained(tmp_path / "run") == tmp_path / "run" / "pruning_plan.json"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "pruning_plan.json",
        "pruning_plan.safetensors",
    ]
    written = json.loads((tmp_path / "run" / "pruning_plan.json").read_text())
    assert list(written) == [
        "format", "versions", "model_type", "teacher", "student", "sizes", "layers_kept", "layers_dropped",
        "pruner_config", "scales", "repair", "selection", "scores", "notes",
    ]  # fmt: skip
    assert written["format"] == 1
    assert written["versions"]["minitron_hf"]
    assert written["model_type"] == "llama"
    assert written["teacher"].keys() == {
        "name_or_path", "revision", "digest", "num_parameters", "num_active_parameters",
        "num_parameters_without_embeddings", "config",
    }  # fmt: skip
    assert written["teacher"]["name_or_path"] == "owner/teacher"
    assert written["teacher"]["digest"] == model_digest(model)
    assert written["teacher"]["config"]["hidden_size"] == 36
    assert written["student"].keys() == {
        "num_parameters",
        "num_active_parameters",
        "num_parameters_without_embeddings",
        "config",
    }
    assert written["student"]["config"]["hidden_size"] == 24
    assert written["sizes"]["hidden"] == {"teacher": 36, "student": 24}
    assert written["sizes"]["ffn"] == {"teacher": 52, "student": 52}
    assert {"layers", "hidden", "ffn", "heads", "kv"} <= written["sizes"].keys()
    assert written["layers_kept"] == list(plan.layers_kept)
    assert written["layers_dropped"] == list(plan.layers_dropped)
    assert written["pruner_config"] == PrunerConfig(hidden_size=24, num_hidden_layers=3).to_dict()
    assert written["selection"] == "random"
    assert written["scores"] == {
        "digest": scores.digest,
        "settings": {"model": "owner/teacher", "metric": "random", "seed": 4},
        "data_digest": None,
        "tokenizer_digest": None,
    }
    assert written["notes"] == []
    indices = load_file(tmp_path / "run" / "pruning_plan.safetensors")
    assert {name: (array.dtype, array.shape) for name, array in indices.items()} == {
        "hidden": (np.dtype("int64"), (24,))
    }

    reread = PruningPlan.from_pretrained(tmp_path / "run")
    assert reread.to_dict() == plan.to_dict()
    assert reread.digest == plan.digest
    np.testing.assert_array_equal(reread.kept["hidden"], plan.kept["hidden"])


def test_scores_that_decided_nothing_are_not_named():
    plan = plan_of(pocket_config("llama"), layers_to_drop=[2])
    assert plan.selection is None
    assert plan.scores is None


def test_empty_plan_survives_saving(tmp_path: Path):
    plan = make_plan(pocket_config("gpt2"), PrunerConfig())
    plan.save_pretrained(tmp_path)
    assert PruningPlan.from_pretrained(tmp_path).to_dict() == plan.to_dict()
    assert plan.kept == {}


def test_damaged_plans_are_refused(tmp_path: Path):
    with pytest.raises(OutputError, match=r"pruning_plan\.json does not exist"):
        PruningPlan.from_pretrained(tmp_path)
    config = pocket_config("llama")
    plan_of(config, hidden_size=24, intermediate_size=20).save_pretrained(tmp_path)
    file, indices = tmp_path / "pruning_plan.json", tmp_path / "pruning_plan.safetensors"
    written, whole = json.loads(file.read_text()), indices.read_bytes()
    for damaged in ("{", json.dumps({**written, "format": 3}), json.dumps({"format": 1}), "[]"):
        file.write_text(damaged)
        with pytest.raises(MismatchError):
            PruningPlan.from_pretrained(tmp_path)
    file.write_text(json.dumps(written))
    indices.write_bytes(whole[:50])
    with pytest.raises(MismatchError, match="damaged"):
        PruningPlan.from_pretrained(tmp_path)
    indices.unlink()
    with pytest.raises(MismatchError, match="damaged"):
        PruningPlan.from_pretrained(tmp_path)
    # The indices of another plan, left behind in the folder
    plan_of(config, hidden_size=12).save_pretrained(tmp_path)
    file.write_text(json.dumps(written))
    with pytest.raises(MismatchError, match="damaged"):
        PruningPlan.from_pretrained(tmp_path)


def test_pruner_config_survives_saving(tmp_path: Path):
    config = PrunerConfig(hidden_size=0.75, intermediate_size=40, layers_to_drop=(3, 1), multiple_of=32)
    path = config.save_pretrained(tmp_path)
    assert path == tmp_path / "pruner_config.json"
    for source in (tmp_path, path, str(tmp_path)):
        assert PrunerConfig.from_pretrained(source) == config
    assert json.loads(path.read_text()) == {"format": 1, **config.to_dict(), "layers_to_drop": [3, 1]}
    path.write_text(json.dumps({"hidden": 3}))
    with pytest.raises(PlanError, match="no field hidden"):
        PrunerConfig.from_pretrained(tmp_path)


def test_pruner_config_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (tmp_path, "owner/nothing-of-the-kind"):
        with pytest.raises(HubError, match=r"has no pruner_config\.json|No pruner_config\.json in"):
            PrunerConfig.from_pretrained(source)


def test_unknown_families_have_no_plan():
    from transformers import BertConfig

    for refused in (make_plan, student_config):
        with pytest.raises(UnsupportedModelError, match="No family table for model_type 'bert'"):
            refused(BertConfig(), PrunerConfig(hidden_size=0.5))


def test_norms_without_weights_cannot_compensate_and_the_plan_says_so():
    plans = {
        name: make_plan(pocket_model(name), PrunerConfig(hidden_size=24), random_scores(name))
        for name in ("olmo", "llama")
    }
    assert any("norm_compensation changes nothing" in note for note in plans["olmo"].notes)
    assert not plans["olmo"].scales
    assert not any("norm_compensation" in note for note in plans["llama"].notes)
    assert plans["llama"].scales


def random_scores(name: str):
    return estimate_importance(pocket_model(name), metric="random")


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"format": 1}'], ids=["no text", "of an earlier version"])
def test_other_plan_files_are_refused(tmp_path: Path, content: bytes):
    plan = make_plan(pocket_model("llama"), PrunerConfig(intermediate_size=20), random_scores("llama"))
    plan.save_pretrained(tmp_path)
    (tmp_path / "pruning_plan.json").write_bytes(content)
    with pytest.raises(MismatchError, match=r"is not valid JSON|was written by an earlier version"):
        PruningPlan.from_pretrained(tmp_path)


def test_uneven_takes_names_alone():
    with pytest.raises(PlanError, match="expected a list of sizes"):
        PrunerConfig(nonuniform_sizes=[[1]])
