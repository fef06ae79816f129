"""What a run will cost: formulas against counted operations, the stages' estimates, and what the stages took."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, SplitInfo
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from minitron_hf import estimate_importance
from minitron_hf.compat import TorchDispatchMode, tree_leaves
from minitron_hf.data import TokenRows
from minitron_hf.distillation.capacity import step_flops
from minitron_hf.distillation.fake_runs import Setup, run_on_fakes
from minitron_hf.distillation.gpu_data_sheets import Device
from minitron_hf.distillation.stage_memory import (
    Workload,
    evaluation_memory,
    stage_memory,
)
from minitron_hf.distillation.stage_repair import expected_cut_inputs, expected_writers
from minitron_hf.errors import DataError, PlanError, UnsupportedModelError
from minitron_hf.models import count_parameters, load_config
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.repair import repaired_weights
from minitron_hf.pruning.repair_inputs import cut_inputs
from minitron_hf.recipe import costs
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.estimates import estimate_recipe
from minitron_hf.recipe.machine import Machine, constant_layers, measure_machine, scored_pass
from minitron_hf.recipe.schema import DISTILL_DEFAULTS, CacheSection, CorrectionSection, DistributedSection, Recipe
from minitron_hf.recipe.stages import STAGES
from minitron_hf.recipe.usage import measured_usage, read_costs, write_costs, write_estimate
from minitron_hf.scoring.activations import head_groups
from minitron_hf.scoring.gradients import GradientPass
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from pocket import POCKETS, pocket_config, pocket_model, pocket_tokenizer, pocket_tokens
from test_quantization import needs_torchao

#: Families whose operations the formula does not know: scans and linear attention, double attention, and experts that
#: all compute every token.
NOT_COUNTED = {
    "diffllama", "llama4_text", "mamba2", "olmo_hybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
}  # fmt: skip
#: A machine of round numbers.
MACHINE = Machine("a test", "float32", 1e9, 8e8, 5e8, 2e9, 2e9, 1e8, 1e7, 4e9, 1e12)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", sorted(POCKETS.keys() - NOT_COUNTED))
def test_operations_of_a_forward_pass(name):
    """Within a tenth of what PyTorch counts, for every family."""
    config = pocket_config(name)
    model, tokens = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), pocket_tokens(2, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(tokens, use_cache=False)
    formula = costs.layer_flops(config, 16) + costs.head_flops(config)
    assert formula == pytest.approx(counted.get_total_flops() / tokens.numel(), rel=0.1)


@pytest.mark.parametrize("recomputed", [False, True])
def test_operations_of_a_training_step(recomputed):
    """Within a tenth of those of `estimate_capacity`, which runs the passes on tensors without values."""
    config = pocket_config("llama", attn_implementation="sdpa")
    student = student_config(config, PrunerConfig(intermediate_size=0.5, multiple_of=1))
    setup = Setup(device=Device(1e9, type="cpu"), batch_size=2, max_length=32, activation_checkpointing=recomputed)
    counted = step_flops(config, student, setup, run_on_fakes(config, student, setup)) / (2 * 32)
    formula = costs.layer_flops(config, 32)
    formula += costs.training_flops(student, 32, recomputed=recomputed)
    formula += costs.loss_flops(config, student) * 31 / 32  # the last token predicts nothing
    assert formula == pytest.approx(counted, rel=0.1)


def test_operations_of_scoring():
    """What scoring adds to a forward pass, within a hundredth of what PyTorch counts."""
    config = pocket_config("llama")
    model, tokens = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), pocket_tokens(2, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        model.base_model(tokens, use_cache=False)
    rows = TokenRows(tuple(map(tuple, tokens.tolist())), None)
    with FlopCounterMode(display=False) as scored:
        estimate_importance(model, rows, show_progress=False)
    weighed = sum(2 * units * inner**2 for units, inner in head_groups(config))  # contributions of groups of heads
    expected = tokens.numel() * (costs.similarity_flops(config) + weighed) + costs.group_flops(config)
    assert scored.get_total_flops() - plain.get_total_flops() == pytest.approx(expected, rel=0.01)


def _factor_flops(shape, *_, **__) -> int:
    return 2 * shape[-1] ** 3 // 3


def _solve_flops(factors, pivots, right, *_, **__) -> int:
    return 2 * factors[-1] ** 2 * right[-1]


@pytest.mark.parametrize(
    ("name", "sizes", "limit"),
    [
        ("llama", {"intermediate_size": 0.5}, None),
        ("gpt2", {"intermediate_size": 0.5}, None),  # biases
        ("qwen3", {"num_attention_heads": 0.5}, None),
        ("qwen3", {"hidden_size": 0.5, "intermediate_size": 0.5, "repair": "least_squares_all"}, None),
        ("llama", {"intermediate_size": 0.5}, 1),  # a pass for every input
        ("llama", {"layers_to_drop": [3, 4], "keep_last_layers": 0}, None),
    ],
)
def test_operations_of_a_repair(name, sizes, limit):
    """All inputs, the choice of the ridge, factors and solutions: within a twentieth of what PyTorch counts."""
    teacher, tokens = pocket_model(name, dtype=torch.float32), pocket_tokens(24, 16)
    rows = TokenRows(tuple(map(tuple, tokens.tolist())), None)
    request = PrunerConfig(**{"repair": "least_squares", **sizes}, multiple_of=1)
    plan = make_plan(teacher, request, estimate_importance(teacher, metric="random", seed=3))
    aten = torch.ops.aten
    known = {aten.linalg_lu_factor_ex: _factor_flops, aten.linalg_lu_solve: _solve_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counted:
        repaired_weights(teacher, plan, rows, memory_limit=limit or 1e12)
    student = plan.build_student_config(teacher.config)
    cuts = expected_cut_inputs(teacher.config, student, request.repair)
    assert len(cuts) == len(cut_inputs(teacher, plan))
    found = costs.repair_cost(
        teacher.config, cuts, num_tokens=tokens.numel(), num_batches=3, memory_limit=limit or 1e12
    )
    layers = tokens.numel() * costs.layer_flops(teacher.config, 16)
    expected = {None: 1, 1: 3 + sum((probe + 1) / 5 for probe in (0, 2, 4))}[limit]
    assert found.passes == pytest.approx(expected)
    estimated = found.passes * layers + found.products + found.solutions
    # The last layer of a pass is counted whole, also where the pass ends at its attention.
    assert estimated == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_operations_of_a_sequential_repair():
    """Passes of both models, products, the choice of ridges, factors and solutions: within a tenth."""
    teacher, tokens = pocket_model("llama", dtype=torch.float32), pocket_tokens(24, 16)
    rows = TokenRows(tuple(map(tuple, tokens.tolist())), None)
    request = PrunerConfig(intermediate_size=0.5, num_hidden_layers=4, repair="sequential", multiple_of=1)
    plan = make_plan(teacher, request, estimate_importance(teacher, metric="random", seed=3))
    aten = torch.ops.aten
    known = {aten.linalg_lu_factor_ex: _factor_flops, aten.linalg_lu_solve: _solve_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counted:
        repaired_weights(teacher, plan, rows)
    student = plan.build_student_config(teacher.config)
    found = costs.sequential_cost(student, expected_writers(student), num_tokens=tokens.numel(), num_batches=3)
    passes = costs.layer_flops(teacher.config, 16) + found.passes * costs.layer_flops(student, 16)
    estimated = tokens.numel() * passes + found.products + found.solutions
    assert estimated == pytest.approx(counted.get_total_flops(), rel=0.1)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views move none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        read, made = ([x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in (args, output))
        known = {x.untyped_storage()._cdata for x in read}
        if not func.is_view and not all(x.untyped_storage()._cdata in known for x in made if x is not None):
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *made))
        return output


def traffic(run) -> int:
    with Traffic() as counted:
        run()
    return counted.bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_calibration_observes_what_scoring_observes(name):
    """Bytes that scoring moves beside the forward pass: of all layers, and of the single layer that is timed."""
    config = pocket_config(name)
    one = student_config(config, PrunerConfig(num_hidden_layers=1, keep_first_layers=0, keep_last_layers=0))
    layer = constant_layers(one, torch.device("cpu"), torch.float32, trained=False)
    model, tokens = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), torch.zeros(4, 32).long()
    added = []
    with torch.no_grad():
        for each in (model, layer):
            run = scored_pass(each, 4, 32)
            run()  # sets up what is kept from batch to batch
            added.append(traffic(run) - traffic(lambda each=each: each.base_model(tokens, use_cache=False)))
    whole, single = (added[i] - tokens.numel() * costs.similarity_bytes(c) for i, c in ((0, config), (1, one)))
    assert single > 0
    assert whole == pytest.approx(config.num_hidden_layers * single, rel=0.25)


def test_scores_by_gradients_move_what_is_estimated():
    """Within a fifth of the counted bytes, in bfloat16."""
    config = pocket_config("llama")
    model, tokens = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), pocket_tokens(4, 32)
    rows = TokenRows(tuple(map(tuple, tokens.tolist())), None)
    terms = ("_over_tokens", "_add_blocks")
    counted = Traffic()

    def inside(function):
        def run(*args):
            if getattr(counted, "entered", False):
                return function(*args)
            counted.entered = True
            with counted:
                found = function(*args)
            counted.entered = False
            return found

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in terms:
            patch.setattr(GradientPass, name, inside(getattr(GradientPass, name)))
        estimate_importance(model, rows, metric="taylor", show_progress=False)
    assert counted.bytes / tokens.numel() == pytest.approx(costs.gradient_score_bytes(config), rel=0.2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A pocket teacher, 4,000 tokens to train on, 1,000 held out."""
    folder = tmp_path_factory.mktemp("costs")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer().save_pretrained(folder / "teacher")
    for name, count in (("train", 80), ("eval", 20)):
        (folder / f"{name}.txt").write_text("a line of fifty characters, counted from one to it\n" * count)
    return Recipe.from_dict(
        {
            "teacher": str(folder / "teacher"),
            "output_dir": str(folder / "run"),
            "data": {"train": str(folder / "train.txt"), "eval": str(folder / "eval.txt")},
            "prune": {"intermediate_size": 0.5, "multiple_of": 1},
            "scores": {"num_rows": 16, "max_length": 32},
            "controls": ["cross_entropy"],
            "distill": {
                "max_length": 32, "per_device_train_batch_size": 4, "max_steps": 100, "eval_strategy": "no",
                "save_strategy": "no", "bf16": False, "activation_checkpointing": False,
            },
        }
    )  # fmt: skip


