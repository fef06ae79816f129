"""Surgery: the student computes what the teacher computes with the dropped units switched off."""

from __future__ import annotations

import copy
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from minitron_hf import models, weights
from minitron_hf.errors import DataError, MismatchError, PlanError, UnsupportedModelError
from minitron_hf.families import PRUNER_FIELDS, spec_for
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.resolve import resolve_sizes
from pocket import (
    POCKETS,
    Pocket,
    assert_same_function,
    cuttable,
    logits,
    pocket_config,
    pocket_model,
    pocket_tokenizer,
    pocket_tokens,
    residual_norms,
)

NAMES = list(POCKETS)
#: Longer than the sliding windows of six tokens, so that they matter.
TOKENS = pocket_tokens(2, 19)


def plan_for(model, **request) -> PruningPlan:
    """A plan from random scores: what is kept differs from layer to layer and is no prefix.

    Norms are left alone unless asked for: the oracles compute them on the kept channels.
    """
    request = PrunerConfig(**{"norm_compensation": False, **request}, multiple_of=1)
    return make_plan(model, request, estimate_importance(model, metric="random", seed=3))


# Oracles. They know the stock models' modules from `Pocket`, and the plan's indices; nothing of the tables.


def masked_teacher(name: str, teacher, plan: PruningPlan):
    """The teacher with the inputs of its output projections zeroed at dropped units, and dropped layers removed."""
    pocket = POCKETS[name]
    masked = copy.deepcopy(teacher)
    layers = masked.get_submodule(pocket.layers)
    hidden, num_heads = plan.sizes["hidden"]["teacher"], plan.sizes["heads"]["teacher"] if pocket.attention_out else 0
    each = num_heads // plan.sizes["kv"]["teacher"] if pocket.kv else 1

    for layer, module in enumerate(layers):
        if layer not in plan.layers_kept:
            layers[layer] = Passthrough(module, pocket.tuple_layers)
            continue
        position = plan.layers_kept.index(layer)
        paths = {path for path, _ in module.named_modules()}
        for axis, writer in pocket.writers.items():
            if axis in plan.kept and writer in paths:
                zero_input_except(module.get_submodule(writer), plan.kept[axis][position])
        if "ffn" in plan.kept and pocket.mlp_reader in paths:
            zero_input_except(module.get_submodule(pocket.mlp_reader), plan.kept["ffn"][position])
        if pocket.experts in paths:
            mask_experts(pocket, module, plan, position)
        if pocket.ssm_out in paths and plan.kept.keys() & {"ssm_heads", "ssm_dim"}:
            mask_state_space(pocket, module, plan, position)
        if pocket.attention_out not in paths:
            continue
        attention_out = module.get_submodule(pocket.attention_out)
        head_dim = attention_out.weight.numel() // hidden // num_heads  # not the same in all layers of some
        dimensions = [range(head * head_dim, (head + 1) * head_dim) for head in range(num_heads)]
        heads = plan.kept["heads"][position] if "heads" in plan.kept else None
        groups = plan.kept["kv"][position] if "kv" in plan.kept else None
        if groups is not None:
            members = [group * each + query for group in groups for query in range(each)]
            heads = members if heads is None else heads
            assert set(heads) <= set(members)
        if heads is not None:
            zero_input_except(attention_out, [dim for head in heads for dim in dimensions[head]])
        units = [
            None if kept is None else [dim for unit in kept for dim in dimensions[unit]] for kept in (heads, groups)
        ]
        neurons = plan.kept["ffn"][position] if "ffn" in plan.kept else None
        for path, kept in (*zip(pocket.head_norms, units), (pocket.mlp_norm, neurons)):
            if path is not None and kept is not None:
                norm = module.get_submodule(path)
                module.set_submodule(path, NormOnKept(norm, torch.as_tensor(kept), pocket.norm, epsilon(norm)))
    return masked


def mask_state_space(pocket: Pocket, layer: nn.Module, plan: PruningPlan, position: int) -> None:
    """Dropped channels and heads do not reach the output, nor the statistics of the norm before it."""
    heads = plan.sizes["ssm_heads"]["teacher"]
    dims = plan.sizes["ssm_dim"]["teacher"] if pocket.ssm_heads else 1
    kept = plan.kept["ssm_heads"][position] if "ssm_heads" in plan.kept else range(heads)
    inside = plan.kept["ssm_dim"][position] if "ssm_dim" in plan.kept else [range(dims)] * len(kept)
    channels = torch.tensor([head * dims + dim for head, own in zip(kept, inside, strict=True) for dim in own])
    for path in filter(None, (pocket.ssm_out, pocket.ssm_reader)):
        zero_input_except(layer.get_submodule(path), channels)
    if pocket.ssm_norm is not None:
        norm = GatedOnKept(layer.get_submodule(pocket.ssm_norm), channels, pocket)
        layer.set_submodule(pocket.ssm_norm, norm)


