"""Trains a student in a run folder, in this process or in several."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.images import holds_images
from ..errors import DataError
from ..files import (
    move_into,
    replacing_folder,
    require_writable,
)
from ..locks import with_locked_folder
from ..models import load_for_compute, stored_dtype
from ..pruning.plan import PruningPlan
from ..saving import in_stored_dtype, save_model
from .corpora import with_text_in
from .lineage import described_parts
from .rules import hints_of, require_settings
from .run import CACHE_DIR, PRIVATE_RECIPE_NAME, UNFINISHED_DIR, Run, has_images, reader_of
from .schema import DISTILL_DEFAULTS, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@with_locked_folder("folder")
def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | str | None,
    folder: str | os.PathLike[str],
    tokenizer: Any,
    settings: Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    plans: Sequence[PruningPlan] = (),
    peft_config: Any = None,
    dtype: torch.dtype | None = None,
    training_data_facts: Mapping[str, Any] | None = None,
) -> None:
    """Distil into `folder`, and resume from its last checkpoint. The student is written atomically.

    Args:
        student: the pruned model; trained in float32 weights.
        teacher: the teacher; None if both corpora are teacher caches.
        folder: folder for checkpoints and the final student.
        tokenizer: tokenizer of both models, for images their processor.
        settings: fields of `DistillationConfig`.
        train_dataset: corpus.
        eval_dataset: held-out corpus.
        plans: pruning plans of all rounds, in order; saved with the student.
        peft_config: a `peft` config; the adapter is merged into the student.
        dtype: dtype of the saved student; None: float32.
        training_data_facts: what `distillation.json` records of the corpus beside its name and size.

    Raises:
        OutputError: if the folder cannot be written, or another run uses it.
        MismatchError: if it holds a checkpoint of another training.
    """
    from transformers import PrinterCallback, set_seed

    from ..distillation.config import DistillationConfig
    from ..distillation.trainer import DistillationTrainer

    folder = require_writable(folder)
    args = DistillationConfig(str(folder), **settings)
    set_seed(args.seed)  # for an adapter, which is made before the trainer seeds itself
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        pruning_plan=plans or None,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)  # without bars it would print every log
    trainer.training_data_facts = training_data_facts or {}
    trainer.train_or_resume()
    if trainer.is_world_process_zero():
        with replacing_folder(folder / UNFINISHED_DIR) as temporary:
            trainer.save_student(temporary, dtype=dtype)
        move_into(folder / UNFINISHED_DIR, folder)
    else:
        trainer.save_student(folder)  # takes part in gathering shards; writes nothing


def with_defaults(settings: Mapping[str, Any], train_dataset: Any) -> dict[str, Any]:
    """Fields of `DistillationConfig`, completed by the defaults of recipes for a corpus."""
    from ..distillation.inputs import IMAGE_DEFAULTS

    return {**DISTILL_DEFAULTS, **(IMAGE_DEFAULTS if holds_images(train_dataset) else {}), **settings}


def _training_settings(run: Run) -> dict[str, Any]:
    """Fields of `DistillationConfig`."""
    return {
        "dataset_text_field": run.text_field("train"),
        **with_defaults(run.recipe.distill, run.dataset("train")),
        "disable_tqdm": not run.show_progress,
    }


def _train(run: Run, student: Path, folder: Path, **changes: Any) -> None:
    """Distil with the recipe's settings, and `changes` to them."""
    if run.starts_processes:
        settings = [f"--set={name}={json.dumps(value)}" for name, value in changes.items()]
        run.start_processes("stage", "distill", run.whole.folder / PRIVATE_RECIPE_NAME, student, folder, *settings)
    else:
        train(run, student, folder, changes)


def training_rows(run: Run, which: str) -> Any:
    """One of the corpora, with its text in the column that the training corpus has it in."""
    return with_text_in(run.dataset(which), run.text_field(which), run.text_field("train"))


def train(run: Run, student: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Distil the student in one folder into another, in all the processes that call this."""
    settings = {**_training_settings(run), **changes}
    if folder != run.whole.folder:  # of a control or an earlier round; the Hub's repository is the student's
        settings["push_to_hub"] = False
    teacher: PreTrainedModel | str | None
    if run.recipe.teacher_cache is None:
        corpora = [run.dataset("train"), training_rows(run, "eval")]
        # Loaded anew where this training changes it: its weights (`teacher_correction`), or where they are.
        if any(map(settings.get, ("teacher_correction", "teacher_offload", "teacher_model_init_kwargs"))):
            teacher = run.distillation_teacher_path(settings)
        else:
            teacher = run.distillation_teacher
    else:
        from ..distillation.teacher_cache import load_teacher_cache

        teacher, corpora = None, []
        for which in ("train", "eval"):
            images = training_rows(run, which) if has_images(run, which) else None
            corpora.append(load_teacher_cache(run.whole.folder / CACHE_DIR / which, images))
    distill(
        load_for_compute(student),
        teacher,
        folder,
        reader_of(run, "train"),
        settings,
        *corpora,
        plans=run.plans if folder == run.folder else (),
        peft_config=lora_config(run.recipe),
        dtype=stored_dtype(run.teacher_config),
        training_data_facts=described_parts(run),
    )


def _save_student(student: Any, tokenizer: Any, folder: Path, teacher: PretrainedConfig) -> None:
    with replacing_folder(folder) as temporary:
        save_model(in_stored_dtype(student, stored_dtype(teacher)), temporary, tokenizer)
        plan = getattr(student, "pruning_plan", None)
        if plan is not None and plan.vocabulary is not None:  # it says which of the teacher's tokens the student has
            plan.save_pretrained(temporary)


def lora_config(recipe: Recipe) -> Any:
    """The adapter's configuration, or None.

    Raises:
        DataError: if a field is unknown or has a wrong value.
    """
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    own = ("task_type", "peft_type", "runtime_config", "base_model_name_or_path", "inference_mode")
    require_settings(recipe.lora, hints_of(LoraConfig, without=own), "lora.", "fields of peft.LoraConfig")
    try:
        return LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
    except (TypeError, ValueError, ImportError) as error:
        raise DataError(f"lora: {error} Expected fields of peft.LoraConfig.") from error