def test_the_stages_of_a_recipe_are_formulas_over_speeds(recipe):
    config = pocket_config("llama")
    student = student_config(config, PrunerConfig(intermediate_size=0.5, multiple_of=1))
    found = {one.stage: one for one in estimate_recipe(recipe, machine=MACHINE).stages}
    assert list(found) == ["score", "plan", "prune", "distill", "controls", "evaluate", "card"]
    scoring = costs.layer_flops(config, 32) / 8e8 + costs.similarity_flops(config) / 2e9
    scoring = 16 * 32 * (scoring + costs.similarity_bytes(config) / 1e8) + costs.group_flops(config) / 2e9
    assert found["score"].seconds == pytest.approx(0.3 + scoring)
    assert found["prune"].disk == 4 * count_parameters(student)
    per_token = costs.training_flops(student, 32) / 5e8 + costs.loss_flops(config, student) / 2e9
    per_token += costs.layer_flops(config, 32) / 1e9 + 40 * config.vocab_size / 1e8
    step = 4 * 32 * per_token + 28 * count_parameters(student) / 1e8
    assert found["distill"].seconds == pytest.approx(0.3 + 100 * step)
    assert found["controls"].seconds == pytest.approx(found["distill"].seconds)
    assert found["distill"].formula == "100 steps of 4 × 32 tokens"
    assert found["distill"].memory > 16 * count_parameters(student)
    assert not math.isnan(found["evaluate"].seconds)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="default"),
        pytest.param({"max_length": None}, id="none", marks=pytest.mark.slow),
        pytest.param({"max_length": 4096}, id="too long", marks=pytest.mark.slow),
    ],
)
def test_rows_are_estimated_no_longer_than_training_makes_them(recipe, given):
    """The context of the pocket is 64 tokens. Training lowers longer rows to it; a recipe that asks is refused."""
    context = load_config(recipe.teacher.model).max_position_embeddings
    rest = {name: value for name, value in recipe.distill.items() if name != "max_length"}
    correction = CorrectionSection(1e-3, 1000)
    cached = replace(recipe, teacher_cache=CacheSection(top_k=8), teacher_correction=correction)
    exact = replace(cached, distill=rest | {"max_length": context})
    exact = replace(exact, teacher_correction=replace(correction, arguments={"max_length": context}))
    found, expected = (estimate_recipe(one, machine=MACHINE) for one in (replace(cached, distill=rest | given), exact))
    assert found.stages == expected.stages
    assert next(one for one in found.stages if one.stage == "distill").formula == "100 steps of 4 × 64 tokens"
    assert expected.notes == found.notes[1:]
    length = given.get("max_length", 1024)
    said = "distill.max_length=null" if length is None else f"distill.max_length is {length}"
    assert found.notes[0].startswith(said)
    assert "64 tokens" in found.notes[0]
    if given.get("max_length"):
        with pytest.raises(DataError, match=r"distill\.max_length=4096: the teacher's context has 64 tokens"):
            check_recipe(replace(cached, distill=rest | given))


