"""`prune_model(verify=True)`: masks and surgery agree for every family, and refute tables that only fit in shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_hf.errors import PlanError, UnsupportedModelError, VerificationError
from minitron_hf.families import families
from minitron_hf.families.axes import dimension_index, parse_dimensions
from minitron_hf.families.base import linear
from minitron_hf.families.rules import PLAIN_STREAM
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model, prune_with_plan
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.pruning.unit_masks import dimension_mask
from minitron_hf.pruning.verification import verify_student
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.weights import model_digest
from pocket import POCKETS, pocket_config, pocket_model, pocket_tokens
from test_surgery import requests

NAMES = list(POCKETS)


def everything(name: str, **options) -> PrunerConfig:
    """As many cuts at once as the family allows."""
    cuts = requests(name)
    return PrunerConfig(**cuts["everything" if "everything" in cuts else "layer block"], multiple_of=1, **options)


def planned(model, request: PrunerConfig) -> PruningPlan:
    return make_plan(model, request, estimate_importance(model, metric="random", seed=3))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
def test_masks_and_surgery_agree(name: str):
    teacher = pocket_model(name, dtype=torch.float32)
    before = model_digest(teacher)
    plan = planned(teacher, everything(name, norm_compensation=True))
    assert 0 <= verify_student(teacher, apply_plan(teacher, plan), plan) < 3e-4
    assert model_digest(teacher) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize("name", ["mistral", "gpt2", "qwen2_moe", "gemma3_text"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_other_dtypes(name: str, dtype: torch.dtype, most: float):
    teacher = pocket_model(name, dtype=dtype)
    plan = planned(teacher, everything(name))
    assert verify_student(teacher, apply_plan(teacher, plan), plan) < most


def test_masks_of_dimensions_are_what_surgery_keeps():
    """Against the index that surgery takes, for dimensions that no projection of today's families reads."""
    spec = families()["qwen2_moe"]
    sizes = {"heads": 6, "kv": 3, "head_dim": 2, "experts": 2, "moe_ffn": 4}
    kept = {"kv": np.array([0, 2]), "heads": np.array([1, 4]), "moe_ffn": np.array([[0, 3], [1, 2]])}
    for text in ("heads*head_dim", "kv*(heads/kv+1+1)*head_dim", "5+heads*3", "experts*moe_ffn*2", "experts*2"):
        [dimension] = parse_dimensions(text)
        mask, index = dimension_mask(dimension, spec, sizes, kept), dimension_index(dimension, sizes, kept)
        assert (mask is None) == (index is None)
        assert mask is None or mask.nonzero()[:, 0].tolist() == index.tolist()


WRONG = {
    "gate and up interleaved": ("phi3", {"mlp.gate_up_proj.weight": "ffn*2 hidden"}),
    "queries last": ("phi3", {"self_attn.qkv_proj.weight": "kv*head_dim+kv*head_dim+heads*head_dim hidden"}),
    "q, k, v one after the other": (
        "gpt_neox",
        linear("attention.query_key_value", "3*heads*head_dim", "hidden"),
    ),
    "dimensions before heads": (
        "llama",
        {
            "self_attn.q_proj.weight": "head_dim*heads hidden",
            "self_attn.k_proj.weight": "head_dim*kv hidden",
            "self_attn.v_proj.weight": "head_dim*kv hidden",
            "self_attn.o_proj.weight": "hidden head_dim*heads",
        },
    ),
    "experts' gate and up interleaved": ("mixtral", {"mlp.experts.gate_up_proj": "experts moe_ffn*2 hidden"}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_tables_that_only_fit_in_shape_are_refuted(mistake: str, monkeypatch):
    name, changes = WRONG[mistake]
    right = families()[name]
    monkeypatch.setitem(families(), name, replace(right, layer={**right.layer, **changes}))
    for dtype in (torch.float32, torch.bfloat16) if mistake == "dimensions before heads" else (torch.float32,):
        teacher = pocket_model(name, dtype=dtype)
        with pytest.raises(VerificationError, match=f"The family table '{name}' and the installed Transformers"):
            prune_model(teacher, everything(name), metric="random", verify=True)


@pytest.mark.parametrize("change", [{"norm_offset": 0.0}, {"stream": PLAIN_STREAM}])
def test_wrong_scales_are_refuted(change: dict, monkeypatch):
    monkeypatch.setitem(families(), "gemma", replace(families()["gemma"], **change))
    request = everything("gemma", norm_compensation=True)
    teacher = pocket_model("gemma", dtype=torch.float32)
    if "stream" in change:  # neither side compensates, so the only difference is the one that it makes up for
        plan = planned(teacher, request)
        assert not set(plan.scales) - set(families()["gemma"].residual_norms)
    with pytest.raises(VerificationError):
        prune_model(teacher, request, metric="random", verify=True)


def test_another_student_is_refuted():
    teacher = pocket_model("llama", dtype=torch.float32)
    plan = planned(teacher, everything("llama"))
    student = apply_plan(teacher, plan)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight[:, 0] += 0.05
    with pytest.raises(VerificationError, match=r"differ by \d\.\de-\d\d .* rounding in float32 explains"):
        verify_student(teacher, student, plan, input_ids=pocket_tokens(1, 9))


def test_the_gap_is_noted():
    teacher = pocket_model("llama", dtype=torch.float32)
    request = everything("llama")
    student = prune_model(teacher, request, metric="random", verify=True)
    [note] = [note for note in student.pruning_plan.notes if note.startswith("Verified")]
    assert "float32" in note
    plain = prune_model(teacher, request, metric="random")
    assert student.pruning_plan.digest == plain.pruning_plan.digest
    assert not any(note.startswith("Verified") for note in plain.pruning_plan.notes)


def test_a_plan_that_is_verified_again_has_its_notes_once():
    """As where a run prunes again because the student is gone."""
    teacher = pocket_model("llama", dtype=torch.float32)
    student = prune_model(teacher, everything("llama"), metric="random", verify=True)
    again = prune_with_plan(teacher, student.pruning_plan, verify=True)
    assert again.pruning_plan.notes == student.pruning_plan.notes


def test_what_cannot_be_masked_is_refused():
    one = PrunerConfig(intermediate_size=51, hidden_size=35, multiple_of=1)
    mistral = prune_model(pocket_model("mistral", dtype=torch.float32), one, metric="random", verify=True)
    assert mistral.config.hidden_size == 35
    with pytest.raises(PlanError, match="A single dropped channel of a LayerNorm cannot be verified"):
        prune_model(pocket_model("starcoder2", dtype=torch.float32), one, metric="random", verify=True)
    teacher = pocket_model("llama", dtype=torch.float32)
    plan = planned(teacher, everything("llama"))
    student = apply_plan(teacher, plan)
    with torch.device("meta"):
        empty = type(teacher)(pocket_config("llama"))
    with pytest.raises(UnsupportedModelError, match="in memory"):
        verify_student(empty, student, plan)
