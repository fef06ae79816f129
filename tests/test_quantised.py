"""Quantised models: as teachers, measured, as bases of adapters; and refused where plain weights are needed."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.quantization_config import GgufConfig

from minitron_hf.distillation.adapters import merged_copy
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.errors import UnsupportedModelError
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.pruning.prune import prune_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.weights import plain_tensor, stored_bytes
from pocket import pocket_model, pocket_tokenizer, pocket_tokens
from test_trainer import make_trainer, models, text_dataset, token_dataset


class Halves(nn.Linear):
    """A linear layer as quantisers keep it: its weight is in other hands, and what it is called with is another."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False, dtype=plain.weight.dtype)
        self.W_q = (plain.weight.detach() * 8).round()  # as HQQ names it
        with torch.no_grad():
            self.weight.fill_(torch.nan)

    def dequantize(self):
        return self.W_q / 8

    def forward(self, x):
        return x @ self.dequantize().T


def quantised(model):
    """A copy with quantised projections, and their values as a plain model."""
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj = Halves(layer.self_attn.v_proj)
    for layer, source in zip(plain.model.layers, model.model.layers, strict=True):
        layer.self_attn.v_proj.weight.data.copy_(source.self_attn.v_proj.dequantize())
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "hqq"}
    return model, plain


def test_an_adapter_is_merged_into_the_weights_that_it_was_trained_on():
    model, plain = quantised(pocket_model("llama", dtype=torch.float64))
    config = LoraConfig(target_modules=["v_proj", "down_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    tokens = pocket_tokens(2, 9)
    expected = adapted.eval()(input_ids=tokens).logits
    student = merged_copy(adapted)
    assert type(student) is type(plain)
    assert not hasattr(student.config, "quantization_config")
    assert not torch.allclose(expected, plain(input_ids=tokens).logits)
    plain.load_state_dict(student.state_dict())
    torch.testing.assert_close(plain(input_ids=tokens).logits, expected)


def test_plain_weights_are_asked_for_by_name(tmp_path):
    model = pocket_model("llama", dtype=torch.float32)
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        prune_model(model, PrunerConfig(layers_to_drop=[1]))
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        estimate_importance(model, pocket_tokens(4, 9).tolist(), show_progress=False)
    options = {"original_learning_rate": 1e-3, "num_tokens": 9, "processing_class": pocket_tokenizer()}
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        correct_teacher(model, text_dataset(), tmp_path, method="lora", **options)
    adapted = get_peft_model(pocket_model("llama", dtype=torch.float32), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(UnsupportedModelError, match="has an adapter"):
        correct_teacher(adapted, text_dataset(), tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_a_quantised_teacher_is_cached(tmp_path):
    _, teacher = models(dtype=torch.float32)
    args = DistillationConfig(str(tmp_path), report_to="none", bf16=False)
    options = {"top_k": 8, "args": args, "processing_class": pocket_tokenizer()}
    plain = load_from_disk(cache_teacher_logits(teacher, token_dataset(), tmp_path / "plain", **options))
    teacher.is_quantized = True
    cached = load_from_disk(cache_teacher_logits(teacher, token_dataset(), tmp_path / "quantised", **options))
    assert teacher.is_quantized
    for one, two in zip(plain, cached, strict=True):
        assert {k: list(v) for k, v in one.items()} == {k: list(v) for k, v in two.items()}


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_arguments_are_json_with_configs_of_quantisation(tmp_path, name):
    """TensorBoard and others store the arguments as JSON."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    args = DistillationConfig(str(tmp_path), **{name: {"quantization_config": config, "dtype": torch.bfloat16}})
    written = json.loads(args.to_json_string())[name]
    assert written["dtype"] == "bfloat16"
    assert written["quantization_config"]["load_in_8bit"] is True
    assert getattr(args, name) == {"quantization_config": config, "dtype": torch.bfloat16}  # and stay as they are


# ---- GGUF ----


def from_gguf(name="llama"):
    """As `from_pretrained(folder, gguf_file=…)` returns a model that it has dequantised."""
    model = pocket_model(name, dtype=torch.float32)
    config = GgufConfig()
    model.is_quantized, model.config.quantization_config = True, config
    model.hf_quantizer = SimpleNamespace(quantization_config=config, is_serializable=lambda: False)
    return model


def test_a_dequantised_model_of_gguf_is_a_plain_one(tmp_path):
    model = from_gguf()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "teacher")
    scores = estimate_importance(model, pocket_tokens(4, 9).tolist(), max_length=9, show_progress=False)
    student = prune_model(model, PrunerConfig(layers_to_drop=[1]), scores=scores)
    student.save_pretrained(tmp_path / "student")
    assert "quantization_config" not in json.loads((tmp_path / "student" / "config.json").read_text())
    trainer = make_trainer(tmp_path / "run", from_gguf(), from_gguf(), token_dataset(), max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_student(tmp_path / "saved")
    for folder in ("run", "saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    options = {"original_learning_rate": 1e-3, "num_tokens": 9, "max_length": 9}
    options["processing_class"] = pocket_tokenizer()
    corrected = correct_teacher(from_gguf(), text_dataset(), tmp_path / "corrected", bf16=False, **options)
    AutoModelForCausalLM.from_pretrained(corrected)
    assert model.is_quantized
    assert model.config.quantization_config


# ---- With torchao, where it is installed ----


@pytest.fixture
def int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    def load(folder):
        config = TorchAoConfig(Int8WeightOnlyConfig())
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

    return load


def test_torchao_models_are_measured(tmp_path, int8):
    model = pocket_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    model = int8(tmp_path)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert plain_tensor(weight).shape == weight.shape
    assert weight.numel() <= stored_bytes(weight) < 2 * weight.numel()
    rows = pocket_tokens(4, 9).tolist()
    found = evaluate_models({"teacher": str(tmp_path), "int8": model}, rows, speed=False, show_progress=False)
    assert 0 < found["models"]["int8"]["metrics"]["kl_divergence"]["value"] < 0.1
    assert found["models"]["int8"]["digest"].startswith("sha256:")


def test_a_torchao_student_is_saved_as_it_was_trained(tmp_path, int8):
    student, teacher = models(dtype=torch.float32)
    student.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["v_proj", "up_proj"], r=2, init_lora_weights=False)
    options = {"peft_config": config, "max_steps": 1, "bf16": False}
    trainer = make_trainer(tmp_path / "run", int8(tmp_path / "base"), teacher, token_dataset(), **options)
    trainer.train()
    trainer.save_student(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokens = pocket_tokens(2, 9)
    torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits, rtol=1e-3, atol=1e-3)
