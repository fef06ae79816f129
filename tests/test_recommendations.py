"""Recommendations: the papers' rules at their limits, the published shapes, and defaults that agree with them."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import random
import re
import statistics
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, MistralConfig

from minitron_hf.data import token_rows
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.errors import ArgumentError, DataError, PlanError
from minitron_hf.models import count_parameters
from minitron_hf.pruning.candidates import Candidate
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_with_plan
from minitron_hf.recipe.decisions import SOURCES
from minitron_hf.recipe.measuring import measure_corpus, measure_on_text
from minitron_hf.recipe.recommendations import recommend
from minitron_hf.recipe.schema import Recipe
from minitron_hf.scoring.calibration import default_max_length
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from minitron_hf.sizes.targets import shapes_near_target
from pocket import pocket_config, pocket_model, pocket_tokenizer

ROOT = Path(__file__).resolve().parents[1]

LLAMA = LlamaConfig(
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
)
NEMO = MistralConfig(
    num_hidden_layers=40,
    hidden_size=5120,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=131072,
)
WIDE = LlamaConfig(num_hidden_layers=16, hidden_size=256, num_attention_heads=8, intermediate_size=768, vocab_size=512)
DEEP = LlamaConfig(num_hidden_layers=16, hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=512)


def settings(recommendation):
    return {name: value for one in recommendation.decisions for name, value in one.settings.items()}


def prune(recommendation):
    chosen = settings(recommendation)
    return {name.removeprefix("prune."): value for name, value in chosen.items() if name.startswith("prune.")}


@pytest.fixture(scope="module")
def published():
    """Llama-3.1-8B to the size of its published width student, in one round, as in the paper."""
    return recommend(LLAMA, 4_512_746_496, rounds=1, teacher_learning_rate=3e-4)


def test_the_published_width_student_of_llama(published):
    assert prune(published) == {"hidden_size": 3072, "intermediate_size": 9216, "repair": "least_squares"}
    assert [shape.num_parameters for shape in published.rounds] == [4_512_746_496]
    values = {one.name: one.value for one in published.decisions}
    assert values["axes"] == "width before depth"
    assert values["shape"] == "hidden_size 4,096 → 3,072, intermediate_size 14,336 → 9,216"
    assert values["rounds"] == "1: 8.03B → 4.51B"
    assert values["states and embeddings"] == "not compared"
    chosen = settings(published)
    assert chosen["distill.learning_rate"] == 1e-4
    assert chosen["distill.lr_scheduler_kwargs"] == {"min_lr": 1e-5}
    assert chosen["distill.warmup_steps"] == 100  # 1%; the paper's 40 steps are fewer
    assert chosen["distill.gradient_accumulation_steps"] == 1152
    assert chosen["distill.max_length"] == 8192
    assert chosen["distill.max_steps"] * 1152 * 8192 == pytest.approx(94e9, rel=1e-4)
    assert chosen["teacher_correction"]["original_learning_rate"] == 3e-4
    assert chosen["teacher_correction"]["num_tokens"] == 94e9
    assert all(one.reason and one.source for one in published.decisions)


def test_the_published_width_student_of_mistral_nemo():
    found = recommend(NEMO, 8_414_105_600)
    assert prune(found) == {"hidden_size": 4096, "intermediate_size": 11520, "repair": "least_squares"}
    assert [shape.num_parameters for shape in found.rounds] == [8_414_105_600]  # 31% go, so in one round


def test_the_published_depth_student():
    found = recommend(LLAMA, 4_540_469_248, goal="latency", rounds=1)
    chosen = settings(found)
    assert chosen["prune.num_hidden_layers"] == 16
    assert (chosen["prune.contiguous"], chosen["distill.hidden_loss"]) == (True, "cosine")
    assert (chosen["distill.embedding_loss"], chosen["distill.intermediate_weight"]) == ("cosine", "dynamic")


def test_single_layers_go_where_a_small_teacher_loses_many():
    small = LlamaConfig(num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9)
    many, few = (settings(recommend(small, share, goal="latency", rounds=1)) for share in (0.7, 0.85))
    assert (many["prune.num_hidden_layers"], few["prune.num_hidden_layers"]) == (18, 24)
    assert (many["prune.contiguous"], "scores.depth_metric" in many) == (False, False)
    assert (few["prune.contiguous"], few["scores.depth_metric"]) == (True, "perplexity")


@pytest.mark.parametrize(("kept", "compared"), [(15, False), (13, False), (12, True), (11, True)])
def test_states_and_embeddings_from_a_quarter_of_the_depth_on(kept, compared):
    target = count_parameters(student_config(DEEP, PrunerConfig(num_hidden_layers=kept)))
    chosen = settings(recommend(DEEP, target, goal="latency", rounds=1))
    assert chosen["prune.num_hidden_layers"] == kept
    for name in ("hidden_loss", "embedding_loss"):
        assert chosen[f"distill.{name}"] == ("cosine" if compared else None)


def test_a_round_cuts_a_third_at_most():
    total = count_parameters(DEEP)
    expected = {0.9: 1, 2 / 3: 1, 0.66: 2, (2 / 3) ** 2: 2, 0.44: 3, 0.3: 3}
    for share, rounds in expected.items():
        steps = recommend(DEEP, share, goal="latency").rounds
        assert len(steps) == rounds
        counts = [total, *(shape.num_parameters for shape in steps)]
        assert counts[-1] <= share * total
        ratio = (counts[-1] / total) ** (1 / rounds)
        for before, after in itertools.pairwise(counts):  # in equal ratios, as near as whole layers come
            assert after / before == pytest.approx(ratio, abs=0.06)


@pytest.mark.slow
def test_the_rounds_of_llama_nest():
    found = recommend(LLAMA, 0.5625)
    first, last = found.rounds
    assert (last.sizes["hidden"], last.sizes["ffn"]) == (3072, 9216)
    assert 3072 <= first.sizes["hidden"] <= 4096
    assert 9216 <= first.sizes["ffn"] <= 14336
    assert first.num_parameters / 8_030_261_248 == pytest.approx(0.75, abs=0.04)
    values = yaml.safe_load(found.to_yaml(found.recipe("x", train="a", eval="b", output_dir="c")))
    assert values["prune"] == {"repair": "least_squares"}
    recipe = Recipe.from_dict(values)
    for number, shape in enumerate(found.rounds, 1):
        request = recipe.in_round(number).pruner_config
        assert (request.hidden_size, request.intermediate_size) == (shape.sizes["hidden"], shape.sizes["ffn"])
        assert count_parameters(student_config(LLAMA, request)) == shape.num_parameters
    changed = found.recipe("x", train="a", eval="b", output_dir="c", overrides=["rounds.2.prune.hidden_size=2560"])
    assert [one["prune"]["hidden_size"] for one in changed["rounds"]] == [first.sizes["hidden"], 2560]
    with pytest.raises(DataError, match=r"rounds\.2\.distill: lerning_rate"):
        found.recipe("x", train="a", eval="b", output_dir="c", overrides=["rounds.2.distill.lerning_rate=1"])


def test_defaults_are_what_is_recommended(published):
    """Where a recipe says nothing, what is done is what the papers recommend; what depends on the budget is apart."""
    defaults = {f"prune.{field.name}": field.default for field in fields(PrunerConfig)}
    arguments = inspect.signature(estimate_importance).parameters.values()
    defaults |= {f"scores.{one.name}": one.default for one in arguments}
    defaults |= {f"distill.{field.name}": field.default for field in fields(DistillationConfig)}
    budget = {
        "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "warmup_steps",
        "lr_scheduler_type", "lr_scheduler_kwargs",
    }  # fmt: skip
    apart = {"prune.hidden_size", "prune.intermediate_size", "prune.repair", "teacher_correction"}
    apart |= {f"distill.{name}" for name in budget}
    practices = {name: value for name, value in settings(published).items() if name not in apart}
    assert len(practices) == 12
    assert practices == {name: defaults[name] for name in practices}
    deep = settings(recommend(DEEP, 0.7, goal="latency", rounds=1))
    for name in ("prune.contiguous", "prune.keep_first_layers", "prune.keep_last_layers"):
        assert deep[name] == defaults[name]
    assert deep["distill.intermediate_weight"] == defaults["distill.intermediate_weight"]


#: Defaults that follow from the machine, or that do not change the student.
OF_THE_MACHINE = {
    "loss_chunk_size", "teacher_model_init_kwargs", "teacher_offload", "upcast_student", "bf16",
    "gradient_checkpointing", "activation_checkpointing", "dataloader_pin_memory", "include_num_input_tokens_seen",
    "router_aux_loss_coef", "max_eval_rows", "eval_tasks", "eval_task_limit", "eval_task_data", "eval_include_path",
}  # fmt: skip


def test_defaults_name_their_source():
    """A part of a paper, a file of results, or that nothing has been measured."""
    evidence = r"et al\. 2024, (§|table|practice)|benchmarks/results/|[Nn]ot measured yet"
    own = set(DistillationConfig.__annotations__) - OF_THE_MACHINE
    for field in fields(DistillationConfig):
        if field.name in own:
            assert re.search(evidence, field.metadata["help"]), field.name
    described = PrunerConfig.__doc__ or ""
    for name in (
        "contiguous",
        "keep_last_layers",
        "norm_compensation",
        "head_add_back",
        "hidden_basis",
        "repair",
        "nonuniform_sizes",
    ):
        text = re.search(rf"\n        {name}: (.*?)(?=\n        \w|\n    \Z|\Z)", described, re.DOTALL)
        assert text is not None
        assert re.search(evidence, text[1]), name


def test_correction_needs_a_foreign_corpus_and_the_rate():
    for changes, words in (({"own_corpus": True}, "was trained on this corpus"), ({}, "--teacher-learning-rate")):
        found = recommend(DEEP, 0.8, goal="latency", **changes)
        assert "teacher_correction" not in settings(found)
        assert words in found["teacher correction"].reason
    found = recommend(DEEP, 0.8, goal="latency", tokens=1e6, teacher_learning_rate=1e-3)
    assert settings(found)["teacher_correction"]["num_tokens"] == 1_000_000
    assert found["teacher correction"].value == "1M tokens at 0.0002"


def test_small_budgets_take_small_steps():
    chosen = settings(recommend(DEEP, 0.8, goal="latency", tokens=1e6))
    assert chosen["distill.max_length"] == 512
    assert (chosen["distill.per_device_train_batch_size"], chosen["distill.gradient_accumulation_steps"]) == (8, 1)
    assert chosen["distill.max_steps"] == round(1e6 / (8 * 512))
    assert chosen["distill.warmup_steps"] == 12  # a twentieth
    assert chosen["scores.num_rows"] == 98


def test_short_budgets_cut_layers_and_neurons_long_ones_width():
    """A quarter of the layers at most, half of the neurons, and fewer layers; where that is not enough, width."""
    short, long = (recommend(WIDE, 0.7, tokens=tokens, rounds=1) for tokens in (10e6, 10e9))
    assert (short["axes"].value, long["axes"].value) == ("layers and neurons", "width before depth")
    sizes = short.rounds[-1].sizes
    assert (sizes["hidden"], sizes["heads"]) == (256, 8)
    assert 12 <= sizes["layers"] < 16
    assert math.log(sizes["layers"] / 16) / math.log(sizes["ffn"] / 768) == pytest.approx(0.3, abs=0.1)
    assert set(prune(short)) >= {"num_hidden_layers", "intermediate_size", "repair", "contiguous"}
    beyond = recommend(WIDE, 0.4, tokens=10e6, rounds=1)["axes"]
    assert beyond.value == "width before depth"
    assert "no shape with three quarters of the layers and half of the neurons or more meets" in beyond.reason
    assert "would be cut" not in long["axes"].reason


def test_rounds_share_a_short_budget():
    """Fewer rounds where each would have too few steps; a number that was asked for stays, and is remarked on."""
    assert [len(recommend(DEEP, 0.3, goal="latency", tokens=tokens).rounds) for tokens in (1e5, 1e6, 1e9)] == [1, 2, 3]
    found = recommend(DEEP, 0.3, goal="latency", tokens=1e6)
    assert settings(found)["distill.max_steps"] == 122
    assert "fewer than 100 steps" in found["rounds"].reason
    assert "babyllama-105-rounds.json" in found["rounds"].source
    assert "81 steps a round are few" in recommend(DEEP, 0.3, goal="latency", tokens=1e6, rounds=3)["rounds"].reason


def test_the_shape_is_measured_where_there_is_text():
    """The measured order is the recommendation: the best is cut to, the others are named."""
    asked = []

    def measure(shapes):
        asked.extend(shapes)
        kls = [1.5 - 0.1 * number for number, _ in enumerate(shapes)]
        pairs = zip(shapes, kls)
        found = [Candidate(one.request, one.num_parameters, {"value": kl, "stderr": 0.01}) for one, kl in pairs]
        return sorted(found, key=lambda one: one.pruned_kl["value"])

    found = recommend(WIDE, 0.7, tokens=10e6, rounds=1, measure=measure)
    assert found.rounds[-1] == asked[-1]
    assert found["shape"].reason.index(asked[-1].name) < found["shape"].reason.index(asked[0].name)
    assert "your text" in found["shape"].source
    kinds = {(shape.sizes["layers"] < 16, shape.sizes["hidden"] < 256) for shape in asked}
    assert kinds == {(True, False), (False, True), (False, False)}
    assert all(0.9 <= shape.num_parameters / (0.7 * count_parameters(WIDE)) <= 1 for shape in asked)


@torch.no_grad()
def test_shapes_are_measured_repaired_on_rows_that_the_repair_has_not_seen(tmp_path):
    teacher, tokenizer = pocket_model("llama", dtype=torch.float32), pocket_tokenizer()
    teacher.save_pretrained(tmp_path)
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=generator.randint(50, 90))) for _ in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = measure_corpus(str(tmp_path / "corpus.jsonl"), tokenizer)
    assert corpus.num_documents == 40
    assert corpus.num_tokens == pytest.approx(sum(map(len, texts)), rel=0.03)

    target = PrunerConfig(target_parameters=0.7, multiple_of=1)
    shapes = shapes_near_target(teacher.config, target, tolerance=0.1)
    candidates = measure_on_text(tmp_path, texts, tokenizer)(shapes)
    kls = [one.pruned_kl["value"] for one in candidates]
    assert kls == sorted(kls)
    assert len(kls) == len(shapes) > 1

    rows = token_rows(texts, tokenizer, max_length=default_max_length(teacher.config), num_rows=96)
    third = round(len(rows) / 3)
    measured, calibration = rows.select(list(range(third))), rows.select(list(range(third, len(rows))))
    scores = estimate_importance(teacher, calibration, show_progress=False)
    request = replace(candidates[0].request, repair="least_squares")
    student = prune_with_plan(teacher, make_plan(teacher, request, scores), calibration)
    naive = []
    for index, row in enumerate(measured.rows):
        log_p, log_q = (one(torch.tensor([row])).logits[0].double().log_softmax(-1) for one in (teacher, student))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        naive += [kl[place - 1].item() for place in measured.predicted(index)]
    assert kls[0] == pytest.approx(sum(naive) / len(naive), rel=1e-3)


def test_a_target_that_is_neither_a_share_nor_a_number_of_parameters_is_refused():
    with pytest.raises(PlanError, match=r"target=1.5: expected a fraction of the teacher below 1, or a number of"):
        recommend(WIDE, 1.5)
    with pytest.raises(ArgumentError, match="expected a PretrainedConfig, not a str"):
        recommend("a/folder", 0.5)


def test_every_line_says_what_it_rests_on():
    """A part of a paper, or a file."""
    for tokens, goal in itertools.product((1e6, 94e9), ("quality", "latency")):
        for one in recommend(WIDE, 0.5, tokens=tokens, goal=goal).decisions:
            for source in one.source.split("; "):
                assert re.search(
                    r"§|practice|table|results of|depth pruning|speed on|README|\.json|\.md|\.yaml", source
                ), one


def test_the_line_of_axes_cites_the_results_of_all_seeds():
    """Against the result files: as many seeds as there are files, and their KL."""
    line, results = recommend(WIDE, 0.7, tokens=1e6, rounds=1)["axes"], ROOT / "benchmarks" / "results" / "real"
    repaired = results.glob("starts/shape=26-layers-ffn-960,tokens=245760,seed=?.*.json")
    found = [
        json.loads(path.read_text())["summary"]["after"]["wikitext2"]["kl_divergence"]["value"] for path in repaired
    ]
    alone = json.loads((results / "recipes" / "ffn-764.json").read_text())["models"]["student"]["metrics"]
    kls = [statistics.mean(found), alone["kl_divergence"]["value"]]
    count = {1: "one seed", 2: "two seeds", 3: "three seeds"}[len(found)]
    ended = f"26 layers and 960 neurons, repaired, ended at KL {kls[0]:.3f} ({count}); neurons alone"
    assert f"{ended}, repaired, at {kls[1]:.3f} (one seed)" in line.reason
    for page in re.findall(r"docs/\S+\.md", line.source):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert any(f"{kl:.3f}" in text for kl in kls), page
    page = (ROOT / "docs" / "explanation" / "measurements.md").read_text(encoding="utf-8")
    for number in re.findall(r"0\.\d{3}", line.reason.partition("compared once")[2]):
        assert f"{number} ± " in page


@pytest.mark.parametrize(
    ("name", "goal", "by_depth"),
    [
        ("gpt2", "quality", False),
        ("mixtral", "quality", False),
        ("deepseek_v3", "quality", False),
        ("bloom", "quality", True),
        ("beam", "latency", False),
    ],
)
def test_other_families_get_legal_shapes(name, goal, by_depth):
    config = pocket_config(name)
    found = recommend(config, 0.8, goal=goal)
    request = PrunerConfig.from_dict(prune(found))
    assert count_parameters(student_config(config, request)) == found.rounds[0].num_parameters
    assert (found["axes"].value == "depth") == by_depth
    if by_depth != (goal == "latency"):
        assert "cannot be cut" in found["axes"].reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": 0}, "target=0"),
        ({"target": 1e12}, "less than the teacher's"),
        ({"target": 10}, "out of reach"),
        ({"tokens": 0}, "tokens"),
        ({"goal": "size"}, "quality or latency"),
        ({"rounds": 0}, "rounds"),
        ({"teacher_learning_rate": 0}, "teacher_learning_rate"),
    ],
)
def test_impossible_wishes_are_refused(changes, words):
    with pytest.raises(PlanError, match=words):
        recommend(DEEP, **{"target": 0.8, "goal": "latency", **changes})


def test_the_recipe_is_the_decisions_and_overrides(tmp_path):
    found = recommend(DEEP, 0.8, goal="latency", tokens=1e6, teacher_learning_rate=1e-3)
    values = found.recipe(
        "some/teacher", train="a.jsonl", eval="b.jsonl", output_dir="runs/x", overrides=["data.train.split=test"]
    )
    text = found.to_yaml(values)
    assert yaml.safe_load(text) == values
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.data.train.split == "test"
    assert recipe.teacher_correction.num_tokens == 1_000_000
    assert {f"prune.{name}": value for name, value in recipe.prune.items()}.items() <= settings(found).items()
    assert recipe.distill == {
        name.removeprefix("distill."): value for name, value in settings(found).items() if name.startswith("distill.")
    }
    with pytest.raises(DataError, match="colour"):
        found.recipe("some/teacher", train="a", eval="b", output_dir="c", overrides=["colour=blue"])


@pytest.mark.parametrize(
    ("overrides", "told", "marked"),
    [
        ([], [], set()),
        (["data.train.split=test"], [], set()),
        (["distill.max_steps=7"], ["distill.max_steps=7 instead of 244"], {"schedule"}),
        (["prune.repair=null"], ['prune.repair=null instead of "least_squares"'], {"repair"}),
        (
            ["prune.num_hidden_layers=14", "scores={}"],
            ["prune.num_hidden_layers=14 instead of 12", 'scores.metric=null instead of "activation"'],
            {"rounds", "teacher", "axes", "shape", "importance", "layers"},
        ),
        (["verify=true", "evaluate.tasks=[small]"], ["verify=true", 'evaluate.tasks=["small"]'], set()),
    ],
)
def test_comments_mark_what_was_changed(overrides, told, marked):
    """A line that no longer holds is marked, and no other."""
    found = recommend(DEEP, 0.8, goal="latency", tokens=1e6, rounds=1)
    values = found.recipe("some/teacher", train="a.jsonl", eval="b.jsonl", output_dir="c", overrides=overrides)
    text = found.to_yaml(values)
    assert yaml.safe_load(text) == values
    comments = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#   "))
    assert all(one in " ".join(text.replace("\n#  ", "").split()) for one in told)
    assert ("Changed afterwards" in text) == bool(told), comments
    names = [one.name for one in found.decisions]
    assert {name for name in names if f"\n# * {name}: " in text} == marked
    assert {name for name in names if f"\n# {name}: " in text} == {*names} - marked


@pytest.mark.parametrize("goal", ["quality", "latency"])
def test_sources_are_spelled_out(goal):
    """Nobody has to know abbreviations of the papers."""
    for one in recommend(LLAMA, 0.5, goal=goal).decisions:
        assert not re.search(r"\b(P1|P2|MO|M)\b", f"{one.value} {one.reason} {one.source}"), one
        assert all(source.startswith(tuple(SOURCES)) for source in one.source.split("; ")), one
