"""Head add-back (Muralidharan et al. 2024, §2.2): the formula written out head by head, on stock modules."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron_hf.errors import PlanError
from minitron_hf.models import load_model
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.pruning.verification import verify_student
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from pocket import pocket_config, pocket_model

#: Query and KV heads of a Llama, and what is asked for. A group keeps more than half, half and less than half.
LLAMAS = [
    ((12, 3), {"num_attention_heads": 9}),
    ((12, 3), {"num_attention_heads": 6}),
    ((12, 3), {"num_attention_heads": 3}),
    ((12, 3), {"num_attention_heads": 6, "num_key_value_heads": 2}),
    ((12, 3), {"num_attention_heads": 9, "layers_to_drop": [1]}),
    ((6, 6), {"num_key_value_heads": 4}),
    ((6, 6), {"num_key_value_heads": 2}),
]


def scored(teacher) -> ImportanceScores:
    return estimate_importance(teacher, metric="random", seed=5)


def planned(teacher, scores=None, **request) -> PruningPlan:
    request = {"head_add_back": True, **request}
    return make_plan(teacher, PrunerConfig(**request, multiple_of=1), scores or scored(teacher))


def llama(heads: int, kv: int, **kwargs):
    return pocket_model(
        "llama", num_attention_heads=heads, num_key_value_heads=kv, head_dim=6, hidden_size=36, **kwargs
    )


def merged(heads: list[Tensor], importance: list[float], left: int) -> list[Tensor]:
    """The paper's formula with its one-based numbers, then the heads in the order in which they stood."""
    total = len(heads)
    by_rank = [None, *sorted(range(total), key=lambda head: -importance[head])]
    made = {}
    for i in range(1, left + 1):
        made[by_rank[i]] = heads[by_rank[i]].clone()
        if 2 * left - total + 1 <= i <= left and 2 * left - i + 1 <= total:
            made[by_rank[i]] += heads[by_rank[i]] - heads[by_rank[2 * left - i + 1]]
    return [made[head] for head in sorted(made)]


@pytest.mark.parametrize(("heads", "request_"), LLAMAS, ids=str)
def test_llama_heads_are_merged_within_their_group(heads: tuple[int, int], request_: dict):
    teacher = llama(*heads)
    scores = scored(teacher)
    plan = planned(teacher, scores, **request_)
    student = apply_plan(teacher, plan)
    alone = heads[0] == heads[1]
    for new, old in enumerate(plan.layers_kept):
        one, other = (model.model.layers[i].self_attn for model, i in ((teacher, old), (student, new)))
        pieces = {
            "q_proj": one.q_proj.weight.split(6),
            "o_proj": one.o_proj.weight.split(6, 1),
            "k_proj": one.k_proj.weight.split(6),
            "v_proj": one.v_proj.weight.split(6),
        }
        for name, own in pieces.items():
            if alone:
                left = request_["num_key_value_heads"]
                expected = merged(list(own), scores.axes["kv"][old].tolist(), left)
            else:
                groups = plan.kept["kv"][new] if "kv" in plan.kept else range(heads[1])
                each, left = heads[0] // heads[1], request_["num_attention_heads"] // len(groups)
                importance = scores.axes["heads"][old].view(-1, each)
                expected = [
                    head
                    for group in groups
                    for head in (
                        merged(list(own[group * each : (group + 1) * each]), importance[group].tolist(), left)
                        if name in ("q_proj", "o_proj")
                        else [own[group]]
                    )
                ]
            made = getattr(other, name).weight
            torch.testing.assert_close(made, torch.cat(expected, 1 if name == "o_proj" else 0), rtol=0, atol=1e-14)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)


