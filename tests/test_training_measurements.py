"""Measurements during training: they are right, and training does not notice them."""

from __future__ import annotations

import contextlib
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from minitron_hf import MeasurementCallback
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError, MissingDependencyError, UnsupportedModelError
from minitron_hf.evaluation import callback, tasks
from minitron_hf.evaluation.task_results import TaskScores
from pocket import pocket_model, pocket_tokenizer, pocket_tokens

ROWS = [pocket_tokens(length, seed=length).tolist() for length in (9, 17, 12, 20)]


@pytest.fixture
def harness(monkeypatch):
    """Stands in for the harness; the score is the number of measurements so far."""
    seen = SimpleNamespace(modes=[], limits=[])

    def run_task(model, tokenizer, task, settings, shots):
        seen.modes.append(model.training)
        seen.limits.append(settings.limit)
        score = {"value": float(len(seen.modes)), "stderr": None}
        return TaskScores({"piqa": {"acc": score, "exact_match,strict": score}}, {}, {}, {}, {})

    @contextlib.contextmanager
    def opened(*args, **kwargs):
        yield SimpleNamespace(load=lambda name: name)

    monkeypatch.setattr(callback, "require_tasks", lambda *args: None)
    monkeypatch.setattr(callback.TaskSource, "opened", opened)
    monkeypatch.setattr(callback, "run_task", run_task)
    return seen


def plain_trainer(folder) -> Trainer:
    """A trainer of Transformers on causal rows of one length."""
    rows = [row[:9] for row in ROWS]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    # With dropout, so that another random state would change the losses.
    model = pocket_model("gpt2", dtype=torch.float32, resid_pdrop=0.2)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=pocket_tokenizer())


def test_a_plain_trainer_measures_kl_and_agreement_and_trains_as_without(tmp_path):
    teacher = pocket_model("gpt2", dtype=torch.float32, seed=5)
    without = plain_trainer(tmp_path / "without")
    without.train()
    trainer = plain_trainer(tmp_path / "with")
    trainer.add_callback(MeasurementCallback(trainer, reference=teacher, dataset=ROWS, num_rows=3))
    trainer.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (without, trainer)]
    assert losses[0] == losses[1]
    logged = [entry for entry in trainer.state.log_history if "eval_kl_divergence" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    divergences, agreements = [], []
    with torch.no_grad():
        for row in ROWS[:3]:
            log_p, log_q = (
                model.eval()(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
                for model in (teacher, trainer.model)
            )
            divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            agreements += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    assert logged[-1]["eval_kl_divergence"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert logged[-1]["eval_top1_agreement"] == pytest.approx(sum(agreements) / len(agreements))


def test_distillation_measures_tasks_at_every_evaluation(tmp_path, harness):
    data = Dataset.from_dict({"input_ids": ROWS})
    args = DistillationConfig(
        str(tmp_path),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_piqa_acc",
        eval_tasks=["piqa"],
        eval_task_limit=7,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        max_length=32,
    )
    student = pocket_model("llama", dtype=torch.float32, seed=1)
    trainer = DistillationTrainer(
        student,
        pocket_model("llama", dtype=torch.float32),
        args,
        train_dataset=data,
        eval_dataset={"one": data, "two": data},
        processing_class=pocket_tokenizer(),
    )
    trainer.train()
    assert harness.limits == [7, 7], "once for both datasets"
    logged = [entry for entry in trainer.state.log_history if "eval_piqa_acc" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[0]["eval_piqa_exact_match_strict"] == 1.0
    assert trainer.state.best_metric == 2.0
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert any("eval_piqa_acc" in entry for entry in stored["log_history"])
    found = trainer.evaluate()  # of the best step's weights, at the number of the last step
    assert (found["eval_piqa_acc"], harness.limits) == (3.0, [7, 7, 7])
    assert trainer.evaluate()["eval_piqa_acc"] == 3.0


def test_what_cannot_be_measured_is_refused_beforehand(tmp_path, monkeypatch):
    trainer = plain_trainer(tmp_path)
    teacher = pocket_model("gpt2", dtype=torch.float32)
    with pytest.raises(DataError, match="nothing to measure"):
        MeasurementCallback(trainer)
    with pytest.raises(DataError, match="dataset of held-out text"):
        MeasurementCallback(trainer, reference=teacher)
    with pytest.raises(DataError, match="num_rows=0"):
        MeasurementCallback(trainer, reference=teacher, dataset=ROWS, num_rows=0)
    with pytest.raises(ValueError, match="eval_task_limit=0"):
        DistillationConfig(str(tmp_path), eval_task_limit=0)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UnsupportedModelError, match="FSDP"):
        MeasurementCallback(trainer, tasks=["piqa"])
    trainer.is_fsdp_enabled = False
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    with pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        MeasurementCallback(trainer, tasks=["piqa"])
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match="eval"):
        MeasurementCallback(trainer, tasks=["piqa"])


def test_the_random_states_that_the_harness_seeds_are_restored():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with tasks._random_state_kept():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
