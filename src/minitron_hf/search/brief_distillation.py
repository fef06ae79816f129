"""Distils candidates of a search briefly, each from its last checkpoint."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compat import on_one_device
from ..data import TokenRows
from ..data.images import holds_images
from ..distillation.checkpoints import last_checkpoint
from ..distillation.config import DistillationConfig
from ..distillation.inputs import IMAGE_DEFAULTS
from ..distillation.trainer import DistillationTrainer
from ..files import digest
from ..models import plain_model
from ..pruning.plan import PruningPlan
from ..pruning.prune import prune_with_plan
from ..pruning.surgery import apply_plan
from .record import CANDIDATES_DIR

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Settings of a brief distillation, unless others are given.
DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "packing": True,
    "packing_strategy": "wrapped",
    "shuffle_dataset": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 0.25,
    # Constant after the warm-up, so that a longer run continues a shorter one.
    "lr_scheduler_type": "constant_with_warmup",
}


class BriefDistillation:
    """Distils the student of a plan for some tokens.

    Args:
        teacher: the teacher; not changed.
        folder: of the search; checkpoints go below it.
        train_dataset: corpus.
        processing_class: tokenizer of texts.
        settings: fields of `DistillationConfig`, with `max_length`.
        repair_rows: rows to repair a student on before its first step, where its plan asks for that.
        advance: called with the number of tokens after every step.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        folder: Path,
        train_dataset: Any,
        processing_class: Any,
        settings: Mapping[str, Any],
        repair_rows: TokenRows | None = None,
        advance: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.advance = advance
        self.repair_rows = repair_rows
        self.teacher, self.processing_class = teacher, processing_class
        self.folder = folder / CANDIDATES_DIR
        self.train_dataset = on_disk(train_dataset, self.folder)
        own = IMAGE_DEFAULTS if holds_images(train_dataset) else {}
        self.settings = {**DEFAULTS, **own, **settings, "push_to_hub": False}  # candidates are not published

    def __call__(self, name: str, plan: PruningPlan, num_tokens: int) -> PreTrainedModel:
        """The student of a plan after some tokens in all, resumed from its last checkpoint.

        Args:
            name: name of the candidate.
            plan: its plan.
            num_tokens: tokens that the student has seen then.
        """
        from transformers import PrinterCallback, TrainerCallback

        class Counter(TrainerCallback):
            """Counts the tokens of every step."""

            def on_step_end(self, *_: Any, **__: Any) -> None:
                advance(tokens_of_step)

        folder = self.folder / digest(name)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        values = self.settings
        rows = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
        advance, tokens_of_step = self.advance, rows * values["max_length"]
        steps = math.ceil(num_tokens / tokens_of_step)
        saving = {"save_strategy": "steps", "save_steps": steps, "save_total_limit": 1}
        checkpoint = last_checkpoint(folder)
        if checkpoint:  # it holds the weights, so nothing is repaired again
            student = apply_plan(self.teacher, replace(plan, repair=None))
        else:
            student = prune_with_plan(self.teacher, plan, self.repair_rows)
        trainer = DistillationTrainer(
            model=student,
            teacher_model=self.teacher,
            args=on_one_device(DistillationConfig(str(folder), **{**values, "max_steps": steps, **saving})),
            train_dataset=self.train_dataset,
            processing_class=self.processing_class,
            pruning_plan=plan,
        )
        trainer.remove_callback(PrinterCallback)  # the table shows the results
        trainer.add_callback(Counter())
        trainer.train(resume_from_checkpoint=checkpoint)
        return plain_model(trainer.model).eval()


def on_disk(dataset: Any, folder: Path) -> Any:
    """A dataset whose prepared rows `datasets` caches in files, so that several trainers tokenise it once.

    `datasets` caches the maps of datasets on disk, and not those of datasets in memory. So these are written to a new
    folder inside `folder`. Streams and teacher caches are returned unchanged.
    """
    from datasets import Dataset, load_from_disk

    if not isinstance(dataset, Dataset) or dataset.cache_files:
        return dataset
    folder.mkdir(parents=True, exist_ok=True)
    stored = tempfile.mkdtemp(prefix="train_dataset-", dir=folder)
    dataset.save_to_disk(stored)
    return load_from_disk(stored)
