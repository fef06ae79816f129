"""A rotated residual stream against the teacher, and its cut against a projection of what the teacher writes."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from minitron_hf.data import TokenRows
from minitron_hf.distillation.intermediate import _initial_map
from minitron_hf.errors import PlanError, UnsupportedModelError
from minitron_hf.families import spec_for
from minitron_hf.pruning.basis import principal_basis, rotated_model, stream_tensors
from minitron_hf.pruning.iterations import require_iterations
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from minitron_hf.sizes.request import PrunerConfig
from pocket import POCKETS, assert_same_function, logits, pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(12, 19)), None)
TOKENS = pocket_tokens(2, 13, seed=5)

#: Families whose tensors do not show why the stream cannot be rotated.
FIXED = {"minimax"}
#: Kinds of decoders that have to be supported.
SUPPORTED = ("llama", "qwen3", "phi3", "granite", "gemma", "smollm3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3",
             "minicpm3", "lfm2", "mamba2", "bamba", "nanochat")  # fmt: skip


def planned(model, **request) -> PruningPlan:
    scores = estimate_importance(model, ROWS, hidden_covariance=True, show_progress=False)
    return make_plan(model, PrunerConfig(hidden_basis="principal", multiple_of=1, **request), scores)


def random_basis(size: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].numpy()


def project_what_is_written(model, matrix: torch.Tensor) -> None:
    """Multiply, in place, all that a Llama writes to the residual stream by a matrix [H, H]."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(weight @ matrix)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(matrix.T @ writer.weight)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in (*SUPPORTED, "gemma2", "llama4_text") else pytest.mark.slow)
        for name in POCKETS
    ],
)
def test_every_family_is_rotated_or_refused(name: str):
    model = pocket_model(name)
    plan = replace_basis(model)
    refused = True
    with contextlib.suppress(UnsupportedModelError):
        stream_tensors(model)
        refused = False
    if refused:
        assert name not in SUPPORTED
        with pytest.raises(UnsupportedModelError, match="Leave hidden_basis out"):
            rotated_model(model, plan)
        return
    assert name not in FIXED
    rotated = rotated_model(model, plan)
    before, after = (inputs_of_the_final_norm(one) for one in (model, rotated))
    torch.testing.assert_close(after, before @ torch.from_numpy(plan.basis), rtol=1e-5, atol=1e-6)
    if stream_tensors(model).head is not None:
        assert_same_function(rotated, model, TOKENS, tolerance=1e-5)


def replace_basis(model) -> PruningPlan:
    """A plan without a cut, in a random basis."""
    plan = PruningPlan("", {}, {}, {}, (), {}, {})
    return replace(plan, basis=random_basis(spec_for(model.config).sizes(model.config)["hidden"]))


def inputs_of_the_final_norm(model) -> torch.Tensor:
    seen = []
    path = spec_for(model.config).final_norm
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, TOKENS)
    handle.remove()
    return seen[-1]


CUT = [
    *(("llama", {}), ("mixtral", {}), ("llama", {"num_hidden_layers": 2, "norm_compensation": False})),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in SUPPORTED if name not in ("llama", "mixtral")),
]


@pytest.mark.parametrize(("name", "others"), CUT)
def test_student_equals_the_masked_rotated_teacher(name: str, others: dict):
    teacher = pocket_model(name)
    left = teacher.config.hidden_size * 2 // 3
    student = prune_model(
        teacher,
        PrunerConfig(hidden_size=left, hidden_basis="principal", multiple_of=1, **others),
        calibration_data=ROWS,
        verify=True,
        show_progress=False,
    )
    assert any("Verified" in note for note in student.pruning_plan.notes)
    assert student.config.hidden_size == left


def test_cut_equals_a_projection_of_what_the_teacher_writes():
    teacher = pocket_model("llama")
    plan = planned(teacher, hidden_size=0.5)
    axes = torch.from_numpy(plan.basis).double()[:, : plan.sizes["hidden"]["student"]]
    projected = pocket_model("llama")
    project_what_is_written(projected, axes @ axes.T)
    assert_same_function(apply_plan(teacher, plan), projected, TOKENS, tolerance=1e-5)


