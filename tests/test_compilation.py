"""`torch_compile` compiles layers, and the losses stay those of the plain run."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from torch import nn

from minitron_hf import DistillationConfig, DistillationTrainer, PrunerConfig, prune_model
from minitron_hf.distillation.compilation import compile_layers
from pocket import pocket_model, pocket_tokenizer, pocket_tokens

ROWS = pocket_tokens(8, 24).tolist()


@pytest.fixture
def compiled(monkeypatch):
    """Names of the classes whose modules are compiled; everything else that compiles fails."""
    names: list[str] = []
    stock = nn.Module.compile

    def compile(module, *args, **kwargs):
        names.append(type(module).__name__)
        stock(module, *args, **kwargs)

    def compile_whole(model, *args, **kwargs):
        raise AssertionError(f"{type(model).__name__} is compiled as a whole")

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr("accelerate.accelerator.torch.compile", _only_methods(torch.compile, compile_whole))
    return names


def _only_methods(stock, refuse):
    """`nn.Module.compile` compiles a method by `torch.compile`; a module given to it is compiled as a whole."""
    return lambda what=None, *args, **kwargs: (refuse if isinstance(what, nn.Module) else stock)(what, *args, **kwargs)


def losses(folder, *, lengths=None, **settings) -> list[float]:
    teacher = pocket_model("llama", dtype=torch.float32)
    student = prune_model(
        teacher,
        PrunerConfig(num_hidden_layers=2, intermediate_size=0.5),
        calibration_data=ROWS,
        show_progress=False,
    )
    rows = [row[: lengths[index % len(lengths)]] if lengths else row for index, row in enumerate(ROWS)]
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=2,
            max_length=24,
            logging_steps=1,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=4,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": ROWS[:3]}),
        processing_class=pocket_tokenizer(),
    )
    trainer.train()
    names = ("loss", "eval_loss")
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [None, [24, 17, 9, 21]])
def test_compiled_layers_train_alike(compiled, tmp_path, lengths):
    """Both models, by the layers alone; also where rows have different lengths. Names of saved tensors stay."""
    plain = losses(tmp_path / "plain", lengths=lengths)
    assert compiled == []
    found = losses(tmp_path / "compiled", lengths=lengths, torch_compile_backend="aot_eager")
    teacher = pocket_model("llama").config.num_hidden_layers
    assert compiled == ["LlamaDecoderLayer"] * (2 + teacher)
    assert found == pytest.approx(plain, rel=1e-5)
    assert len(found) == 5


@pytest.mark.slow
def test_the_default_compiler_trains_alike(tmp_path):
    found = losses(tmp_path / "compiled", torch_compile=True)
    assert all(map(math.isfinite, found))
    assert found == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_names_of_tensors_stay():
    model = pocket_model("llama")
    names = list(model.state_dict())
    assert compile_layers(model, "student", backend="eager", mode=None) == model.config.num_hidden_layers
    assert list(model.state_dict()) == names


def test_what_cannot_be_compiled_runs_as_it_is(caplog):
    moved = cpu_offload(pocket_model("llama"), execution_device=torch.device("cpu"))
    assert compile_layers(moved, "teacher", backend="eager", mode=None) == 0
    assert "moved to a device" in caplog.text
    nameless = pocket_model("llama")
    nameless._no_split_modules = None
    assert compile_layers(nameless, "teacher", backend="eager", mode=None) == 0
    assert "does not say what its layers are" in caplog.text