@pytest.mark.slow
def test_the_memory_of_stages_is_bounded_by_their_formulas(recipe, monkeypatch):
    """Each stage has the peak of `stage_memory`; where a model cannot be run without values, none."""
    config = load_config(recipe.teacher.model)
    repaired = replace(recipe, prune={**recipe.prune, "repair": "least_squares"})
    correction = CorrectionSection(1e-3, 1000, method="lora", arguments={"max_length": 32})
    whole = replace(repaired, teacher_cache=CacheSection(top_k=8), teacher_correction=correction)
    found = {one.stage: one.memory for one in estimate_recipe(whole, machine=MACHINE).stages}
    student = student_config(config, PrunerConfig(intermediate_size=0.5, multiple_of=1))
    load = Workload(batch_size=8, max_length=32, dtype=torch.float32, device="cpu", memory_limit=2e9)
    peaks = {name: sum(parts.values()) for name, parts in stage_memory(config, student, load).items()}
    assert found["score"] == peaks["score"]
    assert found["prune"] == max(peaks["repair"], peaks["prune, repaired"])
    assert found["correct"] == peaks["correct by LoRA"]
    assert found["cache"] == sum(stage_memory(config, config, replace(load, top_k=8))["cache"].values())
    drawn = replace(whole, teacher_cache=CacheSection(num_draws=7))
    costs_of = [one for one in estimate_recipe(drawn, machine=MACHINE).stages if one.stage == "cache"]
    load_of_drawn = replace(load, top_k=8, drawn=True)
    assert costs_of[0].memory == sum(stage_memory(config, config, load_of_drawn)["cache"].values()) > found["cache"]
    together = evaluation_memory([config, student, student, student, config], replace(load, eval_length=64))
    assert found["evaluate"] == sum(together.values())

    def refuse(*_, **__):
        raise PlanError("It depends on values.")

    monkeypatch.setattr("minitron_hf.recipe.stage_bytes.stage_memory", refuse)
    monkeypatch.setattr("minitron_hf.recipe.stage_bytes.evaluation_memory", refuse)
    found = {one.stage: one for one in estimate_recipe(whole, machine=MACHINE).stages}
    for name in ("score", "prune", "correct", "cache", "evaluate"):
        assert math.isnan(found[name].memory)
        assert found[name].to_dict()["memory"] is None