def mask_experts(pocket: Pocket, layer: nn.Module, plan: PruningPlan, position: int) -> None:
    """Dropped experts are never chosen; dropped neurons of an expert do not reach its output."""
    experts = layer.get_submodule(pocket.experts)
    count = plan.sizes["experts"]["teacher"]
    kept = plan.kept["experts"][position] if "experts" in plan.kept else range(count)
    if "moe_ffn" in plan.kept:
        down = experts.down_proj.data
        for row, expert in enumerate(kept):
            mask = torch.zeros(plan.sizes["moe_ffn"]["teacher"], dtype=down.dtype)
            mask[torch.from_numpy(plan.kept["moe_ffn"][position][row])] = 1
            down[expert] *= mask if pocket.expert_inputs == 1 else mask[:, None]
    dropped = sorted(set(range(count)) - set(kept))
    router = layer.get_submodule(pocket.router)
    if not dropped:
        return
    forward = router.forward

    def never_chosen(*args, **kwargs):
        with ScoresOf(router.weight, dropped):
            return forward(*args, **kwargs)

    router.forward = never_chosen
    if pocket.router_bias is not None:
        layer.state_dict(keep_vars=True)[pocket.router_bias].data[..., dropped] = -torch.inf


class ScoresOf(TorchFunctionMode):
    """Let a linear layer of these weights give some outputs the score −∞."""

    def __init__(self, weight: torch.Tensor, dropped: list[int]) -> None:
        super().__init__()
        self.weight, self.dropped = weight, dropped

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and any(argument is self.weight for argument in args):
            output[..., self.dropped] = -torch.inf
        return output


class Passthrough(nn.Module):
    """A decoder layer that does nothing."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.block_type = getattr(layer, "block_type", None)  # which some models ask for

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor | tuple[torch.Tensor, None]:
        return (hidden_states, None) if self.returns_tuple else hidden_states


def zero_input_except(module: nn.Module, kept) -> None:
    def hook(_, args):
        [x] = args
        mask = torch.zeros(x.shape[-1], dtype=x.dtype)
        mask[torch.as_tensor(kept)] = 1
        return (x * mask,)

    module.register_forward_pre_hook(hook)


class NormOnKept(nn.Module):
    """A norm of the kept channels alone; what the others hold is ignored, and they come out as zero."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor, kind: str, eps: float) -> None:
        super().__init__()
        self.norm, self.kept, self.kind, self.eps = norm, kept, kind, eps
        self.weight = getattr(norm, "weight", None)  # some models ask for its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x[..., self.kept]
        if self.kind.startswith("layer"):
            z = z - z.mean(-1, keepdim=True)
        z = z / (z.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        if self.weight is not None:
            z = z * (self.weight[self.kept] + (1 if self.kind.endswith("1p") else 0))
        if (bias := getattr(self.norm, "bias", None)) is not None:
            z = z + bias[self.kept]
        out = torch.zeros_like(x)
        out[..., self.kept] = z
        return out


class GatedOnKept(nn.Module):
    """The gated norm of a state space, taken group by group over the kept channels alone."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor, pocket: Pocket) -> None:
        super().__init__()
        self.norm, self.kept, self.pocket = norm, set(kept.tolist()), pocket

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        gate = gate * gate.sigmoid()
        x = x * gate if self.pocket.ssm_gate_first else x
        out = torch.zeros_like(x)
        for group in torch.arange(x.shape[-1]).chunk(self.pocket.ssm_groups):
            mine = [channel for channel in group.tolist() if channel in self.kept]
            z = x[..., mine]
            z = z / (z.pow(2).mean(-1, keepdim=True) + epsilon(self.norm)).sqrt()
            out[..., mine] = z * self.norm.weight[mine]
        return out if self.pocket.ssm_gate_first else out * gate


def epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean square; OLMo's has no field for it."""
    return getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 1e-5


def narrow_stream(name: str, teacher, kept: torch.Tensor) -> None:
    """Dead channels from the embeddings on: not every layer has a norm before whatever reads the stream."""

    def hook(_, args, output):
        if isinstance(output, tuple):
            return (hook(_, args, output[0]), *output[1:])
        out = torch.zeros_like(output)
        out[..., kept] = output[..., kept]
        return out

    for module in (teacher.get_input_embeddings(), *teacher.get_submodule(POCKETS[name].layers)):
        module.register_forward_hook(hook)


def narrow_teacher(name: str, teacher, plan: PruningPlan):
    """The teacher whose embeddings and norms know only the kept channels."""
    narrowed = copy.deepcopy(teacher)
    if "hidden" in plan.kept:
        pocket = POCKETS[name]
        kept = torch.from_numpy(plan.kept["hidden"])
        narrow_stream(name, narrowed, kept)
        paths = residual_norms(name, narrowed)
        assert len(paths) == pocket.num_norms * plan.sizes["layers"]["teacher"] + pocket.extra_norms + 1
        for path in paths:
            norm = narrowed.get_submodule(path)
            eps = epsilon(norm) / residual_scale(name, path, plan) ** 2
            narrowed.set_submodule(path, NormOnKept(norm, kept, pocket.norm, eps))
    return narrowed


def residual_scale(name: str, path: str, plan: PruningPlan) -> float:
    """How much smaller the student's residual stream is than the teacher's, as seen by a norm (its eps is not)."""
    if not POCKETS[name].scaled_embeddings or path.endswith(POCKETS[name].output_norms):
        return 1.0
    return (plan.sizes["hidden"]["student"] / plan.sizes["hidden"]["teacher"]) ** 0.5


def oracle(name: str, teacher, plan: PruningPlan):
    return masked_teacher(name, narrow_teacher(name, teacher, plan), plan)


# Student = masked teacher


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NAMES)
def test_the_empty_plan_is_the_identity(name: str):
    teacher = pocket_model(name)
    student = apply_plan(teacher, make_plan(teacher, PrunerConfig()))
    assert student is not teacher
    assert torch.equal(logits(student, TOKENS), logits(teacher, TOKENS))
    assert weights.model_digest(student) == weights.model_digest(teacher)


