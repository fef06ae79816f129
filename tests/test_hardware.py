"""One policy for device and dtype: no weight is rounded, and nothing depends on the processor that should not."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from minitron_hf import hardware
from minitron_hf.compat import forget_preparation
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.intermediate import IntermediateLosses
from minitron_hf.distillation.token_means import TokenMeansMixin
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError, MismatchError, UnsupportedModelError
from minitron_hf.evaluation import quality
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.evaluation.loading import common_device, in_float32
from minitron_hf.generation import decoding
from minitron_hf.losses import heads
from minitron_hf.models import load_for_compute, load_model, plain_model
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.pruning.verification import verify_student
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.search.architectures import search_architectures
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokenizer, pocket_tokens
from test_cli import minitron, refused

TEXTS = [f"the {a} {b} of {c}" for a in ("old", "new") for b in "xyz" for c in "abcd"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of one teacher with its tokenizer, by the dtype that it is stored in."""
    folders = {}
    for dtype in DTYPES:
        folders[dtype] = tmp_path_factory.mktemp("teacher") / str(dtype)
        pocket_model("llama", dtype=dtype).save_pretrained(folders[dtype])
        pocket_tokenizer().save_pretrained(folders[dtype])
    return folders


def equal(one, other):
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), b in pairs)


# Loading


@pytest.mark.either_cpu
@pytest.mark.parametrize("stored", DTYPES)
def test_loading_rounds_nothing_and_avoids_slow_dtypes(saved, stored, cpu_has_bf16):
    model = load_for_compute(saved[stored], device="cpu")
    fast = stored == torch.float32 or (stored == torch.bfloat16 and cpu_has_bf16)
    assert model.dtype == (stored if fast else torch.float32)
    assert equal(model, load_model(saved[stored]).to(model.dtype))
    assert load_for_compute(saved[stored], dtype=torch.float16, device="cpu").dtype == torch.float16  # an order


