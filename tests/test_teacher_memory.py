"""Teachers that take less memory: kept in main memory, or quantised."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.parallel import offload_layers
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import UnsupportedModelError
from minitron_hf.losses.heads import output_head
from pocket import pocket_model, pocket_tokenizer, pocket_tokens


def distilled(folder, teacher, **arguments):
    """Losses of a few steps, and the trainer."""
    rows = Dataset.from_dict({"input_ids": [pocket_tokens(20, seed=seed).tolist() for seed in range(8)]})
    trainer = DistillationTrainer(
        pocket_model("llama", dtype=torch.float32, seed=1),
        teacher,
        args=DistillationConfig(
            str(folder),
            max_steps=3,
            logging_steps=1,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            hidden_loss="cosine",
            **arguments,
        ),
        train_dataset=rows,
        processing_class=pocket_tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry], trainer


def test_an_offloaded_teacher_says_the_same(tmp_path):
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    expected, _ = distilled(tmp_path, str(tmp_path / "teacher"))
    found, trainer = distilled(tmp_path, str(tmp_path / "teacher"), teacher_offload=True)
    assert found == expected
    # What is left at hand is what the README says: head, embeddings and final norm.
    at_hand = {name for name, weight in trainer.teacher_model.named_parameters() if not weight.is_meta}
    assert at_hand == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_tied_heads_stay_tied_where_layers_are_offloaded():
    teacher = pocket_model("gemma2", dtype=torch.float32)
    tokens = pocket_tokens(2, 9)
    expected = teacher(tokens).logits
    offload_layers(teacher, torch.device("cpu"))
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert not teacher.lm_head.weight.is_meta
    torch.testing.assert_close(teacher(tokens).logits, expected)


def test_offloading_is_refused_where_it_cannot_be(tmp_path):
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        offload_layers(teacher, torch.device("cpu"))
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher._no_split_modules = None
    with pytest.raises(UnsupportedModelError, match="_no_split_modules"):
        offload_layers(teacher, torch.device("cpu"))
    with pytest.raises(ValueError, match="teacher_offload"):
        DistillationConfig(
            str(tmp_path),
            teacher_offload=True,
            teacher_correction="concurrent",
            teacher_original_learning_rate=1e-3,
        )


def test_a_quantised_head_is_refused_by_name():
    teacher = pocket_model("llama", dtype=torch.float32).requires_grad_(False)
    teacher.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 36, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="modules_to_not_convert"):
        output_head(teacher)


def test_missing_libraries_of_quantisation_are_named(tmp_path):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        from transformers import BitsAndBytesConfig

        pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
        kwargs = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        with pytest.raises(UnsupportedModelError, match="bitsandbytes"):
            distilled(tmp_path, str(tmp_path / "teacher"), teacher_model_init_kwargs=kwargs)
    else:
        pytest.skip("bitsandbytes is installed")


def test_a_quantised_teacher_is_learnt_from(tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    plain, _ = distilled(tmp_path, str(tmp_path / "teacher"))
    kwargs = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    found, trainer = distilled(tmp_path, str(tmp_path / "teacher"), teacher_model_init_kwargs=kwargs)
    assert found == pytest.approx(plain, rel=0.02)
    assert found != plain
    layers = [weight for name, weight in trainer.teacher_model.named_parameters() if "_proj" in name]
    assert all("torchao" in type(weight.data).__module__ for weight in layers)

    # The head too: refused.
    everything = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["nothing"])
    with pytest.raises(UnsupportedModelError, match="output head"):
        distilled(tmp_path, str(tmp_path / "teacher"), teacher_model_init_kwargs={"quantization_config": everything})