DEPTHS = {
    "layer block": {"num_hidden_layers": 2},
    "single layers": {"layers_to_drop": [0, 2]},
}
NEURONS = {
    "ffn": {"intermediate_size": 31},
}
EXPERTS = {
    "experts": {"num_experts": 4},
    "expert neurons": {"moe_intermediate_size": 9},
    "experts and their neurons": {"num_experts": 4, "moe_intermediate_size": 5},
}
SHARED = {"shared neurons": {"shared_expert_intermediate_size": 13}}
SSM = {
    "ssm heads": {"mamba_num_heads": 6},
    "ssm channels": {"mamba_head_dim": 5},
    "ssm heads and channels": {"mamba_num_heads": 4, "mamba_head_dim": 5},
}
GROUPED_WIDTHS = {
    "heads": {"num_attention_heads": 6},
    "kv": {"num_key_value_heads": 2, "num_attention_heads": 8},
    "kv and heads": {"num_key_value_heads": 2, "num_attention_heads": 2},
    "hidden": {"hidden_size": 24},
    "everything": {
        "hidden_size": 24,
        "intermediate_size": 17,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    },
    "everything but the heads": {"hidden_size": 24, "intermediate_size": 0.5, "layers_to_drop": [4, 1]},
}
GROUPED_COUPLED_WIDTHS = {
    "heads": {"num_attention_heads": 3},
    "kv": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "hidden": {"hidden_size": 24},
    "everything": {
        "num_key_value_heads": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 17,
        "num_hidden_layers": 3,
    },
}
COUPLED_WIDTHS = {
    "hidden": {"hidden_size": 24},
    "heads": {"num_attention_heads": 2},
    "everything": {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 17, "num_hidden_layers": 3},
}


