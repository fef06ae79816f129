"""Arguments of public functions: wrong types, settings out of range, requests that change nothing."""

from __future__ import annotations

import inspect

import pytest
from transformers import PretrainedConfig

import minitron_hf
from minitron_hf import DistillationConfig, PrunerConfig, estimate_importance, make_plan, plan_for_target, prune_model
from minitron_hf.distillation.cache_coding import refuse_both
from minitron_hf.errors import KINDS, ArgumentError, DataError, MinitronError, MismatchError, PlanError
from minitron_hf.pruning import prune
from minitron_hf.search import architectures
from pocket import pocket_model, pocket_tokens

ROWS = [row.tolist() for row in pocket_tokens(4, 12)]
#: Public functions, by name, with the arguments that are annotated as one of our own classes.
TAKING = [
    (name, parameter.name)
    for name in minitron_hf.__all__
    if inspect.isfunction(function := getattr(minitron_hf, name))
    for parameter in inspect.signature(function).parameters.values()
    if str(parameter.annotation).removesuffix(" | None") in KINDS
]


def test_functions_that_take_own_objects_are_known():
    assert {name for name, _ in TAKING} >= {"prune_model", "make_plan", "apply_plan", "search_architectures"}


@pytest.mark.parametrize(("name", "argument"), TAKING)
@pytest.mark.parametrize("wrong", [{"hidden_size": 48}, "a/folder", 3])
def test_an_argument_of_another_type_is_refused_by_name(name: str, argument: str, wrong):
    function = getattr(minitron_hf, name)
    needed = [one for one in inspect.signature(function).parameters.values() if one.default is inspect.Parameter.empty]
    others = {one.name: None for one in needed if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    kinds = {one.name: str(one.annotation).removesuffix(" | None") for one in needed}
    own = {
        each: object.__new__(getattr(minitron_hf, kinds[each], PretrainedConfig))
        for each in others
        if kinds[each] in KINDS
    }
    with pytest.raises(
        ArgumentError, match=rf"{name}\({argument}=…\): expected a \w+, not a {type(wrong).__name__}\."
    ):
        function(**{**others, **own, argument: wrong})


def test_an_argument_that_nothing_knows_is_refused_with_the_closest():
    with pytest.raises(
        ArgumentError, match=r"prune_model has no argument calibration. Did you mean 'calibration_data'"
    ):
        prune_model(pocket_model("llama"), PrunerConfig(hidden_size=48), calibration=ROWS)
    with pytest.raises(PlanError, match="num_rows: only used to score calibration_data"):
        prune_model(pocket_model("llama"), PrunerConfig(hidden_size=48), num_rows=3)


def test_a_type_error_stays_a_type_error():
    with pytest.raises(TypeError, match=r"expected a PrunerConfig, not a dict. Build it with PrunerConfig\("):
        prune_model(pocket_model("llama"), {"hidden_size": 48})


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"kd_weight": 0},
        {"divergence": "kl"},
        {"jsd_beta": 1.0, "divergence": "jsd"},
        {"max_eval_rows": 0},
        {"hidden_layers": [[1, 1]]},
        {"use_liger_kernel": True},
    ],
)
def test_settings_of_distillation_are_refused_as_our_own_errors(settings, tmp_path):
    """The command line prints those as one message; of other errors, it writes the traceback to a file."""
    with pytest.raises(MinitronError) as caught:
        DistillationConfig(str(tmp_path), **settings)
    assert isinstance(caught.value, ValueError)


def test_two_ways_of_storing_are_refused_as_our_own_error():
    with pytest.raises(DataError, match="top_k=4 and num_draws=8"):
        refuse_both(4, 8, "float16")


@pytest.mark.parametrize(
    "request_",
    [
        {"hidden_size": 1.0},
        {"num_hidden_layers": 1.0, "intermediate_size": 1.0},
        {"layers_to_drop": []},
        {"vocab_size": 1.0},
        {"num_attention_heads": 8},
    ],
)
def test_a_request_that_cuts_nothing_is_refused_and_a_plan_says_it(request_):
    teacher = pocket_model("llama")
    if "num_attention_heads" in request_:
        request_ = {"num_attention_heads": teacher.config.num_attention_heads}
    with pytest.raises(PlanError, match="All sizes that the request gives are the teacher's, so nothing would be cut"):
        prune_model(teacher, PrunerConfig(**request_), calibration_data=ROWS)
    assert "Nothing is cut: all sizes are the teacher's." in make_plan(teacher, PrunerConfig(**request_)).notes


def test_a_plan_that_cuts_says_nothing_of_the_kind():
    assert not make_plan(pocket_model("llama"), PrunerConfig(layers_to_drop=[1])).notes


def test_scores_of_another_model_are_refused_before_anything_is_measured(monkeypatch):
    scores = estimate_importance(pocket_model("llama"), metric="random")
    other = pocket_model("llama", num_hidden_layers=6)

    def measured(*args, **kwargs):
        raise AssertionError("the teacher was run")

    monkeypatch.setattr(prune, "Divergence", measured)
    monkeypatch.setattr(architectures, "Divergence", measured)
    with pytest.raises(MismatchError, match="another architecture"):
        plan_for_target(other, PrunerConfig(target_parameters=0.5), scores, ROWS)
    space = {"intermediate_size": [0.5]}
    with pytest.raises(MismatchError, match="another architecture"):
        architectures.search_architectures(other, scores, space=space, calibration_data=ROWS, max_parameters=1e9)