@pytest.mark.slow
def test_training_with_a_cut_vocabulary_has_a_memory(recipe):
    cut = replace(recipe, prune={**recipe.prune, "vocab_size": 64}, controls=[])
    found = {one.stage: one.memory for one in estimate_recipe(cut, machine=MACHINE).stages}
    whole = {one.stage: one.memory for one in estimate_recipe(recipe, machine=MACHINE).stages}
    assert 0 < found["distill"] < whole["distill"]


def test_frozen_embeddings_have_no_gradient_no_moments_and_no_product(recipe):
    frozen = replace(recipe, distill={**recipe.distill, "freeze_embeddings": True})
    plain, found = (
        {one.stage: one for one in estimate_recipe(one, machine=MACHINE).stages}["distill"] for one in (recipe, frozen)
    )
    config = student_config(pocket_config("llama"), PrunerConfig(intermediate_size=0.5, multiple_of=1))
    model = AutoModelForCausalLM.from_config(config)
    tables = {id(one.weight): one.weight.numel() for one in (model.model.embed_tokens, model.lm_head)}
    product = 2 * config.hidden_size * config.vocab_size
    a_step = 4 * 32 * product / MACHINE.product_flops + 28 * sum(tables.values()) / MACHINE.memory_traffic
    assert plain.seconds - found.seconds == pytest.approx(100 * a_step)
    assert plain.memory - found.memory >= 8 * sum(tables.values())
    checkpoint = 4 * model.num_parameters() + 8 * (model.num_parameters() - sum(tables.values()))
    assert costs.checkpoint_bytes(model.num_parameters(), sum(tables.values())) == checkpoint


