"""Teacher correction, before and during distillation, against naive gradients and uninterrupted runs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from minitron_hf.distillation.correction import (
    average_gradients,
    correct_teacher,
    cross_entropy_sum,
    train_norms_only,
)
from minitron_hf.errors import MismatchError, UnsupportedModelError
from minitron_hf.files import read_json
from minitron_hf.losses.heads import OutputHead
from pocket import POCKETS, pocket_model, pocket_tokenizer
from test_trainer import Gradients, float64, make_trainer, models, naive_sums, text_dataset, token_dataset  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RATE = {"teacher_correction": "concurrent", "teacher_original_learning_rate": 5e-2}


def correct(teacher, folder, method="full", **arguments):
    arguments = {"disable_tqdm": True, "per_device_train_batch_size": 4, "save_strategy": "no", **arguments}
    tokenizer = pocket_tokenizer()
    return correct_teacher(
        *(teacher, text_dataset(), folder),
        original_learning_rate=arguments.pop("original_learning_rate", 5e-2),
        num_tokens=1000,
        method=method,
        processing_class=tokenizer,
        max_length=16,
        **arguments,
    )


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
def test_the_corrected_teacher_knows_the_corpus_and_is_stock(tmp_path, method):
    teacher = pocket_model("llama", dtype=torch.bfloat16)
    before = copy.deepcopy(teacher).float().state_dict()
    folder = correct(teacher, tmp_path, method, logging_steps=1)
    record = read_json(folder / "teacher_correction.json")
    assert record["learning_rate"] == pytest.approx(1e-2)
    assert record["num_tokens"] == 16 * 64  # 1,000 tokens take 16 steps of 4 rows of 16
    losses = [entry["loss"] for entry in record["log_history"] if "loss" in entry]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[:4])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert type(loaded) is type(teacher)
    changed = {name for name, value in loaded.float().state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name in before if "norm" in name}
    assert changed
    if method == "norms":
        assert changed <= norms
    else:
        assert any("q_proj" in name for name in changed)
        assert (changed & norms == set()) == (method == "lora")
    assert pocket_tokenizer().get_vocab() == type(pocket_tokenizer()).from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("name", ["llama", "qwen3-biases-tied", "gpt2", "glm4"])
def test_norms_alone_are_trained(name):
    model = pocket_model(name)
    train_norms_only(model)
    expected = {
        f"{path}.{parameter}"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for parameter, _ in module.named_parameters(recurse=False)
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected != set()


def test_norms_without_weights_cannot_be_trained_alone():
    assert POCKETS["olmo"].norm == "layer"
    with pytest.raises(UnsupportedModelError, match="The norms of 'olmo' models have no weights"):
        train_norms_only(pocket_model("olmo"))


@pytest.mark.parametrize("wrong", [{"method": "some"}, {"original_learning_rate": 0}])
def test_what_makes_no_sense_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected"):
        correct(pocket_model("llama"), tmp_path, **wrong)
    with pytest.raises(ValueError, match="needs the peak learning rate"):
        make_trainer(tmp_path, *models(dtype=torch.float32), token_dataset(), teacher_correction="concurrent")


def test_cross_entropy_in_chunks_is_that_of_all_logits(monkeypatch):
    monkeypatch.setattr("minitron_hf.distillation.correction.default_chunk_size", lambda *_: 5)
    hidden = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(29, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(29, (13,))
    found = cross_entropy_sum(hidden, OutputHead(weight, scale=0.7, softcap=3.0), labels)
    logits = 3 * torch.tanh(0.7 * hidden @ weight.T / 3)
    expected = -torch.log_softmax(logits, -1)[torch.arange(13), labels].sum()
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert cross_entropy_sum(hidden[:0], OutputHead(weight), labels[:0]).item() == 0


class TeacherGradients(TrainerCallback):
    def __init__(self, teacher):
        self.teacher, self.values = teacher, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.values is None:
            self.values = {name: p.grad.clone() for name, p in self.teacher.named_parameters()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("states", [{}, {"hidden_loss": "cosine"}], ids=["logits", "states"])
def test_a_teacher_that_learns_on_has_the_naive_gradient(tmp_path, batch, accumulation, states, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "float", lambda self: self)  # the naive side is in float64
    student, teacher = models()
    data = token_dataset(labels=True)
    kl, _, _, count = naive_sums(student, teacher, data)
    expected_student = torch.autograd.grad(kl / count, list(student.parameters()))
    _, ce, _, _ = naive_sums(teacher, teacher, data)
    expected_teacher = torch.autograd.grad(ce / count, list(teacher.parameters()))
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    mine, theirs = Gradients(), TeacherGradients(teacher)
    options = {"max_steps": 2, "max_grad_norm": 0, "intermediate_weight": 0.0, **RATE, **states}
    trainer = make_trainer(
        *(tmp_path, student, teacher, data),
        callbacks=[mine, theirs],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    trainer.train()
    for found, expected in zip(mine.values.values(), expected_student, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for found, expected in zip(theirs.values.values(), expected_teacher, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    # AdamW's first step has the size of the learning rate, a fifth of the original one.
    name = "model.layers.0.mlp.up_proj.weight"
    steps = (dict(teacher.named_parameters())[name] - before[name]).abs()
    assert steps.max() < 2.01 * 1e-2
    assert steps.median() > 1e-3


def test_a_process_whose_batch_has_no_images_averages_the_same_gradients(monkeypatch):
    """Two processes, of which the other one is played: each has gradients that the other lacks, and one has none."""
    mine, others = [1.0, None, 3.0, None], [5.0, 7.0, None, None]
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in mine]
    for parameter, value in zip(parameters, mine, strict=True):
        parameter.grad = None if value is None else torch.full((2,), value)
    sent = [torch.tensor([value is not None for value in others], dtype=torch.int32)]
    sent += [torch.full((2,), value or 0.0) for value in (5.0, 7.0, None)]  # as the other process sums them, in turn
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(sent.pop(0)))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    average_gradients(parameters)
    assert not sent
    assert [None if one.grad is None else one.grad.tolist() for one in parameters] == [
        [3, 3],
        [3.5, 3.5],
        [1.5, 1.5],
        None,
    ]


def test_a_teacher_that_learns_on_resumes_where_it_was(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, **RATE}
    results = []
    for name in ("whole", "resumed"):
        student, teacher = models(dtype=torch.float32)
        if name == "resumed":
            copies = copy.deepcopy(student), copy.deepcopy(teacher)
            make_trainer(tmp_path / name, *copies, text_dataset(), callbacks=[Stop()], **options).train()
        trainer = make_trainer(tmp_path / name, student, teacher, text_dataset(), **options)
        trainer.train(resume_from_checkpoint=name == "resumed")
        results.append((student.state_dict(), teacher.state_dict()))
    for one, other in zip(*results, strict=True):
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
    student, teacher = models(dtype=torch.float32)
    without = {name: value for name, value in options.items() if name not in RATE}
    make_trainer(tmp_path / "without", *models(dtype=torch.float32), text_dataset(), **without).train()
    trainer = make_trainer(tmp_path / "without", student, teacher, text_dataset(), **{**options, "max_steps": 8})
    with pytest.raises(MismatchError, match="has no corrected teacher"):
        trainer.train(resume_from_checkpoint=True)