def requests(name: str) -> dict[str, dict]:
    """The cuts that this pocket's family can be asked for."""
    pocket = POCKETS[name]
    own = (GROUPED_COUPLED_WIDTHS if pocket.coupled else GROUPED_WIDTHS) if pocket.kv else COUPLED_WIDTHS
    own = own if pocket.widths is None else pocket.widths
    neurons = [
        *([NEURONS] if pocket.mlp_out else []),
        *([EXPERTS] if pocket.experts else []),
        *([SHARED] if pocket.shared_out and not pocket.shared_coupled else []),
    ]
    if pocket.ssm_out and not pocket.ssm_coupled:
        neurons.append(SSM)
    elif pocket.ssm_out:
        own = {**own, "ssm heads": SSM["ssm heads"]}  # the width follows
    allowed = {*cuttable(name), *(["layers_to_drop"] if "num_hidden_layers" in cuttable(name) else [])}
    cuts = {cut: dict(request) for part in (pocket.depths or DEPTHS, *neurons, own) for cut, request in part.items()}
    if -1 in spec_for(pocket.config).layer_rules.fixed_ends and pocket.kv:
        cuts["everything but the heads"]["layers_to_drop"] = [3, 1]
    for cut in [cut for cut in cuts if cut.startswith("everything")]:
        for part in neurons:
            cuts[cut] = {**list(part.values())[-1], **cuts[cut]}
        if pocket.kv and "num_key_value_heads" not in allowed and "num_attention_heads" in cuts[cut]:
            cuts[cut]["num_attention_heads"] = 6  # of three groups
        if pocket.experts_coupled:
            cuts[cut].pop("moe_intermediate_size", None)  # follows
        cuts[cut] = {size: to for size, to in cuts[cut].items() if size in allowed}
    if pocket.depths:
        cuts["everything but the heads"] |= pocket.depths["single layers"]
    return {cut: request for cut, request in cuts.items() if request.keys() <= allowed}


def is_slow(place: int, cut: str) -> bool:
    """Whether a case waits for the slow tests.

    All pockets are cut everywhere at once. Of the other cuts, every pocket has an eighth here, each another one.
    """
    return cut != "everything" and (place + zlib.crc32(cut.encode())) % 8 != 0


CASES = [
    pytest.param(name, cut, id=f"{name}-{cut}", marks=[pytest.mark.slow] if is_slow(place, cut) else [])
    for place, name in enumerate(NAMES)
    for cut in requests(name)
]


@pytest.mark.parametrize(("name", "cut"), CASES)
def test_student_equals_masked_teacher(name: str, cut: str):
    request = requests(name)[cut]
    if cut == "kv" and spec_for(POCKETS[name].config).multiples:
        request["hidden_size"] = 32  # the config insists on a multiple of the 8 heads
    if cut == "layer block" and spec_for(POCKETS[name].config).layer_rules.reusing_layers:
        request["keep_last_layers"] = 0  # the last layer uses the one before it
    teacher = pocket_model(name)
    plan = plan_for(teacher, **request)
    student = apply_plan(teacher, plan)
    assert models.count_parameters(student) < models.count_parameters(teacher)
    assert_same_function(oracle(name, teacher, plan), student, TOKENS)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [name for name in NAMES if POCKETS[name].rms and "hidden_size" in cuttable(name)])
def test_hidden_has_a_closed_form_for_rms_norms(name: str):
    """The teacher with dead channels is the student if weight · √(H'/H) and eps · H'/H make up for the divisor."""
    teacher = pocket_model(name)
    plan = plan_for(teacher, hidden_size=24)
    ratio = plan.sizes["hidden"]["student"] / plan.sizes["hidden"]["teacher"]
    closed = masked_teacher(name, teacher, plan)  # where heads follow the width
    narrow_stream(name, closed, torch.from_numpy(plan.kept["hidden"]))
    one = 1 if POCKETS[name].norm == "rms1p" else 0
    for path in residual_norms(name, closed):
        norm = closed.get_submodule(path)
        if getattr(norm, "weight", None) is None:
            norm.register_forward_hook(lambda _, __, output: output * ratio**0.5)
        else:
            norm.weight.data = (norm.weight.data + one) * ratio**0.5 - one
        field = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
        setattr(norm, field, getattr(norm, field) * ratio / residual_scale(name, path, plan) ** 2)
        zero_input_except(norm, plan.kept["hidden"])
    assert_same_function(closed, apply_plan(teacher, plan), TOKENS)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [name for name in NAMES if POCKETS[name].rms and "hidden_size" in cuttable(name)])
