"""Pruned starts: scores and students before distillation, made once and used again by their contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from minitron_hf import (
    ImportanceScores,
    PrunerConfig,
    apply_plan,
    estimate_importance,
    make_plan,
    repaired_weights,
    save_model,
    token_rows,
)
from minitron_hf.files import replacing_folder

from .arms import Arm, key
from .corpora import read_texts
from .stopping import log


class Starts:
    """Makes the student that an arm starts from, in a folder named by its inputs.

    Args:
        teacher: not changed.
        digest: of the teacher's weights.
        tokenizer: of both.
        corpora: entries of the training texts; their beginning calibrates.
        folder: where scores and students are kept.
    """

    def __init__(self, teacher: Any, digest: str, tokenizer: Any, corpora: dict[str, Any], folder: Path) -> None:
        self.teacher, self.digest, self.tokenizer = teacher, digest, tokenizer
        self.corpora, self.folder = corpora, folder

    def name(self, arm: Arm) -> str:
        """Name of the start's folder."""
        calibration = None if arm["metric"] == "none" else self.corpora[self._calibration_corpus(arm)]["digest"]
        return f"start-{key(self.digest, str(self.teacher.dtype), calibration, arm.start())}"

    def get(self, arm: Arm) -> Path:
        """The folder of the student, made if it is missing."""
        folder = self.folder / self.name(arm)
        if folder.is_dir():
            return folder
        log(f"  {folder.name}: {arm['shape']}, {arm['metric']}, {arm['repair']}")
        plan = self._plan(arm)
        if arm["metric"] == "none":
            set_seed(arm["seed"])
            student: Any = AutoModelForCausalLM.from_config(plan.build_student_config(), dtype=torch.float32)
            student.to(self.teacher.dtype)
        else:
            refit = repaired_weights(self.teacher, plan, self._rows(arm)) if plan.repair else None
            student = apply_plan(self.teacher, plan, repaired=refit)
        with replacing_folder(folder) as unfinished:
            save_model(student, unfinished, self.tokenizer)
            plan.save_pretrained(unfinished)
        return folder

    def _plan(self, arm: Arm) -> Any:
        repair = None if arm["repair"] == "none" else arm["repair"]
        request = PrunerConfig(**arm.shape, repair=repair)
        if arm["metric"] in ("random", "none"):
            scores = estimate_importance(self.teacher, metric="random", seed=arm["seed"])
        else:
            scores = self._scores(arm)
        return make_plan(self.teacher, request, scores)

    def _scores(self, arm: Arm) -> ImportanceScores:
        rows = self._rows(arm)
        folder = self.folder / f"scores-{key(self.digest, str(self.teacher.dtype), rows.digest, arm['metric'])}"
        if not folder.is_dir():
            scores = estimate_importance(self.teacher, rows, metric=arm["metric"], show_progress=False)
            with replacing_folder(folder) as unfinished:
                scores.save_pretrained(unfinished)
        return ImportanceScores.from_pretrained(folder)

    def _rows(self, arm: Arm) -> Any:
        texts = read_texts(self.corpora[self._calibration_corpus(arm)]["file"])
        return token_rows(
            texts, self.tokenizer, max_length=arm["calibration_length"], num_rows=arm["calibration_rows"]
        )

    def _calibration_corpus(self, arm: Arm) -> str:
        """The base arm's corpus, for all arms: the training corpus of an arm must not change its start."""
        return arm.base["corpus"]
