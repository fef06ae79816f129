"""Adapters (PEFT) on teachers and students: what is refused, trained in float32, merged and compared."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from minitron_hf.distillation.adapters import merged_copy
from minitron_hf.distillation.arguments import upcast_trained
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.errors import UnsupportedModelError
from minitron_hf.pruning.stored_checkpoint import open_checkpoint
from pocket import pocket_model, pocket_tokenizer, pocket_tokens
from test_quantised import quantised
from test_trainer import make_trainer, models, token_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ON_CPU = {"bf16": False, "use_cpu": True, "max_steps": 1}


def lora(**options):
    return LoraConfig(**{"target_modules": ["v_proj"], "r": 2, "task_type": "CAUSAL_LM", **options})


def test_a_teacher_with_virtual_tokens_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    prompted = get_peft_model(teacher, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING, which puts virtual tokens"):
        make_trainer(tmp_path / "run", student, prompted, token_dataset(), **ON_CPU)
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING, which puts virtual tokens"):
        cache_teacher_logits(prompted, token_dataset(), tmp_path / "cache", processing_class=pocket_tokenizer())


def test_a_teacher_with_learnt_prefixes_teaches_what_it_predicts(tmp_path):
    student, teacher = models(dtype=torch.float32)
    prefixed = get_peft_model(teacher, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    trainer = make_trainer(tmp_path / "run", student, prefixed, token_dataset((9,)), token_dataset((9,)), **ON_CPU)
    tokens = torch.tensor(token_dataset((9,))["input_ids"])
    with torch.no_grad():
        p_log = torch.log_softmax(prefixed(tokens).logits[0, :-1].double(), -1)
        q_log = torch.log_softmax(student(tokens).logits[0, :-1].double(), -1)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(float((p_log.exp() * (p_log - q_log)).sum(-1).mean()), 1e-4)


def test_a_student_with_an_adapter_of_transformers_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    student.save_pretrained(tmp_path / "student")
    pocket_tokenizer().save_pretrained(tmp_path / "student")
    get_peft_model(copy.deepcopy(student), lora()).save_pretrained(tmp_path / "student")
    student.add_adapter(lora())
    for one in (student, str(tmp_path / "student")):
        with pytest.raises(UnsupportedModelError, match="an adapter that Transformers added"):
            make_trainer(tmp_path / "run", one, teacher, token_dataset(), **ON_CPU)


def test_a_folder_with_an_adapter_beside_the_model_is_not_pruned_from_disk(tmp_path):
    teacher = pocket_model("llama")
    teacher.save_pretrained(tmp_path)
    get_peft_model(teacher, lora()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="an adapter beside the model"):
        open_checkpoint(tmp_path)


def test_the_adapter_of_a_teacher_is_part_of_what_a_run_remembers(tmp_path):
    student, teacher = models(dtype=torch.float32)
    adapted = get_peft_model(teacher, lora(init_lora_weights=False))
    adapter = next(one for name, one in adapted.named_parameters() if "lora_A" in name)

    def fingerprint_of_teacher():
        return make_trainer(tmp_path, copy.deepcopy(student), adapted, token_dataset(), **ON_CPU)._inputs["teacher"]

    trainable = fingerprint_of_teacher()
    assert fingerprint_of_teacher() == trainable  # now that it is frozen
    adapter.data += 1
    assert fingerprint_of_teacher() != trainable


@pytest.mark.parametrize(("bf16", "whole"), [(True, False), (False, True)])
def test_modules_that_are_trained_whole_are_float32(bf16, whole):
    base = pocket_model("llama", dtype=torch.bfloat16)
    student = get_peft_model(base, lora(modules_to_save=["norm", "lm_head"]))
    args = DistillationConfig("out", bf16=False)
    args.bf16 = bf16  # whatever this machine computes
    upcast_trained(student, args)
    trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in student.parameters() if not parameter.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.float32 if whole else torch.bfloat16}

    plain = get_peft_model(pocket_model("llama", dtype=torch.bfloat16), lora(modules_to_save=["norm"]))
    args.upcast_student = False
    upcast_trained(plain, args)
    assert torch.bfloat16 in {one.dtype for one in plain.parameters() if one.requires_grad}


def test_the_active_one_of_two_adapters_is_merged_into_a_quantised_student():
    base, plain = quantised(pocket_model("llama"))
    student = get_peft_model(base, lora(init_lora_weights=False))
    student.add_adapter("b", lora(init_lora_weights=False))
    tokens = pocket_tokens(12)[None]
    for active in ("default", "b"):
        student.set_adapter(active)
        plain.load_state_dict(merged_copy(student).state_dict())
        with torch.no_grad():
            torch.testing.assert_close(plain(tokens).logits, student.eval()(tokens).logits)


class Averaging(torch.optim.SGD):
    """Like a schedule-free optimizer, it holds other weights to train on than to keep: those to keep are 1 higher."""

    shift = 0

    def _set(self, shift):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += shift - self.shift
        self.shift = shift

    def train(self):
        self._set(0)

    def eval(self):
        self._set(1)


def test_a_saved_student_has_the_weights_of_a_schedule_free_optimizer(tmp_path):
    student, teacher = models(dtype=torch.float32)
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), **ON_CPU)
    trainer.optimizer = Averaging(student.parameters(), lr=0)
    trainer.create_scheduler(1, trainer.optimizer)
    norm = student.get_submodule("model.norm").weight.detach().clone()
    trainer.train()
    trainer.save_student(tmp_path / "student")
    saved = type(student).from_pretrained(tmp_path / "student")
    torch.testing.assert_close(saved.get_submodule("model.norm").weight, nn.Parameter(norm + 1))
