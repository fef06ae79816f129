"""Sizes that a stock config does not hold: what is offered instead, other classes for the same model, warnings."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM, Qwen2Config, Qwen2MoeConfig

from minitron_hf.errors import PlanError
from minitron_hf.families import FIELD_OF_AXIS, families, spec_for
from minitron_hf.families.runtimes import HEADS_FILL_HIDDEN, recomputing_runtimes
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.resolve import resolve_sizes
from minitron_hf.sizes.student import build_student_config
from pocket import POCKETS, logits, pocket_config, pocket_model, pocket_tokens

ROOT = Path(__file__).resolve().parents[1]

#: Pockets whose family has equivalent classes, with their biases switched off.
SISTERS = [
    (name, other)
    for name, pocket in POCKETS.items()
    for other, *_ in families()[pocket.config.model_type].equivalent_classes
    if "-" not in name
]
PLAIN = {"attention_bias": False, "mlp_bias": False}


@pytest.mark.parametrize(("name", "other"), SISTERS)
def test_others_hold_exactly_the_same_model(name: str, other: str):
    teacher = pocket_model(name, **PLAIN)
    student = prune_model(teacher, PrunerConfig(model_type=other))
    assert student.config.model_type == other
    tokens = pocket_tokens(2, 19)
    assert torch.equal(logits(student, tokens), logits(teacher, tokens))


@pytest.mark.parametrize(("name", "other"), SISTERS)
def test_others_hold_sizes_that_the_family_does_not(name: str, other: str):
    teacher = pocket_model(name, dtype=torch.float32, **PLAIN)
    with pytest.raises(PlanError, match=f"Nearest: 24 or 36.*set model_type='{other}'"):
        prune_model(teacher, PrunerConfig(hidden_size=25), metric="random")
    student = prune_model(teacher, PrunerConfig(hidden_size=25, model_type=other), metric="random", verify=True)
    assert student.config.hidden_size == 25
    assert student.pruning_plan.pruner_config["model_type"] == other
    assert any(f"of type '{other}'" in note for note in student.pruning_plan.notes)


def test_a_other_student_is_saved_and_loaded_by_its_own_class(tmp_path):
    teacher = pocket_model("llama", dtype=torch.float32)
    student = prune_model(teacher, PrunerConfig(hidden_size=25, model_type="mistral"), metric="random")
    assert type(student) is MistralForCausalLM
    assert student.config.sliding_window is None
    student.save_pretrained(tmp_path)
    student.pruning_plan.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is MistralForCausalLM
    again = apply_plan(teacher, PruningPlan.from_pretrained(tmp_path))
    tokens = pocket_tokens(2, 19)
    for model in (loaded, again):
        assert torch.equal(model.eval()(tokens).logits, student(tokens).logits)


def test_models_that_are_no_other_are_refused():
    biased = pocket_config("llama-biases-tied")
    for config, other in ((biased, "mistral"), (pocket_config("qwen3"), "mistral"), (pocket_config("llama"), "qwen3")):
        with pytest.raises(PlanError, match=f"model_type='{other}': its stock classes do not hold this"):
            make_plan(config, PrunerConfig(model_type=other))
    with pytest.raises(PlanError) as caught:
        make_plan(biased, PrunerConfig(hidden_size=25))
    assert "model_type" not in str(caught.value)


def test_sizes_that_only_the_stock_config_refuses_come_with_the_nearest():
    """As if the table did not know Llama's rule."""
    config = pocket_config("llama")
    spec = families()["mistral"]
    sizes = {**spec.sizes(config), "hidden": 25}
    with pytest.raises(PlanError, match=r"The stock LlamaConfig refuses these sizes: .*Nearest: hidden_size=24 or 36"):
        build_student_config(spec, config, sizes, tuple(range(5)))


@pytest.mark.parametrize(("name", "warned"), [("qwen2", True), ("qwen3", False), ("phi3", True), ("llama", False)])
def test_sizes_that_other_runtimes_ignore_are_noted(name: str, warned: bool):
    config = pocket_config(name)
    notes = resolve_sizes(families()[name], config, PrunerConfig(hidden_size=24))[1]
    assert any("head_dim=10 is honoured by Transformers" in note and "= 2 instead" in note for note in notes) == warned
    assert not resolve_sizes(families()[name], config, PrunerConfig())[1]


