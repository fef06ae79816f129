"""On a GPU: scores and losses are those of the CPU, and students train with the attention and compilers of a GPU.

`MINITRON_GPU_TESTS=cpu` runs them on the CPU, which checks the tests themselves.
"""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    estimate_importance,
    make_plan,
    prune_checkpoint,
    prune_model,
)
from minitron_hf.data import TokenRows
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.evaluation.speed import checkpoint_bytes
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import OutputHead
from minitron_hf.losses.signals import DenseSignal
from minitron_hf.pruning.stored_checkpoint import WEIGHTS_NAME as WEIGHTS
from minitron_hf.quantization import quantize_checkpoint
from pocket import pocket_model, pocket_tokenizer, pocket_tokens

pytestmark = pytest.mark.gpu
ROWS = pocket_tokens(16, 24).tolist()


@pytest.fixture
def device() -> str:
    named = os.environ.get("MINITRON_GPU_TESTS", "cuda")
    if named == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return named


@pytest.mark.parametrize("metric", ["activation", "contribution", "taylor"])
def test_scores_are_those_of_the_cpu(device, metric):
    here, there = (
        estimate_importance(
            pocket_model("llama", dtype=torch.float32).to(place), ROWS, metric=metric, show_progress=False
        ).tensors
        for place in ("cpu", device)
    )
    assert here.keys() == there.keys()
    for name, values in here.items():
        torch.testing.assert_close(there[name].cpu(), values, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_a_streamed_repair_is_that_of_the_cpu(device, tmp_path):
    """Layers are read onto the GPU one by one; their inputs wait in main memory."""
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    request = PrunerConfig(
        hidden_size=0.5, intermediate_size=0.5, layers_to_drop=[1], repair="least_squares_all", multiple_of=1
    )
    plan = make_plan(teacher, request, estimate_importance(teacher, metric="random"))
    arguments = {"data": TokenRows(tuple(map(tuple, ROWS)), None), "ridge": 1e-2, "show_progress": False}
    here, there = (
        load_file(prune_checkpoint(tmp_path / "teacher", tmp_path / where, plan, device=place, **arguments) / WEIGHTS)
        for where, place in (("here", "cpu"), ("there", device))
    )
    for name, values in here.items():
        torch.testing.assert_close(there[name], values, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", [{"top_k": 8}, {"num_draws": 8}])
@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "max_length": None}])
def test_teacher_caches_have_the_tokens_of_the_cpu(device, kind, layout, tmp_path):
    """Rows of unequal length: every row has the teacher's distributions at its own tokens."""
    data = Dataset.from_dict({"input_ids": [row[:length] for row, length in zip(ROWS, [24, 7, 15, 3] * 4)]})
    found = []
    for place, use_cpu in (("here", True), ("there", device == "cpu")):
        settings = {"max_length": 24, "report_to": "none", "bf16": False, "use_cpu": use_cpu, **layout}
        cache_teacher_logits(
            pocket_model("llama", dtype=torch.float32),
            data,
            tmp_path / place,
            args=DistillationConfig(str(tmp_path / place), **settings),
            processing_class=pocket_tokenizer(),
            dtype="float32",
            show_progress=False,
            **kind,
        )
        found.append(load_teacher_cache(tmp_path / place).dataset)
    for here, there in zip(*found, strict=True):
        for row in (here, there):
            row.update({name: torch.as_tensor(values) for name, values in row.items()})
        assert torch.equal(there["input_ids"], here["input_ids"])
        if "top_k" in kind:
            torch.testing.assert_close(there["teacher_log_probs"], here["teacher_log_probs"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_losses_and_gradients_are_those_of_the_cpu(device, divergence, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, t_hidden, t_weight = (
        torch.randn(shape, generator=generator) / 4 for shape in ((64, 32), (512, 32), (64, 48), (512, 48))
    )
    labels = torch.randint(512, (64,), generator=generator)

    def run(place: str, kind: torch.dtype) -> tuple[float, torch.Tensor]:
        states = hidden.detach().clone().to(place, kind).requires_grad_()
        teacher = DenseSignal(t_hidden.to(place, kind), OutputHead(t_weight.to(place, kind)))
        losses = distillation_loss(
            states, OutputHead(weight.to(place, kind)), teacher, labels.to(place), divergence=divergence
        )
        losses.total.sum().backward()
        return losses.total.sum().item(), states.grad.float().cpu()

    expected, found = run("cpu", torch.float32), run(device, dtype)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    error = (found[1] - expected[1]).norm() / expected[1].norm()
    assert error < tolerance


@pytest.mark.parametrize("way", ["eager", "sdpa", "flash_attention_2", "torch_compile", "kernels"])
def test_students_train_in_every_way_that_the_gpu_offers(device, way, tmp_path):
    """Flash attention, `torch.compile` and Liger's layer kernels: four steps, and the loss of the plain way."""
    if way == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    if way == "kernels" and importlib.util.find_spec("kernels") is None:
        pytest.skip("the kernels library is not installed")
    losses = {}
    for name in ("eager", way):
        teacher = pocket_model("llama", dtype=torch.float32)
        student = prune_model(teacher, PrunerConfig(intermediate_size=0.5), calibration_data=ROWS, show_progress=False)
        folder = tmp_path / name
        student.save_pretrained(folder / "start")
        settings = {"attn_implementation": name} if name not in ("torch_compile", "kernels") else {}
        settings |= {"use_kernels": True} if name == "kernels" else {}
        trainer = DistillationTrainer(
            model=str(folder / "start"),
            teacher_model=teacher,
            args=DistillationConfig(
                str(folder),
                max_steps=4,
                per_device_train_batch_size=4,
                max_length=24,
                torch_compile=name == "torch_compile",
                model_init_kwargs=settings,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=device == "cpu",
            ),
            train_dataset=Dataset.from_dict({"input_ids": ROWS}),
            processing_class=pocket_tokenizer(),
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[way]) == 4
    assert all(map(math.isfinite, losses[way]))
    assert losses[way] == pytest.approx(losses["eager"], rel=2e-2)


def asymmetric(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Rounding to 16 levels between the least and the largest weight of every group of a row's inputs."""
    groups = weight.float().reshape(len(weight), -1, group)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (most - least) / 15
    return (((groups - least) / step).round() * step + least).reshape(weight.shape)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantised_copies_of_a_gpu_have_the_values_of_the_rounding_by_hand(device, method, tmp_path):
    """Four bits are packed on a GPU: two weights a byte. Stock Transformers loads them and generates."""
    pytest.importorskip("torchao")
    if device == "cpu" and method == "int4":
        pytest.skip("four bits are packed on a GPU alone")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = pocket_model("llama", dtype=torch.bfloat16, **sizes, head_dim=128, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "student")
    pocket_tokenizer().save_pretrained(tmp_path / "student")
    quantize_checkpoint(tmp_path / "student", tmp_path / method, method, device=device)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / method, device_map=device)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.detach().float()
            one = torch.eye(weight.shape[1], dtype=loaded.dtype, device=device)
            with torch.no_grad():
                found = loaded.get_submodule(name)(one).T.float().cpu()
            if method == "int4":
                assert (found - asymmetric(weight, 128)).norm() < 0.1 * (found - weight).norm() + 0.01 * weight.norm()
                assert all(len(group.unique()) <= 16 for group in found[:8].reshape(-1, 128))
            else:
                step = weight.abs().amax(-1, keepdim=True) / 127
                assert ((found - weight).abs() <= 0.51 * step + 0.01 * weight.abs()).all()
    share = checkpoint_bytes(tmp_path / method) / checkpoint_bytes(tmp_path / "student")
    assert share < {"int8": 0.6, "int4": 0.35}[method]
    tokens = pocket_tokens(2, 8).to(device)
    with torch.no_grad():
        expected, found = (one.to(device)(tokens).logits.float().cpu() for one in (model, loaded))
    assert (found - expected).norm() < {"int8": 0.05, "int4": 0.5}[method] * expected.norm()
    assert loaded.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 12)