def test_norm_compensation_leaves_the_teacher_with_dead_channels(name: str):
    """Their weights scaled by √(H/H'), the student's norms divide by what the teacher's do; only eps may differ."""
    teacher = pocket_model(name)
    plan = plan_for(teacher, hidden_size=24, norm_compensation=True)
    student = apply_plan(teacher, plan)
    ratio = plan.sizes["hidden"]["student"] / plan.sizes["hidden"]["teacher"]
    dead = masked_teacher(name, teacher, plan)  # where heads follow the width
    narrow_stream(name, dead, torch.from_numpy(plan.kept["hidden"]))
    for path in residual_norms(name, dead):
        norm = dead.get_submodule(path)
        seen = epsilon(student.get_submodule(path)) * ratio / residual_scale(name, path, plan) ** 2
        if not POCKETS[name].scaled_embeddings and set(residual_norms(name, dead)) == set(all_norms(dead)):
            assert seen == pytest.approx(epsilon(norm), rel=1e-12)  # nothing differs
        setattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps", seen)
        zero_input_except(norm, plan.kept["hidden"])
    assert_same_function(dead, student, TOKENS)


def all_norms(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()]


@pytest.mark.parametrize("name", ["llama-biases-tied", "gpt2", "phi3"])
def test_one_cut_equals_two(name: str):
    """Cutting twice, with the indices of the second cut mapped through the first, is cutting once."""
    teacher = pocket_model(name)
    first = plan_for(teacher, intermediate_size=40, num_hidden_layers=3)
    middle = apply_plan(teacher, first)
    second = plan_for(middle, intermediate_size=11, num_hidden_layers=2)
    twice = apply_plan(middle, second)

    at_once = plan_for(teacher, intermediate_size=11, num_hidden_layers=2)
    layers = [first.layers_kept[layer] for layer in second.layers_kept]
    units = [
        first.kept["ffn"][layer][chosen] for layer, chosen in zip(second.layers_kept, second.kept["ffn"], strict=True)
    ]
    composed = PruningPlan(
        **{
            **vars(at_once),
            "layers_kept": tuple(layers),
            "kept": {"ffn": torch.tensor([unit.tolist() for unit in units]).numpy()},
        }
    )
    assert_same_function(apply_plan(teacher, composed), twice, TOKENS, 1e-15)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sliding_layers_stay_sliding(name: str):
    """Layers 0 and 1 see everything, 2 to 4 six tokens; the students keep each layer's own window."""
    teacher = pocket_model(name)
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    wide_open = pocket_model(name, use_sliding_window=False, layer_types=None)
    wide_open.load_state_dict(teacher.state_dict())
    assert not torch.allclose(logits(wide_open, TOKENS), logits(teacher, TOKENS))  # the windows matter here

    for drop, types, leading in (
        ([0], "full sliding sliding sliding", 1),
        ([1, 3], "full sliding sliding", 1),
        ([2, 3, 4], "full full", 2),
        ([0, 1], "sliding sliding sliding", 0),
    ):
        plan = plan_for(teacher, layers_to_drop=drop)
        student = apply_plan(teacher, plan)
        assert student.config.layer_types == [f"{kind}_attention" for kind in types.split()]
        assert student.config.max_window_layers == leading
        assert_same_function(masked_teacher(name, teacher, plan), student, TOKENS)


# Reload


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NAMES), *((name, torch.bfloat16) for name in ("llama", "gpt2", "phi3"))],
    ids=str,
)
def test_student_reloads_as_a_stock_model(name: str, dtype: torch.dtype, tmp_path: Path):
    teacher = pocket_model(name, dtype=dtype)
    student = apply_plan(teacher, plan_for(teacher, **requests(name)["everything"]))
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    assert type(reloaded) is type(teacher)
    assert reloaded.dtype == dtype
    assert reloaded.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in reloaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(reloaded(TOKENS).logits, student(TOKENS).logits)

    saved = json.loads((tmp_path / "config.json").read_text())
    spec = spec_for(teacher.config)
    if POCKETS[name].attention_out:
        for field in spec.axis["head_dim"].fields:  # empty where the class always derives it
            assert saved[field] == teacher.config.to_dict().get(field, spec.sizes(teacher.config)["head_dim"])
        assert spec.sizes(reloaded.config)["head_dim"] == (8 if POCKETS[name].coupled else 10)
    layers = reloaded.get_submodule(POCKETS[name].layers)
    indices = {getattr(module, "layer_idx", getattr(module, "layer_id", None)) for module in layers.modules()} - {None}
    assert indices == set(range(reloaded.config.num_hidden_layers))
    tied = reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight
    assert tied == teacher.config.tie_word_embeddings
    if dtype is torch.float32:
        generated = [
            model.generate(TOKENS[:, :5], do_sample=False, max_new_tokens=12, use_cache=cached, eos_token_id=None)
            for model in (student, reloaded)
            for cached in (False, True)
        ]
        assert generated[0].shape == (2, 17)
        assert all(torch.equal(generated[0], other) for other in generated[1:])