def test_nothing_is_lost_of_a_stream_that_fills_a_part_of_its_width():
    teacher = pocket_model("llama")
    size, left = teacher.config.hidden_size, 24
    axes = torch.from_numpy(random_basis(size))[:, :left]
    project_what_is_written(teacher, axes @ axes.T)
    plan = planned(teacher, hidden_size=left)
    assert_same_function(apply_plan(teacher, plan), teacher, TOKENS, tolerance=1e-5)
    single = apply_plan(teacher, make_plan(teacher, PrunerConfig(hidden_size=left), scores_of(teacher)))
    assert (logits(single, TOKENS) - logits(teacher, TOKENS)).norm() > 0.1 * logits(teacher, TOKENS).norm()


@pytest.mark.parametrize("others", [{"layers_to_drop": [2]}, {"intermediate_size": 0.5}])
def test_a_repair_gives_the_same_model_in_another_basis(others: dict):
    teacher = pocket_model("llama")
    size, left = teacher.config.hidden_size, 24
    axes = torch.from_numpy(random_basis(size))[:, :left]
    project_what_is_written(teacher, axes @ axes.T)
    students = []
    for hidden in ({}, {"hidden_size": left}):
        plan = planned(teacher, repair="least_squares", **others, **hidden)
        assert (plan.basis is None) == (not hidden)
        students.append(apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, ROWS, ridge=1e-3)))
    assert_same_function(*students, TOKENS, tolerance=1e-4)


def scores_of(model) -> ImportanceScores:
    return estimate_importance(model, ROWS, hidden_covariance=True, show_progress=False)


def test_covariance_is_that_of_the_inputs_of_all_norms():
    model = pocket_model("llama")
    rows = [torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([8, 9, 10, 0, 0, 0])]
    masks = [torch.ones(6, dtype=torch.long), torch.tensor([1, 1, 1, 0, 0, 0])]
    batches = DataLoader(
        [{"input_ids": row, "attention_mask": mask} for row, mask in zip(rows, masks, strict=True)], batch_size=2
    )
    found = estimate_importance(model, batches, hidden_covariance=True, show_progress=False).covariance
    seen = []
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    handles = [
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for norm in [*norms, model.model.norm]
    ]
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8, 9, 10]]))
        model(torch.tensor([[8, 9, 10]]))
    for handle in handles:
        handle.remove()
    for wanted, expected in zip(found, (seen, [seen[len(norms)], seen[-1]]), strict=True):
        x = torch.cat([each[0] for each in expected])
        x = x / x.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(wanted, (x.T @ x / len(x)).float(), rtol=1e-5, atol=1e-6)


def test_basis_is_that_of_the_largest_eigenvalues():
    model = pocket_model("llama")
    size = model.config.hidden_size
    mixed = torch.from_numpy(random_basis(size))
    energies = torch.arange(size, 0, -1, dtype=torch.float64)
    covariance = (mixed * energies) @ mixed.T
    basis = torch.from_numpy(principal_basis(model, torch.stack([covariance, torch.eye(size)]))).double()
    torch.testing.assert_close((basis.T @ mixed).abs(), torch.eye(size).double(), rtol=0, atol=1e-4)


def test_tied_head_keeps_channels_whose_norm_weights_are_unlike_the_others():
    teacher = pocket_model("qwen2-tied")
    weight = teacher.model.norm.weight
    with torch.no_grad():
        weight.fill_(1.25)
        weight[[2, 5]] = torch.tensor([-3.0, 9.0], dtype=weight.dtype)
    scores = scores_of(teacher)
    basis = torch.from_numpy(principal_basis(teacher, scores.covariance))
    for channel in (2, 5):
        [axis] = basis[channel].nonzero().flatten().tolist()
        assert basis[:, axis].abs().sum() == basis[channel, axis] == 1
    assert int((basis != 0).sum()) == 2 + (len(basis) - 2) ** 2
    rotated = rotated_model(teacher, replace(replace_basis(teacher), basis=basis.numpy()))
    assert rotated.lm_head.weight is rotated.model.embed_tokens.weight
    assert_same_function(rotated, teacher, TOKENS, tolerance=1e-5)