@needs_torchao
def test_rounded_weights_count_in_the_memory_of_training_and_exclude_an_adapter(recipe):
    rounded = replace(recipe, distill={**recipe.distill, "fake_quantization": "int8"})
    plain, found = (
        {one.stage: one.memory for one in estimate_recipe(one, machine=MACHINE).stages} for one in (recipe, rounded)
    )
    assert found["distill"] > plain["distill"]
    assert found["score"] == plain["score"]
    with pytest.raises(UnsupportedModelError, match="fake_quantization='int8' with an adapter"):
        check_recipe(replace(rounded, lora={"r": 2}, controls=[]))
    with pytest.raises(UnsupportedModelError, match="freeze_embeddings with an adapter"):
        check_recipe(
            replace(recipe, distill={**recipe.distill, "freeze_embeddings": True}, lora={"r": 2}, controls=[])
        )
    with pytest.raises(UnsupportedModelError, match="with FSDP or DeepSpeed"):
        check_recipe(replace(rounded, distributed=DistributedSection("fsdp2", 2)))


@pytest.mark.slow
def test_faster_machines_and_fewer_tokens_take_less(recipe):
    slow = estimate_recipe(recipe, machine=MACHINE, until="distill")
    faster = {name: 10 * getattr(MACHINE, name) for name in ("forward_flops", "training_flops", "memory_traffic")}
    fast = estimate_recipe(recipe, machine=replace(MACHINE, **faster), until="distill")
    short = estimate_recipe(
        replace(recipe, distill={**recipe.distill, "max_steps": 10}), machine=MACHINE, until="distill"
    )
    for other in (fast, short):
        assert {one.stage: one.seconds for one in other.stages}["distill"] < 0.9 * slow.stages[3].seconds
    saving = replace(recipe, distill={**recipe.distill, "save_strategy": "steps"})
    saved = estimate_recipe(saving, machine=MACHINE, until="distill")
    assert saved.disk > slow.disk