@pytest.mark.parametrize("name", ["llama-biases-tied", "gpt2"])
def test_tied_heads_stay_one_tensor(name: str, tmp_path: Path):
    teacher = pocket_model(name)
    student = apply_plan(teacher, plan_for(teacher, hidden_size=24))
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        reloaded.get_input_embeddings().weight.zero_()
    assert reloaded.get_output_embeddings().weight.abs().max() == 0


def test_generation_config_is_kept():
    teacher = pocket_model("llama")
    teacher.generation_config.temperature = 0.3
    teacher.generation_config.do_sample = True
    student = apply_plan(teacher, plan_for(teacher, intermediate_size=20))
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert student.generation_config is not teacher.generation_config


# dtype and device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_follows_the_teacher(dtype: torch.dtype):
    teacher = pocket_model("qwen2", dtype=dtype)
    student = apply_plan(teacher, plan_for(teacher, hidden_size=24))
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    assert student.config.dtype == dtype


def test_mixed_dtypes_follow_the_teacher():
    teacher = pocket_model("llama", dtype=torch.bfloat16)
    teacher.model.norm.float()
    student = apply_plan(teacher, plan_for(teacher, hidden_size=24))
    assert student.model.norm.weight.dtype == torch.float32
    assert student.model.embed_tokens.weight.dtype == torch.bfloat16


def test_buffers_are_those_of_a_fresh_model():
    """Rotary frequencies are no parameters; a student built without initialisation must still have them."""
    teacher = pocket_model("llama", dtype=torch.float32)
    student = apply_plan(teacher, plan_for(teacher, num_attention_heads=6))
    ours, stock = dict(student.named_buffers()), dict(AutoModelForCausalLM.from_config(student.config).named_buffers())
    assert ours.keys() == stock.keys()
    assert ours
    assert all(torch.equal(value, stock[name]) for name, value in ours.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_follows_the_teacher():
    teacher = pocket_model("qwen3").to("cuda")
    student = apply_plan(teacher, plan_for(teacher, hidden_size=24, num_hidden_layers=2))
    assert {tensor.device.type for tensor in (*student.parameters(), *student.buffers())} == {"cuda"}


# Inputs are read-only, and belong together


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
def test_teacher_is_untouched(name: str):
    teacher = pocket_model(name)
    tensors = {key: value.clone() for key, value in teacher.state_dict().items()}
    config, generation = teacher.config.to_dict(), teacher.generation_config.to_dict()
    version = {key: parameter._version for key, parameter in teacher.named_parameters()}
    student = apply_plan(teacher, plan_for(teacher, **requests(name)["everything"]))
    identity = apply_plan(teacher, make_plan(teacher, PrunerConfig()))
    with torch.no_grad():
        for parameter in [*student.parameters(), *identity.parameters()]:
            parameter.zero_()  # nothing may be shared
    assert teacher.config.to_dict() == config
    assert teacher.generation_config.to_dict() == generation
    assert {key: parameter._version for key, parameter in teacher.named_parameters()} == version
    assert all(torch.equal(value, tensors[key]) for key, value in teacher.state_dict().items())
    assert not hasattr(teacher, "pruning_plan")


def test_student_can_be_trained():
    teacher = pocket_model("llama", dtype=torch.float32).requires_grad_(False)
    student = apply_plan(teacher, plan_for(teacher, hidden_size=24))
    student(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_plan_from_disk_makes_the_same_student(name: str, tmp_path: Path):
    teacher = pocket_model(name)
    plan = plan_for(teacher, **requests(name)["everything"])
    plan.save_pretrained(tmp_path)
    reread = PruningPlan.from_pretrained(tmp_path)
    assert reread.to_dict() == plan.to_dict()
    assert reread.digest == plan.digest
    apply_plan(teacher, plan).save_pretrained(tmp_path / "one")
    apply_plan(teacher, reread).save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_plan_is_attached_to_the_student():
    teacher = pocket_model("llama")
    plan = plan_for(teacher, intermediate_size=20)
    assert apply_plan(teacher, plan).pruning_plan is plan


@pytest.mark.parametrize("request_", [{"intermediate_size": 20}, {"layers_to_drop": [1]}, {}], ids=str)
def test_plan_for_other_weights_is_refused(request_: dict):
    teacher = pocket_model("llama")
    plan = (
        plan_for(teacher, **request_)
        if "intermediate_size" in request_
        else make_plan(teacher, PrunerConfig(**request_))
    )
    with pytest.raises(MismatchError, match="other weights"):
        apply_plan(pocket_model("llama", seed=1), plan)


@pytest.mark.parametrize(
    ("name", "other"),
    [("llama", "mistral"), ("llama", "gpt2"), ("gpt2", "qwen3"), ("gpt2", "gpt_neox"), ("mistral", "phi3")],
)
def test_plan_for_another_family_is_refused(name: str, other: str):
    plan = plan_for(pocket_model(name), intermediate_size=20)
    with pytest.raises(MismatchError, match=f"plan was made for a {POCKETS[name].config.model_type} model"):
        apply_plan(pocket_model(other), plan)


def test_plan_of_sizes_that_the_other_family_cannot_hold_is_refused():
    """40 channels are no multiple of 12 heads, so there is no such LlamaConfig to compare with."""
    plan = make_plan(pocket_config("mistral", hidden_size=40), PrunerConfig(layers_to_drop=[0]))
    with pytest.raises(MismatchError, match="plan was made for a mistral model"):
        apply_plan(pocket_model("llama"), plan)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 6}, {"intermediate_size": 53}, {"rms_norm_eps": 1e-3}], ids=str
)
def test_plan_for_another_architecture_is_refused(change: dict):
    plan = plan_for(pocket_model("llama"), intermediate_size=20)
    with pytest.raises(MismatchError, match="other sizes"):
        apply_plan(pocket_model("llama", **change), plan)


