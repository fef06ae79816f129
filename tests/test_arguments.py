"""Arguments of public functions: wrong types, settings out of range, requests that change nothing."""

from __future__ import annotations

import inspect

import pytest
import transformers
from datasets import Dataset

import minitron_hf
from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    estimate_importance,
    evaluate_models,
    make_plan,
    plan_for_target,
    prune_model,
    token_rows,
)
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
    parameters = inspect.signature(function).parameters.values()
    needed = [one for one in parameters if one.default is inspect.Parameter.empty and one.kind != one.VAR_KEYWORD]
    others = {one.name: {"int": 1, "float": 1.0, "str": "x"}.get(str(one.annotation)) for one in needed}
    parts = {one.name: str(one.annotation).split(" | ") for one in needed}
    kinds = {each: next((part for part in parts[each] if part in KINDS), None) for each in parts}
    own = {
        each: object.__new__(getattr(minitron_hf, kind, None) or getattr(transformers, kind))
        for each, kind in kinds.items()
        if kind is not None
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


TEXTS, SIZE = ["one text"] * 4, PrunerConfig(hidden_size=48)
FIELDS = {"top_k": int, "temperature": float, "kd_weight": float, "freeze_embeddings": bool, "hidden_loss": str}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: make_plan("a/folder", SIZE), r"PretrainedConfig, not a str. Load it with"),
        (lambda model: prune_model(None, SIZE), "a PreTrainedModel or a path, not a NoneType"),
        (lambda model: prune_model(model, SIZE, calibration_data=ROWS, processing_class=ROWS), "not a list"),
        (
            lambda model: token_rows(TEXTS, "a/folder", max_length=8),
            "expected a tokenizer or processor, not a str. Load it",
        ),
        (lambda model: estimate_importance(model, ROWS, num_rows="4"), r"\(num_rows='4'\): expected an integer\."),
        (lambda model: estimate_importance(model, ROWS, packing="no"), r"packing='no'\): expected True or False"),
        (lambda model: estimate_importance(model, metric="random", seed="a"), r"seed='a'\): expected an integer"),
        (lambda model: estimate_importance(model, ROWS, max_length=True), "expected an integer or None"),
        (lambda model: evaluate_models(model, ROWS), "expected {'teacher': …, 'student': …}, not a LlamaForCausalLM"),
        (lambda model: evaluate_models([model, model], ROWS), "not a list"),
        (lambda model: evaluate_models({"a": None}, ROWS), r"models\['a'\] is None"),
        (
            lambda model: evaluate_models({"a": model}, ROWS, batch_size="2"),
            r"batch_size='2'\): expected an integer\.",
        ),
    ],
)
def test_what_an_argument_should_be_is_said_before_anything_is_computed(call, message, monkeypatch):
    model = pocket_model("llama")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("a model was run"))
    with pytest.raises(ArgumentError, match=message):
        call(model)


@pytest.mark.parametrize("metric", [["activation", "taylor"], 3])
def test_one_metric_decides_what_is_pruned(metric):
    model = pocket_model("llama")
    with pytest.raises(DataError, match=r"expected the name of one metric\. For several, call estimate_importance"):
        prune_model(model, SIZE, calibration_data=ROWS, metric=metric)
    with pytest.raises(DataError, match="metric=None names no metric"):
        estimate_importance(model, ROWS, metric=None)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("data", [TEXTS, "texts.jsonl"])
def test_a_trainer_says_what_a_dataset_is(name, data, tmp_path):
    given = {"train_dataset": Dataset.from_dict({"input_ids": ROWS}), name: data}
    with pytest.raises(ArgumentError, match=f"{name}: expected a datasets.Dataset, not a {type(data).__name__}"):
        DistillationTrainer(pocket_model("llama"), pocket_model("llama"), DistillationConfig(str(tmp_path)), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pruning_plan": "a/folder"}, r"pruning_plan: expected a PruningPlan, not a str. Make it with make_plan\("),
        (
            {"teacher_model": pocket_model("llama").config},
            "Expected a model, or the path or Hub id of one, not a Llama",
        ),
    ],
)
def test_a_trainer_takes_no_path_for_a_plan_and_no_config_for_a_teacher(given, message, tmp_path):
    settings = {"teacher_model": pocket_model("llama"), "args": DistillationConfig(str(tmp_path)), **given}
    rows = Dataset.from_dict({"input_ids": ROWS})
    with pytest.raises(ArgumentError, match=message):
        DistillationTrainer(pocket_model("llama"), train_dataset=rows, **settings)


@pytest.mark.parametrize("wrong", ["4", 4.5, True, float("nan"), [1]])
@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_another_type_are_refused_by_name(name, wrong, tmp_path):
    if type(wrong) is FIELDS[name] and wrong == wrong:
        pytest.skip("the type of the field")
    with pytest.raises(DataError, match=f"{name}=.*: expected "):
        DistillationConfig(str(tmp_path), **{name: wrong})


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