RECOMPUTED = {
    "qwen2": "vLLM 0.33.0 and llama.cpp of llama-cpp-python 0.3.36 compute",
    "qwen2_moe": "vLLM 0.33.0 and SGLang 0.5.23 compute",
    "mixtral": "SGLang 0.5.23 computes",
    "olmo2": "SGLang 0.5.23 and llama.cpp of llama-cpp-python 0.3.36 compute",
    "phi3": "llama.cpp of llama-cpp-python 0.3.36 computes",
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_runtimes_that_compute_head_dim_are_named_with_sizes_that_they_take(name: str):
    """The sizes that the note names give no note, and heads that fill the hidden size."""
    spec, config = families()[name], pocket_config(name)
    before = spec.sizes(config)
    config.hidden_size = before["heads"] * before["head_dim"]
    note = resolve_sizes(spec, config, PrunerConfig(hidden_size=config.hidden_size - 1))[1][0]
    assert RECOMPUTED[name] in note
    named = re.findall(r"hidden_size=(\d+) with num_attention_heads=(\d+)", note)
    assert named
    for hidden, heads in named:
        request = PrunerConfig(hidden_size=int(hidden), num_attention_heads=int(heads))
        sizes, notes = resolve_sizes(spec, config, request)
        assert sizes["hidden"] == sizes["heads"] * sizes["head_dim"]
        assert not [note for note in notes if "head_dim" in note]


def accepted(spec, config, **sizes) -> bool:
    try:
        resolve_sizes(spec, config, PrunerConfig(**sizes))
    except PlanError:
        return False
    return True


#: Two groups of seven heads (as in Qwen2-0.5B), three of four, and as many groups as heads.
GROUPED = [(14, 2, None), (14, 2, 1), (12, 3, None), (12, 3, 2), (6, 6, None)]


@pytest.mark.parametrize(("heads", "groups", "kept"), GROUPED)
def test_advice_names_the_nearest_sizes_that_a_plan_takes(heads: int, groups: int, kept: int | None):
    """Against trying every size, for refusals of `portable` and for the note on other runtimes."""
    config = Qwen2Config(
        hidden_size=4 * heads, num_attention_heads=heads, num_key_value_heads=groups, num_hidden_layers=2
    )
    spec = families()["qwen2"]
    rest = {} if kept is None else {"num_key_value_heads": kept}
    taken = [
        size for size in range(1, 4 * heads + 1) if accepted(spec, config, hidden_size=size, portable=True, **rest)
    ]
    assert taken
    for size in range(1, 4 * heads):
        nearest = {*[one for one in taken if one < size][-1:], *[one for one in taken if one > size][:1]}
        if size not in taken:
            with pytest.raises(PlanError, match="portable=True") as refusal:
                resolve_sizes(spec, config, PrunerConfig(hidden_size=size, portable=True, **rest))
            assert {*map(int, re.findall(r"\d+", str(refusal.value).partition("Nearest: ")[2]))} == nearest
        given = PrunerConfig(hidden_size=size, num_attention_heads=kept or groups, **rest)
        [note] = [one for one in resolve_sizes(spec, config, given)[1] if "head_dim" in one] or [""]
        for hidden, number in re.findall(r"hidden_size=(\d+) with num_attention_heads=(\d+)", note):
            assert int(number) < heads  # the teacher's own sizes are no advice
            assert accepted(
                spec, config, hidden_size=int(hidden), num_attention_heads=int(number), portable=True, **rest
            )
        assert note or size == 4 * (kept or groups)


def test_sizes_given_together_come_with_a_pair_that_a_plan_takes():
    config = Qwen2Config(hidden_size=112, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=2)
    spec = families()["qwen2"]
    for hidden, heads in itertools.product([*range(8, 113, 8), 60, 111], range(1, 15)):
        if not accepted(spec, config, hidden_size=hidden, num_attention_heads=heads, portable=True):
            with pytest.raises(PlanError) as refusal:
                resolve_sizes(spec, config, PrunerConfig(hidden_size=hidden, num_attention_heads=heads, portable=True))
            pairs = re.findall(r"hidden_size=(\d+) with num_attention_heads=(\d+)", str(refusal.value))
            assert pairs or hidden == 8 * heads  # which says which heads its groups take
            for one, other in pairs:
                assert accepted(spec, config, hidden_size=int(one), num_attention_heads=int(other), portable=True)


MULTIPLE, GROUPS = "with the other sizes it has to be a multiple of", "the groups that are kept have no more"


@pytest.mark.parametrize(
    ("request_", "note"),
    [
        ({"num_attention_heads": 0.7}, f"num_attention_heads=0.7 of 8 becomes 4, that is 0.5: {MULTIPLE} 4."),
        ({"hidden_size": 0.7, "portable": True}, f"hidden_size=0.7 of 64 becomes 32, that is 0.5: {MULTIPLE} 32."),
        (
            {"num_attention_heads": 0.9, "num_key_value_heads": 2},
            f"num_attention_heads=0.9 of 8 becomes 4, that is 0.5: {GROUPS}.",
        ),
        ({"num_attention_heads": 0.5}, None),
        ({"hidden_size": 0.7}, None),  # 44.8, rounded to a multiple of 8 as ever
    ],
)
def test_a_fraction_that_other_sizes_move_says_what_became_of_it(request_, note):
    config = Qwen2Config(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    notes = resolve_sizes(families()["qwen2"], config, PrunerConfig(**request_))[1]
    assert [one for one in notes if " becomes " in one] == ([] if note is None else [note])


@pytest.mark.parametrize("name", RECOMPUTED)
def test_portable_sizes_load_in_every_runtime(name: str):
    spec, config = families()[name], pocket_config(name)
    before = spec.sizes(config)
    config.hidden_size = full = before["heads"] * before["head_dim"]
    step = before["kv"] * before["head_dim"]
    requests = [{"hidden_size": 0.6, "multiple_of": 10}, {"num_attention_heads": 0.5}, {"hidden_size": step}]
    for request in requests:
        sizes, _ = resolve_sizes(spec, config, PrunerConfig(**request, portable=True))
        assert sizes["hidden"] == sizes["heads"] * sizes["head_dim"] < full
    with pytest.raises(PlanError, match=f"with portable=True, {name} students only have .*Nearest: "):
        resolve_sizes(spec, config, PrunerConfig(hidden_size=full - 1, portable=True))
    both = PrunerConfig(hidden_size=step, num_attention_heads=before["heads"], portable=True)
    with pytest.raises(PlanError, match=f"do not fit together: with portable=True, {name} students only have"):
        resolve_sizes(spec, config, both)
    config.hidden_size = full + 1
    with pytest.raises(PlanError, match="It does not load there either"):
        resolve_sizes(spec, config, PrunerConfig(hidden_size=full, portable=True))


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "falcon-40b"])
def test_portable_neurons_are_four_times_the_hidden_size_where_a_runtime_computes_them(name: str):
    config = pocket_config(name)
    spec = spec_for(config)
    neurons = FIELD_OF_AXIS["ffn"]
    before = spec.sizes(config)
    with pytest.raises(PlanError, match="is not so in this teacher"):
        resolve_sizes(spec, config, PrunerConfig(**{neurons: before["ffn"] - 1}, portable=True))
    setattr(config, spec.axis["ffn"].fields[0], 4 * before["hidden"])
    half = before["hidden"] // before["heads"] * (before["heads"] // 2)
    for request in ({"hidden_size": 0.5}, {neurons: 0.5}, {"num_attention_heads": 0.5}, {neurons: 4 * half}):
        sizes, notes = resolve_sizes(spec, config, PrunerConfig(**request, portable=True))
        assert sizes["ffn"] == 4 * sizes["hidden"] < 4 * before["hidden"], request
        assert sizes["heads"] * sizes["head_dim"] == sizes["hidden"]
        assert not [note for note in notes if "llama.cpp" in note]
    [note] = [one for one in resolve_sizes(spec, config, PrunerConfig(**{neurons: half}))[1] if "llama.cpp" in one]
    assert f"= {4 * before['hidden']} instead" in note
    assert "portable=True" in note


