"""Tests an installed package outside its repository: prunes and distils a tiny model, and renders its card."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import minitron_hf
from minitron_hf import DistillationConfig, DistillationTrainer, PrunerConfig, evaluate_models, prune_model, token_rows

VOCABULARY, LENGTH = 64, 16


def main() -> None:
    """Run the path once; anything missing from the wheel raises."""
    for name in minitron_hf.__all__:
        getattr(minitron_hf, name)
    command = Path(sys.executable).parent / "minitron-hf"
    subprocess.run([command, "families", "llama"], check=True, capture_output=True)
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        found = subprocess.run([command, "accelerate-config", name], check=True, capture_output=True, text=True)
        assert Path(found.stdout.strip()).is_file(), found.stdout
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    tokens = torch.randint(VOCABULARY, (16, LENGTH)).tolist()
    student = prune_model(teacher, PrunerConfig(intermediate_size=0.5), calibration_data=tokens, max_length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(folder, max_steps=2, max_length=LENGTH, report_to="none", bf16=False),
            train_dataset=Dataset.from_dict({"input_ids": tokens}),
            processing_class=_tokenizer(),
        )
        trainer.train()
        trainer.save_student()
        evaluate_models(
            {"teacher": teacher, "student": trainer.model},
            token_rows(tokens, max_length=LENGTH),
            output_path=folder,
            speed=False,
        )
        trainer.create_model_card()
        assert (Path(folder) / "README.md").is_file()
        AutoModelForCausalLM.from_pretrained(folder)
    print(f"minitron-hf {minitron_hf.__version__}: pruned, distilled, measured, card written")


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t1", pad_token="t2"
    )


if __name__ == "__main__":
    main()
