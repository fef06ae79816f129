"""Packed rows: documents that see each other are refused, for every family and every kind of packing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.distillation.packing import try_packing
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import MismatchError, UnsupportedModelError
from pocket import POCKETS, float64_throughout, pocket_model, pocket_tokenizer, pocket_tokens

COLLATOR = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
SAMPLE = [
    "llama",
    "gpt2",
    "gpt_neo",
    "opt",
    "bloom",
    "mpt",
    "falcon-rw",
    "biogpt",
    "xglm",
    "gpt_oss",
    "mamba2",
    "jamba",
]


def keeps_apart(name: str) -> bool:
    """The oracle: the second of two packed documents, against the same document alone."""
    model = pocket_model(name)
    ids, second = pocket_tokens(11).tolist(), pocket_tokens(11).tolist()[4:]
    batch = COLLATOR([{"input_ids": ids, "labels": ids, "seq_lengths": [4, 7]}])
    del batch["labels"]
    try:
        with torch.no_grad(), float64_throughout():
            packed = model.base_model(**batch, use_cache=False)[0][0, 4:]
            alone = model.base_model(input_ids=torch.tensor([second]), use_cache=False)[0][0]
    except (ValueError, TypeError, RuntimeError):
        return False
    return torch.allclose(packed, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in POCKETS]
)
def test_models_whose_packed_documents_see_each_other_are_refused(name: str):
    model = pocket_model(name, dtype=torch.float32)
    if getattr(model.config, "index_topk", None) is not None:
        pytest.skip("an indexer of few heads scores many tokens 0, and which of them topk takes depends on the length")
    if keeps_apart(name):
        try_packing(model, COLLATOR, "student", contextlib.nullcontext)
    else:
        with pytest.raises(UnsupportedModelError, match=r"The student, a \w+ with .*packing=False"):
            try_packing(model, COLLATOR, "student", contextlib.nullcontext)


def test_every_way_of_packing_is_checked_and_the_named_settings_work(tmp_path):
    data = Dataset.from_dict({"text": ["Once upon a time.", "It read.", "The end of the story."]})
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False, "max_length": 32}

    def distil(**how):
        models = pocket_model("opt", dtype=torch.float32, seed=1), pocket_model("opt", dtype=torch.float32)
        args = DistillationConfig(str(tmp_path / "run"), max_steps=1, **settings, **how)
        return DistillationTrainer(*models, args, train_dataset=data, processing_class=pocket_tokenizer())

    for how in ({"packing": True}, {"packing": True, "packing_strategy": "bfd_split"}):
        with pytest.raises(UnsupportedModelError, match="The student, a OPTForCausalLM"):
            distil(**how)
        with pytest.raises(UnsupportedModelError, match="The teacher, a OPTForCausalLM"):
            cache_teacher_logits(
                pocket_model("opt", dtype=torch.float32),
                data,
                tmp_path / "cache",
                top_k=4,
                args=DistillationConfig(str(tmp_path / "run"), **settings, **how),
                processing_class=pocket_tokenizer(),
            )
    with pytest.raises(UnsupportedModelError, match="The teacher, a OPTForCausalLM"):
        correct_teacher(
            pocket_model("opt", dtype=torch.float32),
            data,
            tmp_path / "corrected",
            original_learning_rate=1e-3,
            num_tokens=64,
            max_length=32,
            packing_strategy="bfd",
            processing_class=pocket_tokenizer(),
        )
    with pytest.raises(MismatchError, match="eval_packing=True without packing=True"):
        distil(packing=False, eval_packing=True)
    distil(packing=False).train()
    distil(packing=True, packing_strategy="wrapped").train()
