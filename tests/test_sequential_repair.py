"""`repair="sequential"`: projections are refitted layer after layer, on the student's own activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.utils.data import DataLoader

from minitron_hf import prune_checkpoint
from minitron_hf.data import TokenRows
from minitron_hf.errors import PlanError, UnsupportedModelError
from minitron_hf.families import spec_for
from minitron_hf.pruning import repair
from minitron_hf.pruning.layer_writers import layer_writers
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_with_plan
from minitron_hf.pruning.repair_gaps import stream_output
from minitron_hf.pruning.sequential_repair import sequential_writers
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import POCKETS, cuttable, pocket_model, pocket_tokens
from test_repair_layers import bias, matrix

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(24, 19)), None)


def planned(model, **request):
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**{"repair": "sequential", **request}, multiple_of=1), scores)


@torch.no_grad()
def streams(model, rows: TokenRows = ROWS) -> np.ndarray:
    """Residual streams after every layer, [layers, tokens, hidden]; the last one before the final norm."""
    found = []
    layers = model.get_submodule(spec_for(model.config).layers_path)
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(stream_output(output))) for layer in layers
    ]
    model(torch.tensor(rows.rows))
    for hook in hooks:
        hook.remove()
    return torch.stack(found).flatten(1, -2).double().numpy()


@torch.no_grad()
def inputs_of(model, path: str, rows: TokenRows = ROWS) -> np.ndarray:
    """What a projection reads, [tokens, K]."""
    found = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(torch.tensor(rows.rows))
    hook.remove()
    return found[0].flatten(0, -2).double().numpy()


#: Pocket → the projections that write to the stream, in the order of their calls, and what the layer multiplies by.
WRITERS = {
    "llama": (("self_attn.o_proj", "mlp.down_proj"), lambda config: 1.0),
    "gpt2": (("attn.c_proj", "mlp.c_proj"), lambda config: 1.0),
    "phi": (("self_attn.dense", "mlp.fc2"), lambda config: 1.0),  # attention and MLP side by side
    "granite": (("self_attn.o_proj", "mlp.down_proj"), lambda config: config.residual_multiplier),
    "mamba2": (("mixer.out_proj",), lambda config: 1.0),
    "mixtral": (("self_attn.o_proj",), lambda config: 1.0),  # experts are no plain projections
    "gemma2": ((), lambda config: 1.0),  # their outputs are normalised
}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_found_with_their_factors(name):
    model = pocket_model(name)
    names, factor = WRITERS[name]
    path = f"{spec_for(model.config).layers_path}.0."
    (own,) = layer_writers(model, [0]).values()
    assert [one.projection.path.removeprefix(path) for one in own] == list(names)
    assert [one.factor for one in own] == pytest.approx([factor(model.config)] * len(names))
    assert [one.is_last for one in own] == [False] * (len(names) - 1) + [name != "mixtral"] * bool(names)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "granite", "mamba2"])
def test_the_last_projection_is_numpys_least_squares_on_the_students_activations(name):
    """Both sides read the finished student, so that every projection before it has to be the fitted one."""
    teacher = pocket_model(name)
    cut = {"layers_to_drop": [1]} if name == "mamba2" else {"layers_to_drop": [1], "intermediate_size": 0.5}
    student = prune_with_plan(teacher, planned(teacher, **cut), ROWS, ridge=1e-13)
    names, factor = WRITERS[name]
    path = f"{spec_for(student.config).layers_path}.{student.config.num_hidden_layers - 1}.{names[-1]}"
    inputs, reached = inputs_of(student, path), streams(student)[-1]
    output = inputs @ matrix(student, path) + bias(student, path)
    wanted = (streams(teacher)[-1] - reached) / factor(student.config) + output
    has_bias = int(student.get_submodule(path).bias is not None)
    columns = np.concatenate([inputs, np.ones((len(inputs), has_bias))], axis=1)
    best = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    np.testing.assert_allclose(columns @ best, output, rtol=1e-4, atol=1e-6)


def test_nothing_changes_where_a_dropped_layer_added_nothing():
    teacher = pocket_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            teacher.get_submodule(f"model.layers.2.{name}").weight.zero_()
    plan = planned(teacher, layers_to_drop=[2])
    same = prune_with_plan(teacher, plan, ROWS)
    plain = prune_with_plan(teacher, replace(plan, repair=None))
    for name, weight in same.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "request_",
    [
        {"intermediate_size": 0.5},
        {"num_hidden_layers": 2},
        {"num_attention_heads": 0.5, "num_key_value_heads": 0.5},
        {"hidden_size": 0.5},
        {"hidden_size": 0.5, "hidden_basis": "principal"},
    ],
    ids=str,
)
def test_the_stream_ends_closer_to_the_teachers_than_after_a_fit_at_once(request_):
    teacher = pocket_model("llama", tie_word_embeddings=False)
    scores = estimate_importance(teacher, ROWS, hidden_covariance="hidden_basis" in request_, show_progress=False)

    def student(repair):
        plan = make_plan(teacher, PrunerConfig(**request_, repair=repair, multiple_of=1), scores)
        return prune_with_plan(teacher, plan, ROWS if repair else None)

    with torch.no_grad():
        wanted = teacher(torch.tensor(ROWS.rows)).logits
        at_once = None if set(request_) <= {"hidden_size", "hidden_basis"} else "least_squares"
        errors = [
            (student(repair)(torch.tensor(ROWS.rows)).logits - wanted).square().mean()
            for repair in (at_once, "sequential")
        ]
    assert errors[1] < errors[0]


def test_context_and_padding_are_left_out():
    """Tokens that are context alone, at the end of a row, may be any others; so may the padding of shorter rows."""
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5)
    short = [row[:-1] if index % 2 else row for index, row in enumerate(ROWS.rows)]
    last = tuple((len(row) - 1,) for row in short)
    given = TokenRows(tuple(short), None, context=last)
    other = TokenRows(tuple((*row[:-1], 5) for row in short), None, context=last)
    one, two = (prune_with_plan(teacher, plan, rows).state_dict() for rows in (given, other))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-9)


def test_a_cut_vocabulary_changes_no_projection():
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5)
    whole = prune_with_plan(teacher, plan, ROWS).state_dict()
    kept = {**plan.kept, "vocab": np.arange(teacher.config.vocab_size - 10)}
    assert "vocab" in spec_for(teacher.config).axis
    sizes = {**plan.sizes, "vocab": {"teacher": teacher.config.vocab_size, "student": teacher.config.vocab_size - 10}}
    config = {**plan.student["config"], "vocab_size": teacher.config.vocab_size - 10}
    small = replace(plan, kept=kept, sizes=sizes, student={**plan.student, "config": config})
    found = prune_with_plan(teacher, small, ROWS).state_dict()
    for name, weight in found.items():
        torch.testing.assert_close(weight, whole[name][: len(weight)], rtol=0, atol=0)


def test_few_tokens_are_warned_of_as_in_a_fit_at_once(caplog):
    teacher = pocket_model("llama")
    few = TokenRows(ROWS.rows[:4], None)
    prune_with_plan(teacher, planned(teacher, num_hidden_layers=4), few)
    assert "inputs to 76 calibration tokens" in caplog.text
    caplog.clear()
    many = TokenRows(ROWS.rows * 6, None)
    prune_with_plan(teacher, planned(teacher, num_hidden_layers=4), many)
    assert "calibration tokens" not in caplog.text


@pytest.mark.parametrize(
    ("name", "cut", "words"),
    [
        ("mixtral", {"layers_to_drop": [1]}, ["leaves out stacked experts of", "repair least_squares refits"]),
        ("gemma2", {"hidden_size": 0.5}, ["sequential repair leaves out", "Nothing makes up for the cut channels"]),
        ("gemma2", {"layers_to_drop": [1]}, ["sequential repair leaves out"]),
        ("llama", {"hidden_size": 0.5}, []),
    ],
)
def test_what_is_not_refitted_sequentially_is_noted(name, cut, words):
    model, notes = pocket_model(name), []
    sequential_writers(model, planned(model, **cut), notes)
    assert len(notes) == bool(words), notes
    assert all(word in notes[0] for word in words)
    assert ("channels" in "".join(notes)) == (len(words) > 1 and name == "gemma2")


def test_dropped_layers_that_are_made_up_for_are_not_noted_as_lost():
    model = pocket_model("llama", dtype=torch.float32)
    for kind, noted in (("sequential", False), ("least_squares", True)):
        plan, notes = planned(model, layers_to_drop=[0, 2], repair=kind), []
        dict(repair.refit(model, plan, ROWS, processing_class=None, notes=notes))
        assert any("nothing makes up for layer 0" in note for note in notes) == noted


def test_a_teacher_on_disk_is_refused(tmp_path):
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    plan = planned(teacher, intermediate_size=0.5)
    with pytest.raises(PlanError, match=r"both have to be in memory.*--in-memory"):
        prune_checkpoint(tmp_path / "teacher", tmp_path / "student", plan, data=ROWS)
    assert not (tmp_path / "student").exists()


#: Pockets whose layers read more of the layers before them than the stream, so that they cannot run one by one.
NOT_ALONE = ("glm_moe_dsa",)


@pytest.mark.slow
@pytest.mark.parametrize("name", POCKETS)
def test_every_family_is_repaired_sequentially_or_left_out_by_name(name):
    """Logits on the calibration tokens, after the least-squares repair and after the sequential one."""
    teacher = pocket_model(name, dtype=torch.float32 if name == "xglm" else torch.float64)  # its masks know no float64
    fields = [
        one for one in ("intermediate_size", "moe_intermediate_size", "num_hidden_layers") if one in cuttable(name)
    ]
    if not fields:
        pytest.skip("nothing to cut that a repair makes up for")
    cut = {"layers_to_drop": [1]} if fields[0] == "num_hidden_layers" else {fields[0]: 0.5}
    scores = estimate_importance(teacher, metric="random", seed=3)
    errors = []
    with torch.no_grad():
        wanted = teacher(torch.tensor(ROWS.rows)).logits
        for repair in ("least_squares", "sequential"):
            if repair == "sequential" and name in NOT_ALONE:
                with pytest.raises(UnsupportedModelError, match=r"one by one. Plan with repair='least_squares'"):
                    prune_with_plan(teacher, make_plan(teacher, PrunerConfig(**cut, repair=repair), scores), ROWS)
                return
            plan = make_plan(teacher, PrunerConfig(**cut, repair=repair, multiple_of=1), scores)
            student = prune_with_plan(teacher, plan, ROWS)
            errors.append(float((student(torch.tensor(ROWS.rows)).logits - wanted).square().mean()))
    assert errors[1] <= 1.02 * errors[0]


def test_a_loader_that_shuffles_gives_the_student_of_its_first_order():
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5, layers_to_drop=[1])
    rows = [{"input_ids": torch.tensor(row)} for row in ROWS.rows]
    loader = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7))
    found = prune_with_plan(teacher, plan, loader, ridge=1e-3).state_dict()
    expected = prune_with_plan(teacher, plan, ROWS, ridge=1e-3).state_dict()  # sums know no order
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["gemma", "biogpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_projections_of_the_student_are_the_fitted_ones(name, dtype, monkeypatch):
    """These families scale what is written to the stream when channels are cut; the fit knows that already."""
    teacher = pocket_model(name, dtype=dtype)
    plan = planned(teacher, hidden_size=0.5)
    assert set(spec_for(teacher.config).stream.stream_writers) & set(plan.scales)
    fitted = {}

    def kept(teacher, student, *args, **kwargs):
        found = sequential_repair(teacher, student, *args, **kwargs)
        fitted.update({key: value.clone() for key, value in student.state_dict().items()})
        return found

    sequential_repair = repair.refit_sequentially
    monkeypatch.setattr(repair, "refit_sequentially", kept)
    student = prune_with_plan(teacher, plan, ROWS)
    for key, weight in student.state_dict().items():
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, fitted[key], rtol=1e-6 if dtype is torch.float32 else 0, atol=0)


@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_channels_that_hold_nothing_leave_nothing_to_fit(name):
    """Gemma's stream shrinks with its width, and so does what the student's projections are fitted to."""
    teacher = pocket_model(name)
    plan = planned(teacher, hidden_size=0.5)
    gone = torch.ones(teacher.config.hidden_size, dtype=torch.bool)
    gone[torch.from_numpy(plan.kept["hidden"])] = False
    with torch.no_grad():
        teacher.get_input_embeddings().weight[:, gone] = 0
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
    plan = replace(plan, teacher={**plan.teacher, "digest": None})
    student = prune_with_plan(teacher, plan, ROWS, ridge=1e-8)
    ids = torch.tensor(ROWS.rows)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_hooks_of_accelerate_stay_on_the_teacher():
    teacher = pocket_model("llama")
    plan = planned(teacher, intermediate_size=0.5)
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    blocks = list(teacher.model.layers)
    for block in blocks:
        add_hook_to_module(block, Counting())
    prune_with_plan(teacher, plan, ROWS)
    calls.clear()
    teacher(torch.tensor(ROWS.rows[:1]))
    assert calls == blocks


def test_activations_that_are_not_finite_are_refused():
    teacher = pocket_model("llama")
    plan = planned(teacher, layers_to_drop=[1])
    with torch.no_grad():
        teacher.model.embed_tokens.weight[ROWS.rows[3][5]] = torch.inf
    plan = replace(plan, teacher={**plan.teacher, "digest": None})
    with pytest.raises(UnsupportedModelError, match="are not finite in float64"):
        prune_with_plan(teacher, plan, ROWS, ridge=1e-3)
