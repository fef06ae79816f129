"""Distils an arm with `DistillationTrainer`: checkpoints by the clock, the same result however often it is stopped."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    cache_teacher_logits,
    correct_teacher,
    load_teacher_cache,
)
from minitron_hf.files import read_json, remove, replacing_folder, write_json
from minitron_hf.models import load_for_compute

from .arms import Arm, key
from .corpora import read_texts
from .optimizers import MuonWithAdamW
from .stopping import Stop, Stopped, log
from .teacher_states import TeacherStatesTrainer

RECORD_NAME, TIMING_NAME = "training.json", "timing.json"

#: Tokens of a forward and backward pass; steps of more are accumulated.
TOKENS_PER_PASS = 4096
#: Rows of a teacher cache's file and tokens between checkpoints of teacher correction: what an interruption can cost.
CACHED_ROWS_PER_FILE, CORRECTION_TOKENS_PER_SAVE = 64, 16384
#: Entries of the recorded training log.
LOGGED = 20


class Checkpointing(TrainerCallback):
    """Saves a checkpoint every so many seconds at the latest, and when the run should stop."""

    def __init__(self, stop: Stop, folder: Path, seconds: float) -> None:
        self.stop, self.timing, self.seconds = stop, folder / TIMING_NAME, seconds
        self.before = read_json(self.timing)["seconds"] if self.timing.is_file() else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self.begun = self.saved = self.ended = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint, and the end of training if the run should stop."""
        now = time.monotonic()
        took, self.ended = now - self.ended, now
        if state.global_step >= state.max_steps:
            return
        if now + took - self.saved > self.seconds:
            control.should_save = True
        if self.stop.wanted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long training has taken so far."""
        self.saved = self.ended = time.monotonic()
        write_json(self.timing, {"seconds": self.total})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log the progress."""
        if logs and "loss" in logs:
            log(f"  step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, {self.total:.0f} s")

    @property
    def total(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.before + time.monotonic() - self.begun


@dataclass
class Workshop:
    """Objects that the arms share: the teacher, the tokenizer, the corpora, and a folder for reused files.

    Attributes:
        teacher_path: folder or Hub id.
        teacher: the model, as `hardware` computes it.
        digest: of its weights.
        tokenizer: of all models.
        corpora: name → entry of a training text.
        folder: for shared files.
        stop: whether to stop.
        save_seconds: what an interruption can cost.
        keep_states: whether the teacher's last hidden states of every batch are kept in files for other arms.
    """

    teacher_path: str
    teacher: Any
    digest: str
    tokenizer: Any
    corpora: dict[str, dict[str, Any]]
    folder: Path
    stop: Stop
    save_seconds: float = 50.0
    keep_states: bool = False

    def distil(self, arm: Arm, start: Path, folder: Path) -> Path:
        """Train an arm, or go on with it.

        Args:
            arm: what to do.
            start: folder of the student before.
            folder: for checkpoints, and the student in `student/`.

        Returns:
            The folder of the student, with the training's record beside its weights.

        Raises:
            Stopped: if the run should stop before the end.
        """
        student = folder / "student"
        if student.is_dir():
            return student
        data = Documents(arm, self)
        callback = Checkpointing(self.stop, folder, self.save_seconds)
        arguments = arm_arguments(arm, folder)
        teacher, rows = self._teacher(arm, data, arguments)
        with self.stop.deferred():
            self.stop.check()
            keeps_states = self.keep_states and arm["teacher"] == "as-is"
            trainer = (TeacherStatesTrainer if keeps_states else DistillationTrainer)(
                model=str(start),
                teacher_model=teacher,
                args=arguments,
                train_dataset=rows,
                processing_class=self.tokenizer,
                callbacks=[callback],
                **_optimizer(arm),
                **_adapter(arm),
            )
            if isinstance(trainer, TeacherStatesTrainer):
                trainer.states_folder, trainer.teacher_digest = self.folder / "teacher-states", self.digest
            trainer.remove_callback(PrinterCallback)  # `Checkpointing` says how far it is
            trainer.train_or_resume()
            if trainer.state.global_step < arm.steps:
                raise Stopped
            record = {
                "steps": arm.steps,
                "rows_per_step": arm.rows_per_step,
                "tokens": arm.steps * arm.rows_per_step * arm["length"],
                "documents": len(data.texts),
                "epochs": round(trainer.state.epoch or 0.0, 4),
                "bf16": bool(arguments.bf16),
                "torch_compile": bool(arguments.torch_compile),
                "log": [
                    {"step": entry["step"], "loss": round(entry["loss"], 5)}
                    for entry in trainer.state.log_history
                    if "loss" in entry
                ],
            }
            with replacing_folder(student) as unfinished:
                trainer.save_student(unfinished, dtype=self.teacher.dtype)
                write_json(unfinished / RECORD_NAME, record | {"seconds": round(callback.total, 1)})
        del trainer
        gc.collect()
        return student

    def _teacher(self, arm: Arm, data: Documents, arguments: DistillationConfig) -> tuple[Any, Any]:
        """The teacher and the rows of an arm; a teacher cache holds both."""
        kind = arm["teacher"]
        if kind == "as-is":
            return self.teacher, data.dataset
        if kind.startswith(("cached-", "drawn-")):
            how, _, number = kind.partition("-")
            stored = {"top_k" if how == "cached" else "num_draws": int(number)}
            named = int(number) if how == "cached" else kind
            folder = self.folder / f"cache-{key(self.digest, str(self.teacher.dtype), data.identity(), named)}"
            cache_teacher_logits(
                self.teacher, data.dataset, folder, **stored, args=arguments, processing_class=self.tokenizer,
                rows_per_file=CACHED_ROWS_PER_FILE,
            )  # fmt: skip
            return None, load_teacher_cache(folder)
        if kind == "corrected-meanwhile":
            return load_for_compute(self.teacher_path), data.dataset  # it is trained: a copy of its own
        if kind == "corrected":
            return load_for_compute(self._corrected(arm, data), dtype=self.teacher.dtype), data.dataset
        raise ValueError(f"teacher={kind!r}: expected as-is, cached-K, drawn-D, corrected or corrected-meanwhile.")

    def _corrected(self, arm: Arm, data: Documents) -> Path:
        rate = arm["teacher_original_learning_rate"]
        identity = [self.digest, data.identity(), rate, arm["tokens_per_step"], arm["tokens"], arm["seed"]]
        folder = self.folder / f"corrected-{key(*identity)}"
        if not (folder / "teacher_correction.json").is_file():
            log(f"  correcting the teacher on {arm['corpus']}")
            passes = _passes(arm)
            correct_teacher(
                self.teacher_path,
                data.dataset,
                folder,
                original_learning_rate=rate,
                num_tokens=arm["tokens"],
                processing_class=self.tokenizer,
                max_length=arm["length"],
                per_device_train_batch_size=arm.rows_per_step // passes,
                gradient_accumulation_steps=passes,
                save_steps=max(1, CORRECTION_TOKENS_PER_SAVE // arm["tokens_per_step"]),
                seed=arm["seed"],
                disable_tqdm=True,
            )
        for checkpoint in folder.glob("checkpoint-*"):
            remove(checkpoint)
        return folder


class Documents:
    """The documents that an arm is trained on: in an order that its seed decides, as many as its budget needs."""

    def __init__(self, arm: Arm, workshop: Workshop) -> None:
        self.entry = workshop.corpora[arm["corpus"]]
        self.arm, self.tokenizer = arm, workshop.tokenizer

    @cached_property
    def texts(self) -> Sequence[str]:
        """Documents of at least so many tokens as are trained on, or all."""
        texts = read_texts(self.entry["file"])
        random.Random(self.arm["seed"]).shuffle(texts)
        needed, chosen = (self.arm.steps * self.arm.rows_per_step + 1) * self.arm["length"], []
        for text in texts:
            if needed <= 0:
                break
            chosen.append(text)
            needed -= len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return chosen

    @property
    def dataset(self) -> Dataset:
        """One document a row."""
        return Dataset.from_dict({"text": list(self.texts)})

    def identity(self) -> list[Any]:
        """What decides the rows."""
        arm = self.arm
        return [self.entry["digest"], arm["seed"], arm["length"], len(self.texts)]


def arm_arguments(arm: Arm, folder: Path) -> DistillationConfig:
    """The trainer's arguments: those of the arm, and what all arms share."""
    passes = _passes(arm)
    loss, correction = dict(arm.loss), {}
    if torch.cuda.is_available():  # to compile a layer takes longer there than an arm
        loss.pop("torch_compile", None)
    if arm["teacher"] == "corrected-meanwhile":
        correction = {
            "teacher_correction": "concurrent",
            "teacher_original_learning_rate": arm["teacher_original_learning_rate"],
        }
    return DistillationConfig(
        str(folder),
        max_steps=arm.steps,
        per_device_train_batch_size=arm.rows_per_step // passes,
        gradient_accumulation_steps=passes,
        learning_rate=arm["learning_rate"],
        lr_scheduler_type=arm["schedule"],
        warmup_steps=arm["warmup"],
        max_length=arm["length"],
        packing=True,
        packing_strategy="wrapped",
        seed=arm["seed"],
        freeze_embeddings=arm["train"] == "layers",
        save_strategy="no",  # `Checkpointing` asks for them
        save_total_limit=1,
        logging_steps=max(1, arm.steps // LOGGED),
        report_to="none",
        disable_tqdm=True,
        **loss,
        **correction,
    )


def _passes(arm: Arm) -> int:
    """Forward and backward passes of a step: the fewest that divide its rows and stay within `TOKENS_PER_PASS`."""
    rows = arm.rows_per_step
    return next(
        count
        for count in range(1, rows + 1)
        if (rows % count == 0 and rows // count * arm["length"] <= TOKENS_PER_PASS) or count == rows
    )


def _optimizer(arm: Arm) -> dict[str, Any]:
    if arm["optimizer"] == "adamw":
        return {}
    if arm["optimizer"] != "muon":
        raise ValueError(f"optimizer={arm['optimizer']!r}: expected adamw or muon.")
    # A factory (Transformers 5.22, `is_optimizer_factory`): called for a class, which is called with the model.
    return {"optimizer_cls_and_kwargs": (lambda: MuonWithAdamW, {"lr": arm["learning_rate"]})}


def _adapter(arm: Arm) -> dict[str, Any]:
    if arm["train"] in ("all", "layers"):
        return {}
    kind, _, rank = arm["train"].partition("-")
    if kind != "lora":
        raise ValueError(f"train={arm['train']!r}: expected all, layers or lora-RANK.")
    from peft import LoraConfig

    return {
        "peft_config": LoraConfig(
            r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear", task_type="CAUSAL_LM"
        )
    }
