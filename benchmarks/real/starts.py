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
    prune_with_plan,
    repaired_weights,
    save_model,
    token_rows,
)
from minitron_hf.files import replacing_folder, write_json

from .arms import OPTIONAL_FIELDS, Arm, key
from .corpora import read_texts
from .peer_starts import METHODS, Start, build_start
from .stopping import log

#: File beside a start of another method: what it is.
DESCRIPTION_NAME = "start.json"
#: Arguments of `estimate_importance` that an arm may set.
SCORING_FIELDS = ("batch_reduction", "sequence_reduction", "depth_metric")
#: The repair of units alone: dropped layers are not made up for.
WITHOUT_GAPS = "least_squares_without_gaps"


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
        """The folder of the student, made if it is missing.

        Raises:
            ValueError: if the method of the arm gives no model that the trainer could train.
        """
        folder = self.folder / self.name(arm)
        if folder.is_dir():
            return folder
        is_ours = arm["method"] == OPTIONAL_FIELDS["method"]
        log(f"  {folder.name}: {arm['shape']}, " + (f"{arm['metric']}, {arm['repair']}" if is_ours else arm["method"]))
        if not is_ours:
            if METHODS[arm["method"]].is_module:
                raise ValueError(
                    f"method={arm['method']!r} gives a module of its own, which is measured before retraining alone "
                    "(benchmarks.real.peers)."
                )
            start = self.build(arm)
            student, plan = start.student, start.plan
        else:
            start, plan = None, self._plan(arm)
            student = self._student(arm, plan)
        with replacing_folder(folder) as unfinished:
            save_model(student, unfinished, self.tokenizer)
            if plan is not None:
                plan.save_pretrained(unfinished)
            if start is not None:
                write_json(unfinished / DESCRIPTION_NAME, start.to_dict())
        return folder

    def build(self, arm: Arm) -> Start:
        """The start of another method, in memory."""
        return build_start(arm["method"], self.teacher, self.rows(arm), arm.shape["target_parameters"])

    def _student(self, arm: Arm, plan: Any) -> Any:
        if arm["metric"] == "none":
            set_seed(arm["seed"])
            student: Any = AutoModelForCausalLM.from_config(plan.build_student_config(), dtype=torch.float32)
            return student.to(self.teacher.dtype)
        if arm["repair"] != WITHOUT_GAPS:
            return prune_with_plan(self.teacher, plan, self.rows(arm) if plan.repair else None)
        depth = ("num_hidden_layers", "layers_to_drop")
        shape = {name: value for name, value in arm.shape.items() if name not in depth}
        as_deep = make_plan(self.teacher, PrunerConfig(**shape, repair="least_squares"), self._scores(arm))
        return apply_plan(self.teacher, plan, repaired=repaired_weights(self.teacher, as_deep, self.rows(arm)))

    def _plan(self, arm: Arm) -> Any:
        repair = {"none": None, WITHOUT_GAPS: "least_squares"}.get(arm["repair"], arm["repair"])
        request = PrunerConfig(**arm.shape, repair=repair)
        if arm["metric"] in ("random", "none"):
            scores = estimate_importance(self.teacher, metric="random", seed=arm["seed"])
        else:
            scores = self._scores(arm)
        return make_plan(self.teacher, request, scores)

    def _scores(self, arm: Arm) -> ImportanceScores:
        rows = self.rows(arm)
        arguments = {name: arm[name] for name in SCORING_FIELDS if arm[name] != OPTIONAL_FIELDS[name]}
        if arguments.get("depth_metric"):
            arguments["block_length"] = self.teacher.config.num_hidden_layers - arm.shape["num_hidden_layers"]
        if "hidden_basis" in arm.shape:
            arguments["hidden_covariance"] = True
        changed = [arguments] if arguments else []
        named = key(self.digest, str(self.teacher.dtype), rows.digest, arm["metric"], *changed)
        folder = self.folder / f"scores-{named}"
        if not folder.is_dir():
            scores = estimate_importance(self.teacher, rows, metric=arm["metric"], show_progress=False, **arguments)
            with replacing_folder(folder) as unfinished:
                scores.save_pretrained(unfinished)
        return ImportanceScores.from_pretrained(folder)

    def rows(self, arm: Arm) -> Any:
        """Calibration rows of an arm."""
        texts = read_texts(self.corpora[self._calibration_corpus(arm)]["file"])
        return token_rows(
            texts, self.tokenizer, max_length=arm["calibration_length"], num_rows=arm["calibration_rows"]
        )

    def _calibration_corpus(self, arm: Arm) -> str:
        """The base arm's corpus unless the arm names one: the training corpus of an arm must not change its start."""
        return arm["calibration"] or arm.base["corpus"]