@pytest.mark.slow
def test_further_speeds_and_drafts_are_counted(recipe):
    """Each as tokens × the longer of reading and computing, from the lengths that the measurement takes."""

    def seconds(**changes):
        section = replace(recipe.evaluate, **changes)
        return estimate_recipe(replace(recipe, evaluate=section), machine=MACHINE).stages[5].seconds

    teacher = load_config(recipe.teacher.model)
    student = student_config(teacher, PrunerConfig(intermediate_size=0.5, multiple_of=1))

    def step(config, batch, length):
        read = costs.decode_bytes(config, 4) + batch * (length - 32) * costs.cache_bytes(config, 4)
        computed = batch * (costs.layer_flops(config, length) / 1e9 + costs.head_flops(config) / 2e9)
        return max(read / 1e8, computed) + 6e-4 * config.num_hidden_layers

    base, models = seconds(speed=False), [teacher, student]  # the pruned student and the control are as fast
    assert seconds(speed=False, speed_batch_sizes=[8]) == base
    timed = seconds(speed=True)
    more = seconds(speed=True, speed_batch_sizes=[1, 8], speed_prompt_tokens=[512, 64])
    expected = 0.0
    for batch, length in ((8, 512), (1, 64), (8, 64)):
        for one in models:
            expected += 6 * batch * length * costs.layer_flops(one, length) / 1e9
            expected += 6 * 64 * step(one, batch, length + 64)
    assert more - timed == pytest.approx(expected)

    drafts = seconds(speed=False, draft_prompts=3, draft_tokens=2)
    expected = 4 * 2 * 64 * step(teacher, 1, 32 + 64)
    for one in models[1:]:
        read = costs.decode_bytes(one, 4) + (32 + 128 - 64) * costs.cache_bytes(one, 4)
        computed = costs.layer_flops(one, 32 + 128) / 1e9 + costs.head_flops(one) / 2e9
        expected += 4 * 128 * (max(read / 1e8, computed) + 6e-4 * one.num_hidden_layers)
    assert drafts - base == pytest.approx(expected)