def test_a_head_of_its_own_makes_the_rotation_exact(tmp_path):
    tied, teacher = pocket_model("qwen2-tied"), pocket_model("qwen2-tied")
    guide = Path(__file__).parents[1] / "docs" / "guides" / "width-or-depth.md"
    [untie] = [
        block for block in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL) if "lm_head" in block
    ]
    exec(untie, {"torch": torch, "teacher": teacher})
    teacher.save_pretrained(tmp_path)
    untied = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_function(untied, tied, TOKENS, tolerance=1e-5)
    basis = principal_basis(teacher, scores_of(teacher).covariance)
    rotated = rotated_model(teacher, replace(replace_basis(teacher), basis=basis))
    assert_same_function(rotated, tied, TOKENS, tolerance=1e-5)


def test_a_tied_head_of_uneven_norm_weights_is_approximated():
    teacher = pocket_model("qwen2-tied")
    basis = principal_basis(teacher, scores_of(teacher).covariance)
    rotated = rotated_model(teacher, replace(replace_basis(teacher), basis=basis))
    before, after = logits(teacher, TOKENS), logits(rotated, TOKENS)
    centred = before - before.mean(-1, keepdim=True)
    error = (after - after.mean(-1, keepdim=True) - centred).square().sum() / centred.square().sum()
    assert error < 0.01


def test_refitted_readers_come_closer_in_the_rotated_basis():
    teacher = pocket_model("llama")
    distances = []
    for repair in (None, "least_squares_all"):
        request = PrunerConfig(hidden_size=0.75, hidden_basis="principal", multiple_of=1, repair=repair)
        student = prune_model(teacher, request, calibration_data=ROWS, show_progress=False)
        gap = logits(student, torch.tensor(ROWS.rows)) - logits(teacher, torch.tensor(ROWS.rows))
        distances.append(float(gap.norm()))
    assert distances[1] < 0.9 * distances[0]


def test_plan_is_written_and_read_with_its_basis(tmp_path):
    teacher = pocket_model("llama", dtype=torch.float32)
    plan = planned(teacher, hidden_size=0.5)
    plan.save_pretrained(tmp_path)
    read = PruningPlan.from_pretrained(tmp_path)
    assert read.digest == plan.digest != replace(plan, basis=None).digest
    np.testing.assert_array_equal(read.basis, plan.basis)
    for one, other in zip(apply_plan(teacher, read).parameters(), apply_plan(teacher, plan).parameters(), strict=True):
        assert torch.equal(one, other)


def test_scores_are_written_and_read_with_their_covariance(tmp_path):
    scores = scores_of(pocket_model("llama"))
    scores.save_pretrained(tmp_path)
    read = ImportanceScores.from_pretrained(tmp_path)
    assert torch.equal(read.covariance, scores.covariance)
    assert read.digest == scores.digest


def test_projection_of_states_starts_at_the_axes_that_stay():
    teacher = pocket_model("llama")
    plan = planned(teacher, hidden_size=0.5)
    width, size = plan.sizes["hidden"]["student"], plan.sizes["hidden"]["teacher"]
    found = _initial_map(width, size, [plan])
    torch.testing.assert_close(found, torch.from_numpy(plan.basis)[:, :width])


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "gemma2", "minimax"])
def test_families_with_a_fixed_basis_are_refused(name: str):
    teacher = pocket_model(name)
    with pytest.raises(UnsupportedModelError, match="Leave hidden_basis out"):
        planned(teacher, hidden_size=0.5)


def test_requests_that_cannot_be_met_are_refused():
    teacher = pocket_model("llama", dtype=torch.float32)
    request = PrunerConfig(hidden_size=0.5, hidden_basis="principal", multiple_of=1)
    with pytest.raises(PlanError, match="hidden_covariance=True"):
        make_plan(teacher, request, estimate_importance(teacher, ROWS, show_progress=False))
    with pytest.raises(PlanError, match="not with its config"):
        make_plan(teacher.config, request, scores_of(teacher))
    with pytest.raises(PlanError, match="Expected 'principal', or None"):
        PrunerConfig(hidden_size=0.5, hidden_basis="random")
    with pytest.raises(PlanError, match="cannot be combined with hidden_basis"):
        require_iterations(request, 2)


def test_basis_is_not_computed_without_a_cut_of_the_hidden_size():
    teacher = pocket_model("llama")
    assert planned(teacher, intermediate_size=0.5).basis is None