def test_the_old_name_of_dtype_means_the_same(saved):
    for name in ("bfloat16", torch.bfloat16):
        assert load_model(saved[torch.float32], torch_dtype=name).dtype == torch.bfloat16
    assert load_model(saved[torch.float32], dtype="bfloat16", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    for load in (load_model, load_for_compute):
        with pytest.raises(MismatchError, match=r"dtype=torch.float32 and torch_dtype=torch.bfloat16"):
            load(saved[torch.float32], dtype="float32", torch_dtype="bfloat16")


def test_unknown_dtypes_and_devices_are_refused_by_name(saved):
    with pytest.raises(DataError, match=r"dtype='bf61'.*'float32'"):
        load_model(saved[torch.float32], dtype="bf61")
    with pytest.raises(DataError, match="dtype='float8_e4m3fn'"):  # weights would be cast without a scale
        load_model(saved[torch.float32], dtype="float8_e4m3fn")
    with pytest.raises(DataError, match=r"device='gpu0'.*torch device"):
        load_for_compute(saved[torch.float32], device="gpu0")
    with pytest.raises(DataError, match=r"device='cuda:99': there is no such device here"):
        load_for_compute(saved[torch.float32], device="cuda:99")


class OnApple(torch.Tensor):
    """Stands for a tensor on an Apple GPU, which refuses float64."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        if function is torch.Tensor.double or torch.float64 in dtypes:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        if function is torch.Tensor.to and cls.device in args:
            return args[0].as_subclass(cls)
        found = super().__torch_function__(function, types, args, kwargs)
        return found.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else found


def on_apple(tensor):
    return tensor.as_subclass(OnApple)


def test_models_are_checked_on_an_apple_gpu_without_float64(monkeypatch):
    with pytest.raises(TypeError, match="float64"):
        on_apple(torch.ones(1)).double()
    model = pocket_model("llama", dtype=torch.float32)
    head_logits, generate = heads.head_logits, decoding._generate
    monkeypatch.setattr(heads, "head_logits", lambda *given: on_apple(head_logits(*given)))
    heads.check_output_head(model)
    monkeypatch.setattr(heads, "head_logits", lambda *given: on_apple(head_logits(*given) + 0.1))
    with pytest.raises(UnsupportedModelError, match="other logits"):
        heads.check_output_head(model)

    def generated(*given):
        return SimpleNamespace(logits=[on_apple(logits) for logits in generate(*given).logits])

    monkeypatch.setattr(decoding, "_generate", generated)
    assert not decoding.reads_padding(model, [5, 6, 7], 0)


def test_losses_and_measurements_on_an_apple_gpu_need_no_float64():
    losses = IntermediateLosses((), 4, 4, "dynamic", ())
    for divergence, extra in ((3.0, 1.0), (5.0, 3.0)):
        losses.add(on_apple(torch.tensor(divergence)), on_apple(torch.tensor(extra)))
    assert losses.next_weight(lambda sums: sums) == 2.0

    args = SimpleNamespace(kd_weight=1.0, ce_weight=0.0, temperature=1.0, divergence="reverse_kl")
    trainer = SimpleNamespace(_columns=("divergence", "ce"), args=args, _intermediate=None)
    means = TokenMeansMixin._loss_means(trainer, on_apple(torch.tensor([6.0, 8.0, 4.0])))
    assert means == {"loss": 1.5, "divergence": 1.5, "ce": 2.0}

    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(5, 11, generator=generator) for _ in range(2))
    for kept in (None, torch.arange(11)):
        expected = quality.token_divergences(logits, reference, kept)
        moved = None if kept is None else on_apple(kept)
        found = quality.token_divergences(on_apple(logits), on_apple(reference), moved)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    tokens = torch.arange(5)
    expected = quality.token_log_probabilities(logits, tokens)
    assert torch.equal(quality.token_log_probabilities(on_apple(logits), on_apple(tokens)), expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.either_cpu
def test_students_of_a_path_are_cut_from_what_is_stored(saved, stored):
    """Scales of norms included, whose product is rounded once."""
    request = PrunerConfig(hidden_size=24, intermediate_size=20, multiple_of=1)
    student = prune_model(saved[stored], request, calibration_data=TEXTS, max_length=16, verify=True)
    assert student.dtype == stored
    assert equal(student, apply_plan(load_model(saved[stored]), student.pruning_plan))


@pytest.mark.parametrize(("seen", "expected"), [(4, "cuda:3"), (1, "cuda:0")])
def test_each_of_several_processes_measures_on_its_own_gpu(monkeypatch, seen, expected):
    """The CPU, from which a trainer places models, is for those that a trainer gets."""
    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: seen)
    assert common_device({"teacher": "a path"}, None) == torch.device(expected)
    assert hardware.default_device() == torch.device("cpu")


# Figures


@pytest.mark.either_cpu
def test_figures_are_those_of_float32_and_speed_is_as_stored(saved, cpu_has_bf16):
    models = {"teacher": saved[torch.float32], "half": saved[torch.bfloat16]}
    options = {"processing_class": pocket_tokenizer(), "speed": False, "show_progress": False}
    found = evaluate_models(models, TEXTS, **options)
    assert found["dtype"] == "float32"
    assert found["settings"]["speed_dtypes"]["half"] == ("bfloat16" if cpu_has_bf16 else "float32")
    wanted = evaluate_models(models, TEXTS, dtype=torch.float32, **options)["models"]
    for name in models:
        assert found["models"][name]["metrics"] == wanted[name]["metrics"]
    # What is smaller than the rounding is measured, too.
    models["half"] = load_model(saved[torch.bfloat16])
    assert evaluate_models(models, TEXTS, **options)["models"]["half"]["metrics"] != wanted["half"]["metrics"]
    assert models["half"].dtype == torch.bfloat16


def test_models_are_restored_after_float32():
    model = pocket_model("llama", dtype=torch.bfloat16)
    model.model.norm.float()  # as classes that pin some weights
    kept = [(tensor.dtype, tensor.clone()) for tensor in (*model.parameters(), *model.buffers())]
    with in_float32([model]):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for (dtype, values), tensor in zip(kept, (*model.parameters(), *model.buffers()), strict=True):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, values)


@pytest.mark.either_cpu
def test_memory_within_a_budget_is_counted_as_stored(saved, cpu_has_bf16):
    """At half of what the teacher takes in float32, all of its shapes fit in bfloat16."""
    model = load_for_compute(saved[torch.bfloat16])
    assert (model.dtype == torch.bfloat16) == cpu_has_bf16
    limit = 2 * sum(parameter.numel() for parameter in model.parameters()) + 100_000
    found = search_architectures(
        model,
        estimate_importance(model, TEXTS, processing_class=pocket_tokenizer(), max_length=16, show_progress=False),
        space={"intermediate_size": [1.0]},
        calibration_data=TEXTS,
        processing_class=pocket_tokenizer(),
        max_memory_bytes=limit,
        context_length=1,
        tolerance=0.99,
        max_length=16,
        show_progress=False,
    )
    assert found.num_shapes == 1


# Trained models


def trained(folder, student, teacher, **arguments):
    rows = Dataset.from_dict({"input_ids": [pocket_tokens(12, seed=index).tolist() for index in range(8)]})
    settings = {"max_steps": 2, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "max_length": 12}
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(str(folder), disable_tqdm=True, **{**settings, **arguments}),
        train_dataset=rows,
        processing_class=pocket_tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.fixture
def models():
    teacher = pocket_model("llama", dtype=torch.float32)
    return prune_model(teacher, PrunerConfig(intermediate_size=20, multiple_of=1), metric="random"), teacher


def test_a_model_that_was_trained_in_half_precision_is_measured_in_float32(tmp_path, models):
    student, teacher = models
    model = trained(tmp_path, student, teacher, bf16=True).model
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    tokens = pocket_tokens(2, 9)
    with torch.no_grad():
        in_training = model(tokens).logits
        assert torch.equal(plain_model(model.eval())(tokens).logits, reloaded(tokens).logits)
        assert not torch.equal(in_training, reloaded(tokens).logits)
        assert torch.equal(model(tokens).logits, in_training)  # which stays as it was
    options = {"processing_class": pocket_tokenizer(), "speed": False, "show_progress": False}
    found = evaluate_models({"reloaded": reloaded, "live": model}, TEXTS, reference="reloaded", **options)["models"]
    assert found["live"]["metrics"]["loss"] == found["reloaded"]["metrics"]["loss"]
    assert found["live"]["metrics"]["kl_divergence"]["value"] == 0

    smaller = prune_model(model, PrunerConfig(intermediate_size=10, multiple_of=1), metric="random", verify=True)
    assert verify_student(model, smaller, smaller.pruning_plan) < 1e-5
    settings = {"metric": "taylor", "processing_class": pocket_tokenizer(), "max_length": 16, "show_progress": False}
    scores = [estimate_importance(one, TEXTS, **settings) for one in (model, reloaded)]
    assert scores[0].digest == scores[1].digest


@pytest.mark.parametrize("adapter", [False, True])
def test_training_in_float32_after_half_precision_is_in_float32(tmp_path, models, adapter):
    student, teacher = models
    if adapter:
        student.save_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        student = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["v_proj"])
        )
    first = trained(tmp_path / "first", student, teacher, bf16=True).model
    fresh = copy.deepcopy(plain_model(first))
    again, expected = (
        trained(tmp_path / name, one, teacher, bf16=False, seed=1)
        for name, one in (("again", first), ("fresh", fresh))
    )
    assert equal(again.model, expected.model)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (again, expected)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("bf16", [False, True])
def test_training_in_half_precision_after_another_training_is_in_half_precision(tmp_path, models, bf16):
    student, teacher = models
    first = trained(tmp_path / "first", student, teacher, bf16=bf16).model
    first.save_pretrained(tmp_path / "saved")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    again, expected = (trained(tmp_path / "second", one, teacher, bf16=True, seed=1).model for one in (first, fresh))
    assert equal(again, expected)
    tokens = pocket_tokens(2, 9)
    with torch.no_grad():
        half, plain = again(tokens).logits, plain_model(again)(tokens).logits
        assert not torch.equal(half, plain)
        forget_preparation(again)
        assert torch.equal(again(tokens).logits, plain)


@pytest.mark.either_cpu
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16])
def test_a_student_of_a_path_is_trained_in_the_dtype_of_one_in_memory(tmp_path, saved, models, dtype):
    given = {"torch_dtype" if dtype == "bfloat16" else "dtype": dtype}
    half = torch.bfloat16 if hardware.has_fast_bf16("cpu") else torch.float32
    for upcast in (True, False):
        in_memory = AutoModelForCausalLM.from_pretrained(saved[torch.bfloat16])
        found = [
            DistillationTrainer(
                model=one,
                teacher_model=models[1],
                args=DistillationConfig(
                    str(tmp_path), report_to="none", upcast_student=upcast, model_init_kwargs=kwargs, use_cpu=True
                ),
                train_dataset=Dataset.from_dict({"input_ids": [[4, 5, 6]]}),
                processing_class=pocket_tokenizer(),
            ).model.dtype
            for one, kwargs in ((in_memory, None), (str(saved[torch.bfloat16]), given))
        ]
        assert found[0] == found[1] == (torch.float32 if upcast else half)


@pytest.mark.either_cpu
@pytest.mark.parametrize("given", [{}, {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}])
def test_a_teacher_of_a_path_follows_the_policy(tmp_path, saved, models, given, cpu_has_bf16):
    trainer = DistillationTrainer(
        model=models[0],
        teacher_model=str(saved[torch.bfloat16]),
        args=DistillationConfig(
            str(tmp_path), report_to="none", teacher_model_init_kwargs=given or None, use_cpu=True
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[4, 5, 6]]}),
        processing_class=pocket_tokenizer(),
    )
    assert trainer.teacher_model.dtype == (torch.bfloat16 if given or cpu_has_bf16 else torch.float32)
    assert trainer.args.bf16 == cpu_has_bf16


# Every way in


@pytest.fixture(scope="module")
def stages(saved, tmp_path_factory):
    """A folder with scores, a plan and text, for the commands."""
    folder = tmp_path_factory.mktemp("stages")
    teacher = load_model(saved[torch.float32])
    scores = estimate_importance(teacher, metric="random")
    scores.save_pretrained(folder)
    make_plan(teacher, PrunerConfig(intermediate_size=20, multiple_of=1), scores).save_pretrained(folder)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("score", ["--data", "text.jsonl"]),
        (
            "search",
            ["--scores", ".", "--space", "intermediate_size=[0.5]", "--data=text.jsonl", "--max-parameters=1M"],
        ),
        ("prune", ["--plan", ".", "--verify"]),
        ("plan", ["--scores", ".", "--target", "0.5", "--data", "text.jsonl"]),
        ("cache", ["--data", "text.jsonl"]),
        ("generate", ["--prompts", "text.jsonl"]),
        ("distill", ["--train-data", "text.jsonl"]),
        ("evaluate", ["--data", "text.jsonl"]),
        ("prune_model", []),
    ],
)
def test_every_way_in_follows_the_policy(saved, stages, monkeypatch, tmp_path, command, options):
    asked = []

    def refuse(*_):
        asked.append(command)
        raise DataError("the policy was asked")

    monkeypatch.setattr("minitron_hf.models.make_fast", refuse)
    monkeypatch.chdir(stages)
    teacher = str(saved[torch.float32])
    if command == "prune_model":
        with pytest.raises(DataError, match="the policy was asked"):
            prune_model(teacher, PrunerConfig(intermediate_size=20, multiple_of=1), metric="random")
        return
    name = f"teacher={teacher}" if command == "evaluate" else teacher
    if command == "distill":
        options = [*options, "--teacher", teacher]
        monkeypatch.setattr("minitron_hf.distillation.teacher.make_fast", refuse)
    result = minitron(command, name, *options, "--output", tmp_path / "out")
    assert asked == [command], result.stderr
    refused(result, "the policy was asked")
    if command in ("score", "search", "prune"):
        result = minitron(command, name, *options, "--output", tmp_path / "out", "--device", "cuda:99")
        refused(result, "--device cuda:99: there is no such device here")
