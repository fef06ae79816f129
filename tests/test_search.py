"""Architecture search: KL before retraining against a naive one, paired comparison, halving, budgets, resuming."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from minitron_hf.data import TokenRows
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError, OutputError, PlanError
from minitron_hf.models import count_parameters
from minitron_hf.pruning import prune
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import plan_for_target
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.recipe.actions import search_arguments
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.search import architectures as search
from minitron_hf.search import budget
from minitron_hf.search.architectures import search_architectures
from minitron_hf.sizes.counts import count_active_parameters
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.shapes import enumerate_shapes, memory_bytes
from minitron_hf.sizes.student import student_config
from pocket import pocket_model, pocket_tokenizer, pocket_tokens


def token_rows(*lengths, seed):
    return TokenRows(tuple(tuple(pocket_tokens(n, seed=seed + i).tolist()) for i, n in enumerate(lengths)), None)


ROWS, HELD_OUT = token_rows(16, 9, 16, 12, 5, 16, seed=0), token_rows(16, 7, 11, 16, seed=100)
TRAIN = Dataset.from_dict({"input_ids": [pocket_tokens(16, seed=200 + index).tolist() for index in range(8)]})
SPACE = {"intermediate_size": [0.25, 0.5], "num_hidden_layers": [3, 4]}
DISTILLATION = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "packing": False,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
}


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def scores(teacher):
    return estimate_importance(teacher, ROWS, max_length=16, show_progress=False)


@pytest.fixture
def find(teacher, scores):
    """A search of four shapes, all within the budget."""

    def search_for(**changes):
        defaults = {
            "space": SPACE,
            "calibration_data": ROWS,
            "max_parameters": count_parameters(teacher),
            "tolerance": 0.9,
            "max_length": 16,
            "show_progress": False,
        }
        return search_architectures(teacher, scores, **{**defaults, **changes})

    return search_for


def test_a_student_is_within_the_budget_whichever_layers_the_scores_keep():
    """A layer of experts is larger than one without: the count of the shape alone would let it pass."""
    model = pocket_model("deepseek_v3", dtype=torch.float32)
    scores = estimate_importance(model, ROWS, max_length=16, show_progress=False)
    blocks = scores.blocks.clone()
    blocks[1, 1] = -1.0  # without experts
    scores = replace(scores, blocks=blocks)
    request = PrunerConfig(num_hidden_layers=4)
    smaller = count_parameters(student_config(model.config, request))
    larger = make_plan(model, request, scores).student["num_parameters"]
    assert smaller < larger

    def found(limit):
        arguments = {"calibration_data": ROWS, "max_length": 16, "show_progress": False, "tolerance": 0.9}
        space = {"num_hidden_layers": [4]}
        return search_architectures(model, scores, space=space, max_parameters=limit, **arguments)

    assert [candidate.num_parameters for candidate in found(larger).candidates] == [larger]
    with pytest.raises(PlanError, match="layers that the scores keep"):
        found(smaller)


@pytest.fixture
def distil(find, tmp_path):
    """The same with distillation: all four in the first round, two in the second."""

    def search_for(folder="search", **changes):
        defaults = {
            "eval_data": HELD_OUT,
            "train_dataset": TRAIN,
            "processing_class": pocket_tokenizer(),
            "output_dir": tmp_path / folder,
            "num_rounds": 2,
            "num_tokens": 2 * 2 * 16,
            "distillation": DISTILLATION,
        }
        return find(**{**defaults, **changes})

    return search_for


def test_a_folder_of_the_students_name_that_no_search_wrote_is_left_alone(distil, tmp_path):
    (tmp_path / "mine" / "candidates").mkdir(parents=True)
    (tmp_path / "mine" / "candidates" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"no search\.json beside it"):
        distil("mine")
    assert (tmp_path / "mine" / "candidates" / "notes.txt").read_text() == "mine"


@torch.no_grad()
def naive_kl(teacher, student, rows):
    """KL of every token from whole logits, one row at a time: a list of vectors."""
    found = []
    for row in rows.rows:
        tokens = torch.tensor([row])
        log_p, log_q = (torch.log_softmax(model(tokens).logits[0, :-1].double(), -1) for model in (teacher, student))
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return found


def naive_error(differences):
    """Standard error of a mean per token, rows being independent: that of a ratio of sums."""
    counts = torch.tensor([float(len(row)) for row in differences])
    sums = torch.stack([row.sum() for row in differences])
    n, mean = len(differences), sums.sum() / counts.sum()
    variance = ((sums - mean * counts) ** 2).sum() / (n - 1)
    return mean.item(), (n * variance).sqrt().item() / counts.sum().item()


def test_pruned_shapes_rank_by_the_divergence_of_pruned_students(find, teacher, scores):
    found = find()
    assert len(found.candidates) == found.num_shapes == 4
    naive = {}
    for candidate in found.candidates:
        student = apply_plan(teacher, make_plan(teacher, candidate.request, scores))
        assert candidate.num_parameters == count_parameters(student)
        naive[candidate.name] = naive_kl(teacher, student, ROWS)
        mean, error = naive_error(naive[candidate.name])
        assert candidate.pruned_kl == {
            "value": pytest.approx(mean, rel=1e-4),
            "stderr": pytest.approx(error, rel=1e-4),
        }
    means = {name: torch.cat(rows).mean() for name, rows in naive.items()}
    assert [candidate.name for candidate in found.candidates] == sorted(means, key=means.__getitem__)
    best, *others = found.candidates
    assert found.best == best.request
    assert best.kl_above_best is None
    for candidate in others:
        paired = [one - other for one, other in zip(naive[candidate.name], naive[best.name], strict=True)]
        mean, error = naive_error(paired)
        assert candidate.kl_above_best["value"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert candidate.kl_above_best["stderr"] == pytest.approx(error, rel=1e-3)


def test_shapes_are_compared_repaired_where_the_request_repairs_them(find, teacher, scores):
    """Repaired on every second row, measured on the others."""
    base = PrunerConfig(repair="least_squares")
    found = find(base=base, space={"intermediate_size": [0.25, 0.5]})
    measured, repaired_on = ROWS.select([0, 2, 4]), ROWS.select([1, 3, 5])
    for candidate in found.candidates:
        assert candidate.request.repair == "least_squares"
        plan = make_plan(teacher, candidate.request, scores)
        student = apply_plan(teacher, plan, repaired=repaired_weights(teacher, plan, repaired_on))
        kl = torch.cat(naive_kl(teacher, student, measured)).mean().item()
        assert candidate.pruned_kl["value"] == pytest.approx(kl, rel=1e-4)
    with pytest.raises(PlanError, match="there is one row"):
        find(base=base, calibration_data=ROWS.select([0]))


def test_a_candidate_is_repaired_before_its_first_step_and_not_again(distil, teacher, monkeypatch):
    """Two shapes are repaired to be measured, and once more before their first step; none after that."""
    repairs, repair = [], prune.refit
    monkeypatch.setattr(
        prune, "refit", lambda model, plan, *a, **k: repairs.append(plan) or repair(model, plan, *a, **k)
    )
    monkeypatch.setattr(search, "_measure_speed", lambda *args: None)
    changes = {"base": PrunerConfig(repair="least_squares"), "space": {"intermediate_size": [0.25, 0.5]}}
    settings = {**DISTILLATION, "learning_rate": 0.0}
    found = distil(**changes, distillation=settings, eval_data=ROWS.select([0, 2, 4]))
    assert [len(candidate.rounds) for candidate in found.candidates] == [2, 1]
    assert len(repairs) == 4
    for candidate in found.candidates:  # steps of length 0 change nothing
        assert candidate.rounds[-1]["kl"] == pytest.approx(candidate.pruned_kl["value"], rel=1e-4)


@pytest.mark.slow
def test_the_better_half_goes_on_from_where_it_was(distil, teacher, scores, tmp_path):
    found = distil()
    rounds = [len(candidate.rounds) for candidate in found.candidates]
    assert rounds == [2, 2, 1, 1]
    first = [candidate.rounds[0]["kl"] for candidate in found.candidates]
    assert max(first[:2]) < min(first[2:])
    best, second, *_ = found.candidates
    assert [turn["num_tokens"] for turn in best.rounds] == [64, 128]
    assert best.kl == best.rounds[1]["kl"] < second.kl
    assert best.kl_above_best is None
    assert second.kl_above_best["value"] == pytest.approx(second.kl - best.kl, rel=1e-4)
    for candidate in found.candidates[2:]:
        assert candidate.kl_above_best["value"] == pytest.approx(candidate.kl - best.rounds[0]["kl"], rel=1e-4)
    assert best.decode_tokens_per_second > 0
    assert not (tmp_path / "search" / "candidates").exists()

    # Twice two steps are four steps.
    student = apply_plan(teacher, make_plan(teacher, best.request, scores))
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            str(tmp_path / "single"),
            **{**DISTILLATION, "max_length": 16, "max_steps": 4, "lr_scheduler_type": "constant_with_warmup"},
            shuffle_dataset=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=TRAIN,
        processing_class=pocket_tokenizer(),
    )
    trainer.train()
    naive, error = naive_error(naive_kl(teacher, student.eval(), HELD_OUT))
    assert best.kl == pytest.approx(naive, rel=1e-4)
    assert best.rounds[1]["stderr"] == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_and_measures_nothing_twice(distil, monkeypatch):
    """Four proxies, four students after the first round, two after the second: ten measurements."""
    measure, measured, breaks = search.Divergence.__call__, [], [6]

    def breaking(self, student, candidate):
        if breaks and len(measured) == breaks[0]:
            breaks.pop(0)
            raise KeyboardInterrupt
        result = measure(self, student, candidate)
        measured.append((candidate.name, len(candidate.row_sums)))
        return result

    monkeypatch.setattr(search, "_measure_speed", lambda *args: None)
    whole = distil("whole")
    monkeypatch.setattr(search.Divergence, "__call__", breaking)
    while breaks:
        with pytest.raises(KeyboardInterrupt):
            distil("broken")
    resumed = distil("broken")
    assert len(measured) == len(set(measured)) == 10
    assert [one.to_dict() for one in resumed.candidates] == [one.to_dict() for one in whole.candidates]
    assert distil("broken").best == whole.best
    assert len(measured) == 10
    written = json.loads(whole.path.read_text())
    assert [one["name"] for one in written["candidates"]] == [one.name for one in whole.candidates]


def test_a_search_distils_in_one_process_on_one_of_several_gpus(distil, monkeypatch):
    one_shape = {"space": {"intermediate_size": [0.5]}, "num_rounds": 1, "num_tokens": 2 * 16}
    on_gpus = {name: value for name, value in DISTILLATION.items() if name != "use_cpu"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    [candidate] = distil(**one_shape, distillation=on_gpus).candidates
    assert candidate.rounds[-1]["num_tokens"] == 2 * 16


def test_candidates_are_not_pushed_and_where_results_go_is_no_other_search(distil):
    """The Hub is out of reach here: a trainer that pushes ends with an error."""
    one_shape = {"space": {"intermediate_size": [0.5]}, "num_rounds": 1, "num_tokens": 2 * 16}
    pushed = {**DISTILLATION, "push_to_hub": True, "hub_model_id": "me/student", "run_name": "first"}
    [candidate] = distil(**one_shape, distillation=pushed).candidates
    assert candidate.rounds[-1]["num_tokens"] == 2 * 16
    assert distil(**one_shape, distillation=DISTILLATION).candidates[0].rounds == candidate.rounds


def test_a_folder_of_another_search_is_refused(find, tmp_path):
    find(output_dir=tmp_path)
    with pytest.raises(OutputError, match="another search"):
        find(output_dir=tmp_path, tolerance=0.8)
    with pytest.raises(OutputError, match="another search"):
        find(output_dir=tmp_path, calibration_data=HELD_OUT)
    with pytest.raises(OutputError, match="another search"):
        find(output_dir=tmp_path, distillation={"temperature": 2.0})
    find(output_dir=tmp_path, distillation={"logging_steps": 2})  # of its training's log alone


@pytest.mark.slow
def test_another_training_corpus_is_another_search(distil):
    distil()
    with pytest.raises(OutputError, match="another search"):
        distil(train_dataset=TRAIN.select(range(len(TRAIN) - 1)))


def test_another_score_is_another_search(find, tmp_path):
    """Functions of one name differ by their code, and parts of one function by their arguments."""

    def scale(model, factor):
        return factor * neurons(model)

    def score_of(kind):
        return {
            "more": lambda model: +neurons(model),
            "fewer": lambda model: -neurons(model),
            "twice": functools.partial(scale, factor=2),
            "half": functools.partial(scale, factor=0.5),
        }[kind]

    for first, second in (("more", "fewer"), ("twice", "half")):
        folder = tmp_path / first
        found = find(output_dir=folder, score_func=score_of(first))
        assert find(output_dir=folder, score_func=score_of(first)).best == found.best
        with pytest.raises(OutputError, match="another search"):
            find(output_dir=folder, score_func=score_of(second))


def test_budgets_of_parameters_and_memory_hold(find, teacher):
    shapes = enumerate_shapes(teacher.config, SPACE).shapes
    limit = shapes[1].num_parameters
    found = find(max_parameters=limit, tolerance=0.1)
    expected = [one.name for one in shapes if 0.9 * limit <= one.num_parameters <= limit]
    assert sorted(one.name for one in found.candidates) == sorted(expected)
    assert 0 < len(expected) < 4

    def cost(shape):
        config = student_config(teacher.config, shape.request)
        return memory_bytes(config, shape.num_parameters, context_length=1000, batch_size=1, dtype=torch.float32)

    costs = {shape.name: cost(shape) for shape in shapes}
    three_layers = [name for name in costs if "num_hidden_layers=3" in name]
    limit = max(costs[name] for name in three_layers)
    found = find(max_parameters=None, max_memory_bytes=limit, context_length=1000)
    assert {one.name for one in found.candidates} == {name for name in costs if costs[name] <= limit}


def test_a_shape_has_to_meet_all_budgets_and_use_one_of_them(find, teacher):
    shapes = enumerate_shapes(teacher.config, SPACE).shapes

    def bytes_of(shape, rows):
        config = student_config(teacher.config, shape.request)
        arguments = {"context_length": 64, "batch_size": rows, "dtype": torch.float32}
        return memory_bytes(config, shape.num_parameters, **arguments)

    for rows in (1, 50):  # with 50 rows, the cache outweighs the weights
        parameters, memory = shapes[1].num_parameters, sorted(bytes_of(shape, rows) for shape in shapes)[2]
        budgets = {"max_parameters": parameters, "max_memory_bytes": memory}
        found = find(**budgets, context_length=64, batch_size=rows, tolerance=0.1)
        expected = {
            shape.name
            for shape in shapes
            if shape.num_parameters <= parameters
            and bytes_of(shape, rows) <= memory
            and (shape.num_parameters >= 0.9 * parameters or bytes_of(shape, rows) >= 0.9 * memory)
        }
        assert {one.name for one in found.candidates} == expected
        assert expected


def neurons(model):
    return float(model.config.intermediate_size)


def nothing(model):
    return float("nan")


def test_a_score_of_ones_own_decides_and_has_a_floor(find, distil, teacher, scores, tmp_path):
    """With the number of neurons as the score, the order is known; the KL would choose another one."""
    found = find(score_func=neurons)
    assert [one.scores for one in found.candidates] == [[one.request.intermediate_size] for one in found.candidates]
    sizes = [one.request.intermediate_size for one in found.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert [one.name for one in found.candidates] != [one.name for one in find().candidates]
    assert {one.scores[0] for one in find(score_func=neurons, score_floor=max(sizes)).candidates} == {max(sizes)}
    with pytest.raises(PlanError, match=rf"score_floor=1e\+06: none of 4 shapes reaches it. .* has {max(sizes)}"):
        find(score_func=neurons, score_floor=1e6)
    with pytest.raises(PlanError, match="score_floor is the least result of score_func"):
        find(score_floor=1.0)
    with pytest.raises(DataError, match="nothing returned nan"):
        find(score_func=nothing)


def test_a_score_of_ones_own_decides_after_every_round_and_is_not_measured_again(distil, monkeypatch):
    asked = []

    def few_layers(model):
        asked.append(model.config.num_hidden_layers)
        return -asked[-1]

    monkeypatch.setattr(search, "_measure_speed", lambda *args: None)
    arguments = {"space": {"num_hidden_layers": [3, 4]}, "score_func": few_layers, "num_candidates": 2}
    found = distil(**arguments)
    assert [one.request.num_hidden_layers for one in found.candidates] == [3, 4]
    assert [one.scores for one in found.candidates] == [[-3.0] * 3, [-4.0] * 2]
    assert distil(**arguments).best == found.best
    assert len(asked) == 5


def test_a_score_of_ones_own_chooses_the_shape_for_a_target(teacher, scores):
    request = PrunerConfig(target_parameters=0.6, multiple_of=1, tolerance=0.1)
    plan = plan_for_target(teacher, request, scores, ROWS, max_length=16, score_func=neurons)
    assert plan.candidates[0]["scores"] == [max(one["scores"][0] for one in plan.candidates)]
    assert any("the highest of" in note for note in plan.notes)
    arguments = {"calibration_data": ROWS, "max_length": 16, "show_progress": False}
    student = prune.prune_model(teacher, request, score_func=neurons, **arguments)
    assert student.config.intermediate_size == plan.candidates[0]["scores"][0]
    with pytest.raises(PlanError, match="score_func chooses among shapes for a target"):
        prune.prune_model(teacher, PrunerConfig(intermediate_size=0.5), score_func=neurons, **arguments)


def test_active_parameters_are_a_budget_and_a_target():
    model = pocket_model("mixtral", dtype=torch.float32)
    scores = estimate_importance(model, ROWS, max_length=16, show_progress=False)
    whole, active = count_parameters(model), count_active_parameters(model)
    arguments = {"calibration_data": ROWS, "max_length": 16, "show_progress": False, "tolerance": 0.3}
    space = {"num_experts": [0.5, 1.0], "moe_intermediate_size": [0.5, 1.0]}
    found = search_architectures(model, scores, space=space, max_active_parameters=0.8 * active, **arguments)
    for candidate in found.candidates:
        student = apply_plan(model, make_plan(model, candidate.request, scores))
        assert candidate.num_active_parameters == count_active_parameters(student) <= 0.8 * active
    # Fewer experts alone change nothing that a token uses.
    neurons = model.config.intermediate_size
    assert all(candidate.request.moe_intermediate_size < neurons for candidate in found.candidates)

    request = PrunerConfig(target_active_parameters=0.8, target_parameters=0.9, multiple_of=1, tolerance=0.2)
    plan = plan_for_target(model, request, scores, ROWS, max_length=16)
    student = apply_plan(model, plan)
    assert plan.student["num_active_parameters"] == count_active_parameters(student) <= 0.8 * active
    assert count_parameters(student) <= 0.9 * whole
    assert max(count_active_parameters(student) / active / 0.8, count_parameters(student) / whole / 0.9) >= 0.8
    with pytest.raises(PlanError, match=r"target_active_parameters=.*: the teacher has"):
        plan_for_target(model, PrunerConfig(target_active_parameters=active), scores, ROWS, max_length=16)


def test_a_budget_of_time_is_kept_by_what_is_measured_once(find, tmp_path, monkeypatch):
    seconds = {3: 0.003, 4: 0.004}
    asked = []

    def measured(model, config):
        asked.append(config.num_hidden_layers)
        return seconds[config.num_hidden_layers]

    for name in ("llama", "mistral"):  # a student's class may be another
        assert budget.seconds_per_token(pocket_model("llama"), pocket_model(name).config) > 0
    monkeypatch.setattr(budget, "seconds_per_token", measured)
    for _ in range(2):
        found = find(max_parameters=None, max_seconds_per_token=0.0035, output_dir=tmp_path)
        assert [one.request.num_hidden_layers for one in found.candidates] == [3, 3]
        assert sorted(asked) == [3, 3, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_parameters": None}, "needs a budget"),
        (
            {"max_parameters": 10},
            "max_parameters=10: none of the 4 shapes of this space costs so little: max_parameters is",
        ),
        ({"train_dataset": TRAIN}, "output_dir"),
        ({"space": {"num_experts": [2]}}, "has no num_experts"),
        ({"space": {"vocab_size": [40]}}, "vocab_size is not searched"),
        ({"score_func": "kl"}, "score_func='kl': expected a function"),
        ({"score_func": True}, "score_func=True: expected a function"),
        ({"distillation": {"teacher_offload": True}}, "distillation.teacher_offload: every shape is cut from"),
    ],
)
def test_what_makes_no_sense_is_refused(find, changes, message):
    with pytest.raises(PlanError, match=message):
        find(**changes)


def test_a_recipe_that_keeps_its_teacher_elsewhere_searches_with_it_at_hand():
    values = {"distill": {"teacher_offload": True, "teacher_model_init_kwargs": {}, "temperature": 2.0}}
    recipe = Recipe.from_dict(
        {"teacher": "t", "data": {"train": "a", "eval": "b"}, "output_dir": "o", "search": {"space": SPACE}, **values}
    )
    assert search_arguments(recipe)["distillation"] == {"temperature": 2.0}


def test_more_shapes_than_are_to_be_measured_are_chosen_to_differ(find):
    found = find(space={"intermediate_size": [0.25, 0.5, 0.75, 1.0], "num_hidden_layers": [3, 4, 5]}, num_pruned=4)
    assert found.num_shapes == 12
    assert len(found.candidates) == 4
    assert len({(one.request.intermediate_size, one.request.num_hidden_layers) for one in found.candidates}) == 4
    assert all(math.isfinite(one.kl) for one in found.candidates)
    assert PrunerConfig.from_dict(found.best.to_dict()) == found.best