def test_fused_projections_and_their_biases_are_merged():
    teacher = pocket_model("gpt2")
    scores = scored(teacher)
    config = teacher.config
    left, dim = config.n_head - 1, config.n_embd // config.n_head
    student = apply_plan(teacher, planned(teacher, scores, num_attention_heads=left, hidden_size=left * dim))
    channels = torch.from_numpy(student.pruning_plan.kept["hidden"])
    for layer, (one, other) in enumerate(zip(teacher.transformer.h, student.transformer.h)):
        importance = scores.axes["heads"][layer].tolist()

        def expected(weight: Tensor, importance=importance) -> Tensor:
            return torch.cat(merged(list(weight.split(dim)), importance, left))

        fused = [expected(part) for part in one.attn.c_attn.weight.T.chunk(3)]
        torch.testing.assert_close(other.attn.c_attn.weight.T, torch.cat(fused)[:, channels], rtol=0, atol=1e-14)
        biases = [expected(part) for part in one.attn.c_attn.bias.chunk(3)]
        torch.testing.assert_close(other.attn.c_attn.bias, torch.cat(biases), rtol=0, atol=1e-14)
        torch.testing.assert_close(
            other.attn.c_proj.weight, expected(one.attn.c_proj.weight)[:, channels], rtol=0, atol=1e-14
        )
        assert torch.equal(other.attn.c_proj.bias, one.attn.c_proj.bias[channels])


def test_a_plan_remembers_partners(tmp_path: Path):
    teacher = llama(12, 3)
    plan = planned(teacher, num_attention_heads=9)
    plan.save_pretrained(tmp_path)
    again = PruningPlan.from_pretrained(tmp_path)
    assert again.kept.keys() == {"heads"}
    assert again.digest == plan.digest
    assert np.array_equal(again.partners["heads"], plan.partners["heads"])
    assert again.partners["heads"].shape == plan.kept["heads"].shape
    # Of four heads three stay: one of them has a partner.
    assert ((again.partners["heads"].reshape(-1, 3) >= 0).sum(-1) == 1).all()
    assert any("15 of 45 kept heads" in note for note in plan.notes)
    without = planned(teacher, num_attention_heads=9, head_add_back=False)
    assert without.digest != plan.digest
    assert not without.partners
    assert np.array_equal(without.kept["heads"], plan.kept["heads"])


def test_off_by_default():
    assert PrunerConfig().head_add_back is False
    teacher = llama(12, 3)
    plan = planned(teacher, num_attention_heads=6, head_add_back=False)
    made = apply_plan(teacher, plan).model.layers[0].self_attn.q_proj.weight
    expected = torch.cat([teacher.model.layers[0].self_attn.q_proj.weight.split(6)[h] for h in plan.kept["heads"][0]])
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("llama", {"num_attention_heads": 9, "hidden_size": 27, "num_hidden_layers": 4}),
        ("gpt2", {"num_attention_heads": 4, "hidden_size": 32}),
        ("phi3", {"num_attention_heads": 9, "hidden_size": 27}),
    ],
)
def test_streamed_as_in_memory(name: str, request_: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minitron_hf.pruning.stored_reading.BLOCK_BYTES", 500)  # blocks of rows, not whole tensors
    pocket_model(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "teacher")
    teacher = load_model(tmp_path / "teacher")
    plan = planned(teacher, **request_)
    apply_plan(teacher, plan).save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "teacher", tmp_path / "streamed", plan, show_progress=False)
    assert filecmp.cmp(tmp_path / "memory/model.safetensors", tmp_path / "streamed/model.safetensors", shallow=False)


def test_nothing_is_verified():
    teacher = llama(12, 3)
    scores = scored(teacher)
    config = PrunerConfig(num_attention_heads=6, head_add_back=True)
    student = prune_model(teacher, config, scores=scores, verify=True)
    assert any(note.startswith("Not verified: with head_add_back") for note in student.pruning_plan.notes)
    with pytest.raises(PlanError, match="nothing to verify"):
        verify_student(teacher, student, student.pruning_plan)


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("llama", {"intermediate_size": 8}, "no heads are cut"),
        ("llama", {"num_key_value_heads": 2, "hidden_size": 32}, "only whole groups"),
        ("gpt_oss", {"num_attention_heads": 0.5}, "hold self_attn.sinks, which is no linear map"),
        ("cohere", {"num_attention_heads": 0.5}, "hold self_attn.q_norm.weight"),
    ],
)
def test_what_cannot_be_added_is_refused(name: str, request_: dict, message: str):
    with pytest.raises(PlanError) as caught:
        student_config(pocket_config(name), PrunerConfig(**request_, head_add_back=True, multiple_of=1))
    assert message in str(caught.value)


def test_rounds_of_scoring_are_refused():
    config = PrunerConfig(num_attention_heads=6, head_add_back=True)
    with pytest.raises(PlanError, match="iterations=2 cannot be combined with head_add_back"):
        prune_model(llama(12, 3), config, calibration_data=None, metric="random", iterations=2)