def test_the_types_whose_heads_llama_cpp_computes_are_those_whose_students_failed_there():
    """The list against the runs of `tools/llama_cpp.py`, for pockets whose teacher ran there."""
    found = json.loads((ROOT / "benchmarks" / "results" / "llama_cpp.json").read_text())
    tried = {name: one["hidden_size"] for name, one in found.items() if "hidden_size" in one and name in POCKETS}
    assert len(tried) > 25
    for name, outcome in tried.items():
        spec = spec_for(POCKETS[name].config)
        if HEADS_FILL_HIDDEN in spec.equal or "head_dim" not in spec.axis:
            continue  # no other size is possible
        listed = any("llama.cpp" in program for program in recomputing_runtimes(spec.model_type))
        assert listed == (not isinstance(outcome, float)), (name, outcome)


def test_portable_asks_nothing_of_types_whose_head_dim_every_runtime_reads():
    config = pocket_config("llama")
    found = [
        resolve_sizes(families()["llama"], config, PrunerConfig(hidden_size=24, portable=one)) for one in (False, True)
    ]
    assert found[0] == found[1]


def test_expert_sizes_that_fast_kernels_do_not_take_are_noted():
    config, spec = Qwen2MoeConfig(hidden_size=64, moe_intermediate_size=48, head_dim=4), families()["qwen2_moe"]
    [note] = resolve_sizes(spec, config, PrunerConfig(moe_intermediate_size=43))[1]
    assert "multiples of 8 in 16 bits (nearest: 40 or 48)" in note
    assert not resolve_sizes(spec, config, PrunerConfig(moe_intermediate_size=40))[1]


def test_the_plan_command_takes_the_choice():
    teacher = pocket_model("llama", dtype=torch.float32)
    scores = estimate_importance(teacher, metric="random")
    plan = make_plan(teacher, PrunerConfig.from_dict({"hidden_size": 25, "model_type": "mistral"}), scores)
    assert plan.student["config"]["model_type"] == "mistral"
    assert plan.model_type == "llama"
