"""Models whose layers differ: in head dimension, numbers of neurons or KV heads, and by whose keys they read."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_hf import models
from minitron_hf.errors import PlanError
from minitron_hf.families import spec_for
from minitron_hf.pruning.choice_of_units import count_nonuniform
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.saving import save_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import assert_same_function, pocket_model, pocket_tokens
from pockets.base import kinds
from test_surgery import plan_for, zero_input_except

TOKENS = pocket_tokens(2, 19)
#: Eight layers, the last three of which read keys and values of layers 3 (full attention) and 4 (sliding).
SHARING = {"num_hidden_layers": 8, "layer_types": kinds("sfsfssff"), "num_kv_shared_layers": 3}
UNEQUAL = {
    "gemma3n_text": {
        **SHARING,
        "intermediate_size": [40, 52, 20, 52, 44, 12, 52, 36],
        "activation_sparsity_pattern": [0.0] * 8,
    },
    "gemma4_text": {**SHARING, "use_double_wide_mlp": True, "per_layer_config": {
        layer: {"head_dim": 16} for layer in (1, 3, 6, 7)
    }},
    "gemma4_text-experts": {**SHARING, "num_kv_shared_layers": 0, "per_layer_config": {
        layer: {"head_dim": 16, "num_key_value_heads": 2} for layer in (1, 3, 6, 7)
    }},
}  # fmt: skip


def teacher(name: str) -> PreTrainedModel:
    model = pocket_model(name, **UNEQUAL[name])
    for buffer in model.state_dict(keep_vars=True).values():
        if buffer.shape == (1,):
            buffer.data.fill_(0.7)  # layer scalars
    return model


def own_head_dim(model: PreTrainedModel, layer: torch.nn.Module) -> int:
    return layer.self_attn.o_proj.weight.shape[1] // model.config.num_attention_heads


class Nothing(torch.nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden_states


def masked(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The teacher with dropped units and layers switched off, by what the plan says of each layer."""
    masked = copy.deepcopy(model)
    for layer, module in enumerate(masked.model.layers):
        if layer not in plan.layers_kept:
            masked.model.layers[layer] = Nothing()
            continue
        kept = plan.kept_in(layer)
        if "ffn" in kept:
            zero_input_except(module.mlp.down_proj, kept["ffn"])
        if "heads" in kept:
            width = own_head_dim(masked, module)
            dims = [int(head) * width + dim for head in kept["heads"] for dim in range(width)]
            zero_input_except(module.self_attn.o_proj, dims)
    return masked