def test_plan_from_a_config_fits_every_model_of_that_architecture():
    teacher = pocket_model("llama")
    plan = make_plan(teacher.config, PrunerConfig(layers_to_drop=[1]))
    assert plan.teacher["digest"] is None
    assert apply_plan(teacher, plan).config.num_hidden_layers == 4


def test_model_on_the_meta_device_is_refused():
    plan = make_plan(pocket_config("llama"), PrunerConfig(layers_to_drop=[1]))
    with pytest.raises(UnsupportedModelError, match="meta"):
        apply_plan(models.empty_model(pocket_config("llama")), plan)


def test_model_that_is_not_plain_is_refused():
    teacher = pocket_model("llama")
    plan = plan_for(teacher, intermediate_size=20)
    teacher.model.layers[1].mlp.adapter = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.adapter\.weight"):
        apply_plan(teacher, plan)


# All in one call


def test_prune_model_scores_plans_and_cuts():
    teacher = pocket_model("qwen2", dtype=torch.float32)
    config = PrunerConfig(hidden_size=24, intermediate_size=0.5, num_hidden_layers=3)
    rows = pocket_tokens(8, 16).tolist()
    scores = estimate_importance(teacher, rows, max_length=16)
    expected = apply_plan(teacher, make_plan(teacher, config, scores))
    for student in (
        prune_model(teacher, config, scores=scores),
        prune_model(teacher, config, calibration_data=rows, max_length=16),
    ):
        assert weights.model_digest(student) == weights.model_digest(expected)
        assert student.pruning_plan.digest == expected.pruning_plan.digest


def test_prune_model_from_a_folder_finds_the_tokenizer_there(tmp_path: Path):
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.save_pretrained(tmp_path)
    pocket_tokenizer().save_pretrained(tmp_path)
    config = PrunerConfig(intermediate_size=0.5)
    texts = ["The quick brown fox jumps over the lazy dog. " * 5]
    student = prune_model(tmp_path, config, calibration_data=texts, max_length=32)
    by_hand = prune_model(teacher, config, calibration_data=texts, processing_class=pocket_tokenizer(), max_length=32)
    assert weights.model_digest(student) == weights.model_digest(by_hand)
    student.save_pretrained(tmp_path / "student")
    student.pruning_plan.save_pretrained(tmp_path / "student")
    for file in ("config.json", "pruning_plan.json"):  # a local path is nobody's business
        assert str(tmp_path) not in (tmp_path / "student" / file).read_text()
    assert student.pruning_plan.teacher["name_or_path"] == tmp_path.name