@pytest.mark.slow
def test_training_evaluates_few_rows(recipe):
    """By default, five times at most 64 rows, however large the held-out text is."""
    by_steps = {**recipe.distill, "eval_strategy": "steps"}
    for most, text in ((None, "5 evaluations on 1,020"), (2, "5 evaluations on 64"), (64, "5 evaluations on 1,020")):
        changed = replace(recipe, distill={**by_steps, "max_eval_rows": most})
        found = estimate_recipe(changed, machine=MACHINE, until="distill").stages[3]
        assert found.formula.endswith(text)
    assert DISTILL_DEFAULTS["max_eval_rows"] == 64
    few, all_rows = ({**by_steps, "max_eval_rows": most} for most in (2, None))
    stage = next(stage for stage in STAGES if stage.name == "distill")
    kinds = [{}, {"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}]
    for more, same in zip(kinds, (True, False, False)):
        kept = [stage.dependencies(replace(recipe, distill=settings | more)) for settings in (few, all_rows)]
        assert (kept[0] == kept[1]) == same  # a finished student stays valid if only the log would change


def test_unknown_corpora_are_said_to_be_unknown(recipe):
    elsewhere = replace(recipe, data=replace(recipe.data, eval=replace(recipe.data.eval, source="nobody/nothing.txt")))
    found = estimate_recipe(elsewhere, machine=MACHINE)
    by_name = {one.stage: one for one in found.stages}
    assert math.isnan(by_name["evaluate"].seconds)
    assert any("data.eval" in note for note in found.notes)
    assert found.to_dict()["stages"][5]["seconds"] is None
    assert found.seconds > 0


HUB_SPLITS = [("train", True, 5000), ("train[:10%]", True, 500), ("x", False, 0)]


@pytest.mark.parametrize(("split", "known", "rows"), HUB_SPLITS)
def test_datasets_of_the_hub_are_not_downloaded(recipe, monkeypatch, split, known, rows):
    """Prompts, training and held-out text: first rows by streaming, numbers of rows from the card; and a note."""
    infos = {"train": SplitInfo("train", num_examples=5000)} if known else None

    def streamed(source, name=None, *, split, revision=None, streaming=False, cache_dir=None):
        assert streaming, source
        made = Dataset.from_dict({"text": ["a line of text"] * 100}).to_iterable_dataset()
        made.info.splits = infos
        return made

    monkeypatch.setattr("datasets.load_dataset", streamed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    far = {"source": "owner/name", "split": split}
    values = asdict(replace(recipe, controls=[])) | {"data": {"train": [{"generated": True}, far], "eval": far}}
    whole = Recipe.from_dict(values | {"generate": {"prompts": far, "max_new_tokens": 4}})
    found = estimate_recipe(whole, machine=MACHINE)
    by_name = {one.stage: one for one in found.stages}
    assert math.isnan(by_name["generate"].seconds) != known
    assert math.isnan(by_name["evaluate"].seconds) != known
    assert ("data.eval: its number of tokens is not known here." in found.notes) != known
    assert "data.eval: the lengths of documents are those of its first 64." in found.notes
    assert "data.train.2: the lengths of documents are those of its first 64." in found.notes
    if known:
        assert by_name["generate"].formula == f"at most {rows:,} × 4 new tokens"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "mamba2"])
def test_the_machine_is_measured_on_layers_of_the_model(name, tmp_path):
    found = measure_machine(pocket_config(name), tmp_path / "not" / "there", length=16, rows=4)
    assert found.notes == ()
    for field in ("forward_flops", "training_flops", "product_flops", "memory_traffic", "disk_traffic"):
        assert 1e4 < getattr(found, field) < 1e16
    assert found.memory > 1e6
    assert list(tmp_path.iterdir()) == []


def test_another_estimate_keeps_what_finished_stages_took(tmp_path):
    """A change of words in the recipe is estimated anew, and may run no stage that would write it again."""
    write_costs(tmp_path, [{"stage": "score", "seconds": 3.0}])
    measured = read_costs(tmp_path)["stages"]
    write_estimate(tmp_path, SimpleNamespace(to_dict=lambda: {"stages": []}))
    assert [one["seconds"] for one in measured] == [3.0]
    assert read_costs(tmp_path) == {"format": 1, "estimate": {"stages": []}, "stages": measured}


def test_a_stage_is_measured(tmp_path):
    (tmp_path / "before").write_bytes(b"0" * 5000)
    os.utime(tmp_path / "before", (1, 1))
    with measured_usage(tmp_path) as usage:
        held = torch.ones(50_000_000)  # 200 MB, touched
        (tmp_path / "after").write_bytes(b"0" * 1234)
        del held
    assert usage.bytes_written == 1234
    assert usage.seconds is not None
    if usage.peak_memory_bytes is not None:
        assert usage.peak_memory_bytes > 2e8


@pytest.mark.slow
def test_the_estimate_of_a_pocket_run_is_near(recipe, tmp_path):
    """Within a factor of four; a busy machine is not equally busy while it is measured and while it runs."""
    from minitron_hf.recipe.runner import run_recipe
    from minitron_hf.recipe.usage import read_costs

    run_recipe(replace(recipe, output_dir=str(tmp_path / "run")), show_progress=False, report_estimate=lambda _: None)
    found = read_costs(tmp_path / "run")
    took = sum(one["seconds"] for one in found["stages"])
    expected = sum(one["seconds"] for one in found["estimate"]["stages"] if one["stage"] != "card")
    assert took / 4 < expected < 4 * took
    assert "What the run took" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_bytes_of_keys_and_values_are_those_of_a_cache(name):
    model = pocket_model(name, dtype=torch.float32)
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7, 8]]), use_cache=True).past_key_values
    held = sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values))
    assert costs.cache_bytes(model.config, 4) == held * 4 / 4  # four tokens of four bytes


def test_the_cost_of_generated_text_follows_from_its_steps():
    from minitron_hf.recipe.generating import LAYER_START, ExpectedText, generation_cost

    config = pocket_model("llama").config
    speeds = dict.fromkeys(("forward", "scoring", "training", "product", "float32"), 1e9)
    machine = Machine(  # slow memory: reading decides
        "x", "float32", *speeds.values(), memory_traffic=1e6, disk_traffic=1e6, memory=1e9, disk=1e9
    )
    one, two = (ExpectedText({}, rows, 10.0, 20, 4) for rows in (4, 8))
    costs_of = [generation_cost(text, config, machine, 4) for text in (one, two)]
    assert costs_of[1].seconds == pytest.approx(2 * costs_of[0].seconds)
    assert costs_of[1].disk == 2 * costs_of[0].disk
    assert costs_of[1].memory == costs_of[0].memory
    weights, kept = costs.decode_bytes(config, 4), costs.cache_bytes(config, 4)
    step = (weights + 4 * 20 * kept) / 1e6 + LAYER_START * config.num_hidden_layers
    prompts = 4 * 10 * costs.layer_flops(config, 10) / 1e9
    assert costs_of[0].seconds == pytest.approx(20 * step + prompts)