@pytest.mark.parametrize("name", UNEQUAL)
def test_layers_see_their_own_sizes(name: str):
    model = teacher(name)
    spec = spec_for(model.config)
    spec.check(model)
    for layer, (module, sizes) in enumerate(zip(model.model.layers, spec.layer_sizes(model.config), strict=True)):
        assert sizes["ffn"] == module.mlp.down_proj.in_features
        assert sizes["head_dim"] == own_head_dim(model, module) == spec.sizes(model.config, layer)["head_dim"]
        if hasattr(module.self_attn, "k_proj"):
            assert sizes["kv"] == module.self_attn.k_proj.out_features // sizes["head_dim"]
    scores = estimate_importance(model, pocket_tokens(3, 16).tolist(), max_length=16)
    for axis in ("ffn", "heads", "kv"):
        for layer, sizes in enumerate(spec.layer_sizes(model.config)):
            seen = ~scores.axes[axis][layer].isnan()
            has_units = axis != "kv" or hasattr(model.model.layers[layer].self_attn, "k_proj")
            assert seen.tolist() == [has_units and unit < sizes[axis] for unit in range(len(seen))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize(
    "request_",
    [
        {"intermediate_size": 30},
        {"num_attention_heads": 6},
        {"layers_to_drop": [1, 5, 6]},
        {"num_hidden_layers": 5, "intermediate_size": 0.5, "num_attention_heads": 6, "contiguous": False},
    ],
    ids=str,
)
def test_student_equals_masked_teacher(name: str, request_: dict, tmp_path: Path):
    model = teacher(name)
    plan = plan_for(model, **request_)
    student = apply_plan(model, plan)
    assert_same_function(masked(model, plan), student, TOKENS)
    assert plan.student["num_parameters"] == models.count_parameters(student)
    plan.save_pretrained(tmp_path)
    assert PruningPlan.from_pretrained(tmp_path).digest == plan.digest

    student.float().save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in reloaded.state_dict().items())
    generated = [
        reloaded.generate(TOKENS[:, :5], do_sample=False, max_new_tokens=12, use_cache=cached, eos_token_id=None)
        for cached in (False, True)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_layers_that_others_read_stay(name: str):
    model = teacher(name)
    assert model.config.kv_sharing_modes[3:] == ["store", "store", "reuse", "reuse", "reuse"]
    for layer in (3, 4):
        with pytest.raises(PlanError, match=rf"layers_to_drop names layer {layer}\. Layers \[3, 4"):
            make_plan(model, PrunerConfig(layers_to_drop=[layer]))
    with pytest.raises(PlanError, match="Keep 4 layers or more"):
        make_plan(model, PrunerConfig(num_hidden_layers=3))
    with pytest.raises(PlanError, match="no 4 contiguous layers"):
        plan_for(model, num_hidden_layers=4)
    fewest = plan_for(model, num_hidden_layers=4, contiguous=False)
    assert fewest.layers_kept == (0, 3, 4, 7)
    student = apply_plan(model, fewest)
    assert student.config.num_kv_shared_layers == 1
    assert_same_function(masked(model, fewest), student, TOKENS)


def test_the_last_layer_stays_where_the_stock_config_insists_on_its_kind():
    with pytest.raises(PlanError, match=r"names layer 7\. Layers \[3, 4, 7\]"):
        make_plan(teacher("gemma4_text"), PrunerConfig(layers_to_drop=[7]))


def test_double_wide_layers_stay_double_wide():
    model = teacher("gemma4_text")
    student = apply_plan(model, plan_for(model, intermediate_size=30))
    assert [layer.mlp.down_proj.in_features for layer in student.model.layers] == [30] * 5 + [60] * 3


def test_narrow_layers_of_a_list_are_not_widened():
    model = teacher("gemma3n_text")
    student = apply_plan(model, plan_for(model, intermediate_size=30, layers_to_drop=[0]))
    assert student.config.intermediate_size == [30, 20, 30, 30, 12, 30, 30]


def test_sparse_layers_take_their_threshold_from_the_neurons_that_stay():
    """Gemma 3n keeps the neurons that stand out from the mean by so many deviations, of all neurons of a layer."""
    changes = {"activation_sparsity_pattern": [0.6, 0.0, 0.3, 0.0, 0.0]}
    model = pocket_model("gemma3n_text", **changes)
    plan = plan_for(model, intermediate_size=30, layers_to_drop=[1])
    student = apply_plan(model, plan)
    assert student.config.activation_sparsity_pattern == [0.6, 0.3, 0.0, 0.0]
    expected = masked(model, plan)
    for layer in (0, 2):
        mlp = expected.model.layers[layer].mlp
        kept = torch.from_numpy(plan.kept_in(layer)["ffn"])

        def sparse(gates: torch.Tensor, kept=kept, original=mlp._gaussian_topk) -> torch.Tensor:
            out = torch.zeros_like(gates)
            out[..., kept] = original(gates[..., kept])
            return out

        mlp._gaussian_topk = sparse
    assert_same_function(expected, student, TOKENS)


# Unequal widths on request


@pytest.mark.parametrize("widths", [[52] * 8, UNEQUAL["gemma3n_text"]["intermediate_size"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_uneven_widths_keep_the_most_under_the_same_total(widths: list[int], multiple_of: int, tmp_path: Path):
    """Against a search that knows no blocks: no exchange of units between two layers keeps larger shares."""
    model = pocket_model("gemma3n_text", **{**UNEQUAL["gemma3n_text"], "intermediate_size": widths})
    scores = estimate_importance(model, pocket_tokens(4, 16).tolist(), max_length=16)
    request = {"intermediate_size": 28, "layers_to_drop": [1], "multiple_of": multiple_of}
    even = make_plan(model, PrunerConfig(**request), scores)
    plan = make_plan(model, PrunerConfig(**request, nonuniform_sizes=["intermediate_size"]), scores)
    counts = [len(plan.kept_in(layer)["ffn"]) for layer in plan.layers_kept]
    assert sum(counts) == sum(len(even.kept_in(layer)["ffn"]) for layer in even.layers_kept)
    assert len(set(counts)) > 1
    assert min(counts) >= multiple_of
    assert all(count % multiple_of == 0 for count in counts)
    assert plan.student["num_parameters"] == even.student["num_parameters"]
    assert any(f"from {min(counts)} to {max(counts)}" in note for note in plan.notes)

    shares = []
    for layer, count in zip(plan.layers_kept, counts, strict=True):
        squares = scores.axes["ffn"][layer][: widths[layer]].double().square().sort(descending=True).values
        shares.append(squares / squares.sum())
        best = scores.axes["ffn"][layer][: widths[layer]].argsort(descending=True)[:count].sort().values
        assert plan.kept_in(layer)["ffn"].tolist() == best.tolist()
    for gives, loses in zip(shares, counts, strict=True):
        for takes, wins in zip(shares, counts, strict=True):
            if loses > multiple_of and wins < len(takes) and takes is not gives:
                lost, won = gives[loses - multiple_of : loses].sum(), takes[wins : wins + multiple_of].sum()
                assert won <= lost + 1e-12

    student = apply_plan(model, plan)
    assert student.config.intermediate_size == counts
    assert_same_function(masked(model, plan), student, TOKENS)
    plan.save_pretrained(tmp_path)
    assert PruningPlan.from_pretrained(tmp_path).digest == plan.digest
    student.float().save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in reloaded.state_dict().items())
    one, other = (
        reloaded.generate(TOKENS[:, :5], do_sample=False, max_new_tokens=12, use_cache=cached, eos_token_id=None)
        for cached in (False, True)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("block", [1, 2])
def testcount_nonuniform_are_the_best_of_all_and_no_layer_is_left_empty(size: int, block: int):
    """Against every way to share the blocks out; one layer's scores are all zero, and it keeps a block too."""
    chance = np.random.default_rng(0)
    rows = [chance.exponential(size=8), np.zeros(8), chance.exponential(size=6) ** 3]
    counts = count_nonuniform(rows, size, block)
    squares = [np.sort(row**2)[::-1] for row in rows]
    shares = [own / max(own.sum(), 1e-300) for own in squares]

    def worth(chosen):
        return sum(own[:count].sum() for own, count in zip(shares, chosen, strict=True))

    ways = itertools.product(*(range(block, len(row) + 1, block) for row in rows))
    best = max((way for way in ways if sum(way) == 3 * size), key=worth)
    assert min(counts) >= block
    assert sum(counts) == 3 * size
    assert worth(counts) == pytest.approx(worth(best))


def test_uneven_checkpoints_are_cut_on_disk_as_in_memory(tmp_path: Path):
    model = pocket_model("gemma3n_text", dtype=torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    scores = estimate_importance(model, metric="random")
    plan = make_plan(model, PrunerConfig(intermediate_size=28, nonuniform_sizes=["intermediate_size"]), scores)
    save_model(apply_plan(model, plan), tmp_path / "memory")
    prune_checkpoint(tmp_path / "teacher", tmp_path / "disk", plan, show_progress=False)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "request_", "why"),
    [
        (
            "llama",
            {"intermediate_size": 28, "nonuniform_sizes": ["intermediate_size"]},
            "'llama' config holds one for all",
        ),
        (
            "gemma4_text",
            {"intermediate_size": 28, "nonuniform_sizes": ["intermediate_size"]},
            "config holds one for all layers",
        ),
        (
            "gemma3n_text",
            {"num_attention_heads": 6, "nonuniform_sizes": ["num_attention_heads"]},
            "holds one for all layers",
        ),
        ("gemma3n_text", {"nonuniform_sizes": ["intermediate_size"]}, "which is not cut"),
        ("gemma3n_text", {"nonuniform_sizes": ["width"]}, "expected a list of sizes"),
    ],
)
def test_uneven_widths_are_refused_by_name(name: str, request_: dict, why: str):
    model = pocket_model(name)
    with pytest.raises(PlanError, match=why):
        plan_for(model, **request_)