@pytest.mark.parametrize("is_fast", [True, False], ids=["computed as stored", "computed in float32"])
def test_prune_model_keeps_in_float32_what_transformers_keeps(tmp_path: Path, monkeypatch, is_fast: bool):
    """Biases of routers that choose experts: rounded to bfloat16, they would choose others."""
    monkeypatch.setattr(models, "is_fast", lambda *_: is_fast)
    teacher = pocket_model("deepseek_v3", dtype=torch.float32)
    for name, tensor in teacher.state_dict(keep_vars=True).items():
        if not name.endswith("e_score_correction_bias"):
            tensor.data = tensor.data.bfloat16()
    teacher.save_pretrained(tmp_path)
    scores = estimate_importance(teacher, metric="random")
    student = prune_model(tmp_path, PrunerConfig(hidden_size=0.5, multiple_of=1), scores=scores)
    found, biases = student.state_dict(), 0
    for name, values in teacher.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            biases += 1
            assert not torch.equal(values, values.bfloat16().float())
            torch.testing.assert_close(found.pop(name), values, rtol=0, atol=0)
    assert biases
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32


def test_prune_model_stores_values_beyond_float16_in_float32(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(models, "is_fast", lambda *_: False)
    teacher = pocket_model("llama", dtype=torch.float16)
    with torch.no_grad():
        teacher.model.layers[0].input_layernorm.weight.fill_(6e4)
    teacher.save_pretrained(tmp_path)
    scores = estimate_importance(teacher, metric="random")
    # The norm makes up for half of its channels by √2.
    student = prune_model(tmp_path, PrunerConfig(hidden_size=0.5, multiple_of=1), scores=scores)
    assert student.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert "exceed the range of float16" in caplog.text


def test_prune_model_refuses_rounds_of_scoring_beside_scores():
    teacher = pocket_model("llama")
    scores = estimate_importance(teacher, metric="random")
    with pytest.raises(PlanError, match="iterations: only used to score calibration_data"):
        prune_model(teacher, PrunerConfig(intermediate_size=0.5), scores=scores, iterations=4)


def test_prune_model_refuses_before_it_loads_or_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pocket_config("llama").save_pretrained(tmp_path)  # no weights, which loading would complain about

    def never(*args, **kwargs):
        raise AssertionError("computed before the sizes were refused")

    monkeypatch.setattr("minitron_hf.pruning.iterations.estimate_importance", never)
    for teacher in (tmp_path, pocket_model("llama")):
        with pytest.raises(PlanError, match="larger than the teacher's 36"):
            prune_model(teacher, PrunerConfig(hidden_size=99), calibration_data=["text"])


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
def test_a_request_without_sizes_says_what_can_be_cut(name: str):
    teacher = pocket_model(name)
    with pytest.raises(PlanError, match="names no size") as caught:
        prune_model(teacher, PrunerConfig(contiguous=False), calibration_data=["text"])
    listed = dict(re.findall(r"(\w+)=(\d+)", str(caught.value).partition("Give")[0]))
    spec, sizes = spec_for(teacher.config), spec_for(teacher.config).sizes(teacher.config)
    assert listed
    for field, size in listed.items():
        axis = PRUNER_FIELDS[field]
        assert int(size) == sizes[axis]
        resolve_sizes(spec, teacher.config, PrunerConfig(**{field: sizes[axis]}))
    refused = set(spec.refused) | {axis.name for axis in spec.axes if not axis.prunable}
    assert not {PRUNER_FIELDS[field] for field in listed} & refused


def test_prune_model_needs_one_source_of_scores():
    teacher = pocket_model("llama")
    scores = estimate_importance(teacher, metric="random")
    with pytest.raises(PlanError, match="either scores or calibration_data"):
        prune_model(teacher, PrunerConfig(hidden_size=24), scores=scores, calibration_data=["text"])
    with pytest.raises(PlanError, match="needs importance scores"):
        prune_model(teacher, PrunerConfig(hidden_size=24))
    with pytest.raises(DataError, match="tokenizer"):
        prune_model(teacher, PrunerConfig(hidden_size=24), calibration_data=["text"])
    with pytest.raises(MismatchError, match="other weights"):
        prune_model(pocket_model("llama", seed=1), PrunerConfig(hidden_size=24), scores=scores)


def test_prune_model_warns_of_what_was_not_asked_for(caplog: pytest.LogCaptureFixture):
    teacher = pocket_model("mistral", dtype=torch.float32)
    for request, expected in (({"intermediate_size": 20}, 0), ({"num_key_value_heads": 2}, 1)):
        caplog.clear()
        scores = estimate_importance(teacher, metric="random")
        prune_model(teacher, PrunerConfig(**request, multiple_of=1), scores=scores)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * expected
    assert "num_attention_heads follows num_key_value_heads to" in caplog.records[0].getMessage()
