"""The stages of a run: what each depends on, what it leaves in the run folder, and the work itself.

Every stage calls public functions of the package. A run folder is laid out like the Hub repository it becomes (the
student at its root), plus working folders that are never uploaded.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import load_text_dataset
from ..errors import DataError
from ..files import (
    digest,
    file_digest,
    move_into,
    replacing_folder,
    require_writable,
    write_json,
)
from ..models import compute_dtype, load_config, load_model, load_tokenizer
from ..pruning.candidates import SEARCH_NAME, best_shape
from ..pruning.plan import INDICES_NAME, PLAN_NAME, PruningPlan, make_plan
from ..pruning.streaming import is_streamable, prune_checkpoint
from ..pruning.surgery import CALIBRATION_ARGUMENTS, carry_out, iterate_importance, plan_for_target
from ..scoring.importance import SCORES_NAME, ImportanceScores, estimate_importance
from ..sizes.request import PRUNER_CONFIG_NAME, PrunerConfig
from .launching import is_launched, launch, require_launchable
from .schema import CONTROLS, DISTILL_DEFAULTS, ROUNDS_DIR, DatasetSection, Recipe, TeacherSection

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RECIPE_NAME = "recipe.yaml"
#: Working folders of a run, beside the published files.
STAGES_DIR, PRUNED_DIR, CONTROLS_DIR, UNFINISHED_DIR = "stages", "pruned", "controls", "unfinished.tmp"
CORRECTED_DIR, CACHE_DIR = "corrected_teacher", "teacher_cache"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: what `--until` calls it.
        help: one line.
        inputs: stages whose results it reads.
        settings: the part of the recipe that it depends on.
        outputs: files or folders (relative) that exist once it is done.
        run: does the work.
        wanted: whether the recipe asks for it.
    """

    name: str
    help: str
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], Any]
    outputs: tuple[str, ...]
    run: Callable[[Run], None]
    wanted: Callable[[Recipe], bool] = lambda recipe: True


@dataclass
class Run:
    """A recipe at work: models and datasets loaded once, when first needed.

    Attributes:
        recipe: what to do. In a round: what that round does (`Recipe.in_round`), whose teacher is what it cuts.
        show_progress: show progress bars.
        whole: the run that this is a round of; itself where there are no rounds.
        number: which round, from 1.
    """

    recipe: Recipe
    show_progress: bool = True
    whole: Run = None  # type: ignore[assignment] # set below
    number: int = 1
    _cache: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.whole or self

    def in_round(self, number: int) -> Run:
        """The run of one round. That of another, and the models that it holds, is let go."""
        current = self._cache.get("round")
        if current is None or current.number != number:
            self._cache["round"] = Run(self.recipe.in_round(number), self.show_progress, self, number)
        return self._cache["round"]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    def _cached(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def forget(self, key: str) -> None:
        """Free something that was loaded; it is loaded again when needed."""
        self._cache.pop(key, None)

    def forget_teachers(self) -> None:
        """Free every model that was loaded, of this round and of the whole run."""
        for key in ("teacher", "corrected_teacher"):
            self.forget(key)
            self.whole.forget(key)

    @property
    def teacher_config(self) -> PretrainedConfig:
        """The teacher's config, as in its checkpoint."""
        section = self.recipe.teacher
        return self._cached("config", lambda: load_config(section.model, revision=section.revision))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""
        section = self.whole.recipe.teacher
        return self._cached("tokenizer", lambda: load_tokenizer(section.model, revision=section.revision))

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher, on the device and in the dtype that compute best here; of a later round: what it cuts."""
        section = self.recipe.teacher
        if self is not self.whole and self.number == 1:
            return self.whole.teacher
        return self._cached("teacher", lambda: self.load(section.model, revision=section.revision))

    @property
    def learned_teacher(self) -> PreTrainedModel:
        """What the student learns from: the teacher, corrected where the recipe says so; or what it was cut from."""
        if self is not self.whole:
            return self.teacher if self.learns_from_previous else self.whole.learned_teacher
        if self.recipe.teacher_correction is None:
            return self.teacher
        return self._cached("corrected_teacher", lambda: self.load(self.folder / CORRECTED_DIR))

    @property
    def learns_from_previous(self) -> bool:
        """Whether this is a later round whose student learns from the student of the round before."""
        return self.number > 1 and self.whole.recipe.rounds[self.number - 1].teacher == "previous"

    def unloaded_teacher(self, settings: dict[str, Any]) -> str:
        """Where the trainer finds what the student learns from, to load it as the settings say."""
        self.forget_teachers()
        if self is not self.whole and not self.learns_from_previous:
            return self.whole.unloaded_teacher(settings)
        section = self.recipe.teacher
        corrected = self is self.whole and self.recipe.teacher_correction is not None
        where = {} if corrected or section.revision is None else {"revision": section.revision}
        given = settings.get("teacher_model_init_kwargs") or {}
        settings["teacher_model_init_kwargs"] = {"dtype": str(self.dtype).removeprefix("torch."), **where, **given}
        return str(self.folder / CORRECTED_DIR) if corrected else section.model

    def load(self, path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """Load a model for computing; of several processes, each has the trainer place or split it."""
        import torch

        device = "cuda" if torch.cuda.is_available() and not is_launched() else "cpu"
        return load_model(path, dtype=self.dtype, device=device, **kwargs)

    @property
    def starts_processes(self) -> bool:
        """Whether what is trained is trained in other processes than this one."""
        return self.recipe.distributed is not None and not is_launched()

    def start_processes(self, *arguments: str | os.PathLike[str]) -> None:
        """Run a command of the command line in the recipe's processes, with this one's models out of their way."""
        import torch

        section = self.recipe.distributed
        assert section is not None
        self.forget_teachers()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        quiet = [] if self.show_progress else ["--quiet"]
        given = [*arguments, *quiet, *([] if self is self.whole else [f"--round={self.number}"])]
        launch([os.fspath(argument) for argument in given], section.config, section.num_processes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        import torch

        dtype = self.recipe.teacher.dtype
        return compute_dtype() if dtype == "auto" else getattr(torch, dtype)

    def dataset(self, which: str) -> Dataset:
        """One of the recipe's corpora, reduced to its text (or whatever TRL understands)."""
        if self is not self.whole:
            return self.whole.dataset(which)
        section = self.dataset_section(which)

        def load() -> Dataset:
            data = load_text_dataset(section.source, name=section.name, split=section.split, revision=section.revision)
            columns = data.column_names or []
            if not {section.text_field, "input_ids", "messages", "prompt"} & set(columns):
                raise DataError(
                    f"data.{which}: {section.source} has the columns {', '.join(columns)}, and no "
                    f"{section.text_field!r}. Name the text column with text_field."
                )
            return data if section.num_rows is None else data.select(range(min(section.num_rows, len(data))))

        return self._cached(f"data.{which}", load)

    def dataset_section(self, which: str) -> DatasetSection:
        """The section of one of the corpora; calibration falls back to train."""
        return getattr(self.recipe.data, which) or self.recipe.data.train

    def calibration_texts(self) -> Any:
        """The calibration corpus one by one: only the first rows are needed, and it may be larger than memory."""
        column, rows = self.dataset_section("calibration").text_field, self.dataset("calibration")
        return (row[column] for row in rows) if column in rows.column_names else rows

    def carry_out(self, plan: PruningPlan, *, verify: bool = False) -> Any:
        """The student of a plan, refitted on the rows that were scored where the plan says so."""
        rows = {name: value for name, value in self.recipe.scores.items() if name in CALIBRATION_ARGUMENTS}
        texts = self.calibration_texts() if plan.repair else None
        return carry_out(self.teacher, plan, texts, processing_class=self.tokenizer, verify=verify, **rows)

    @property
    def plan(self) -> PruningPlan:
        """The plan that the stage `plan` left."""
        return PruningPlan.from_pretrained(self.folder)

    @property
    def plans(self) -> list[PruningPlan]:
        """The plans from what the student learns from to the student: of this round, and of those before."""
        if self is self.whole:
            return [self.plan]
        first = self.number if self.learns_from_previous else 1
        folders = [Path(self.whole.recipe.in_round(number).output_dir) for number in range(first, self.number + 1)]
        return [PruningPlan.from_pretrained(folder) for folder in folders]


def _score(run: Run) -> None:
    texts = run.calibration_texts()
    if run.recipe.scores.get("iterations", 1) != 1:
        texts = list(texts)
    scores = iterate_importance(
        run.teacher,
        run.recipe.pruner_config,
        texts,
        processing_class=run.tokenizer,
        show_progress=run.show_progress,
        **run.recipe.scores,
    )
    scores.save_pretrained(run.folder)


def _search(run: Run) -> None:
    from ..search.architectures import search_architectures

    column, held_out = run.dataset_section("eval").text_field, run.dataset("eval")
    arguments = search_arguments(run.recipe)
    distillation = {"dataset_text_field": run.recipe.data.train.text_field, **arguments.pop("distillation")}
    search_architectures(
        run.teacher,
        ImportanceScores.from_pretrained(run.folder),
        calibration_data=run.calibration_texts(),
        train_dataset=run.dataset("train"),
        eval_data=(row[column] for row in held_out) if column in held_out.column_names else held_out,
        processing_class=run.tokenizer,
        output_dir=run.folder,
        base=run.recipe.pruner_config,
        show_progress=run.show_progress,
        distillation=distillation,
        **arguments,
    )


def search_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `search_architectures`: it distils as the run will, but for how long and by which schedule."""
    # The teacher is cut anew for every shape, and so stays loaded and whole.
    of_teacher = ("teacher_correction", "teacher_offload", "teacher_model_init_kwargs")
    own = ("max_steps", "num_train_epochs", "max_length", *of_teacher)
    schedules = ("lr_scheduler", "warmup", "eval_", "save_", "logging", "load_best", "metric_for_best", "greater_is")
    shared = {
        name: value for name, value in recipe.distill.items() if name not in own and not name.startswith(schedules)
    }
    arguments = dict(recipe.search or {})
    return {
        "max_length": recipe.distill.get("max_length"),
        **arguments,
        "distillation": {**shared, **arguments.get("distillation", {})},
    }


def _plan(run: Run) -> None:
    request = run.recipe.pruner_config if run.recipe.search is None else best_shape(run.folder)
    scores = ImportanceScores.from_pretrained(run.folder)
    if request.target_parameters is None:
        plan = make_plan(run.teacher_config, request, scores)
    else:
        plan = plan_for_target(
            run.teacher,
            request,
            scores,
            run.calibration_texts(),
            processing_class=run.tokenizer,
            max_length=run.recipe.scores.get("max_length"),
        )
    PrunerConfig.from_dict(plan.pruner_config).save_pretrained(run.folder)
    plan.save_pretrained(run.folder)


def _prune(run: Run) -> None:
    import torch

    section = run.recipe.teacher
    stored = _checkpoint_dtype(run.teacher_config)
    # What was scored are the weights as they were loaded; those on disk are others where loading has rounded them.
    rounded = stored is None or torch.promote_types(stored, run.dtype) != run.dtype
    if (
        not rounded
        and not run.recipe.verify
        and not run.plan.repair
        and is_streamable(section.model, revision=section.revision)
    ):
        prune_checkpoint(
            section.model,
            run.folder / PRUNED_DIR,
            run.plan,
            revision=section.revision,
            overwrite=True,
            show_progress=run.show_progress,
        )
    else:
        student = run.carry_out(run.plan, verify=run.recipe.verify)
        if run.recipe.verify:
            student.pruning_plan.save_pretrained(run.folder)
        _save_student(student, run.tokenizer, run.folder / PRUNED_DIR, run.teacher_config)
    if run.number > 1:
        run.forget("teacher")  # whoever needs it still loads it again


def _correct(run: Run) -> None:
    if run.starts_processes:
        run.start_processes("stage", "correct", run.folder / RECIPE_NAME)
    else:
        correct(run)


def correct(run: Run) -> None:
    """Let the teacher learn the corpus, in all the processes that call this."""
    from ..distillation.correction import correct_teacher

    section = run.recipe.teacher_correction
    assert section is not None
    run.forget("teacher")
    correct_teacher(
        load_model(run.recipe.teacher.model, revision=run.recipe.teacher.revision),
        run.dataset("train"),
        run.folder / CORRECTED_DIR,
        original_learning_rate=section.original_learning_rate,
        num_tokens=section.num_tokens,
        method=section.method,  # type: ignore[arg-type]
        processing_class=run.tokenizer,
        eval_dataset=run.dataset("eval"),
        **{
            "dataset_text_field": run.recipe.data.train.text_field,
            "disable_tqdm": not run.show_progress,
            **section.arguments,
        },
    )


def _cache(run: Run) -> None:
    from ..distillation.config import DistillationConfig
    from ..distillation.teacher_cache import cache_teacher_logits

    section = run.recipe.teacher_cache
    assert section is not None
    for which in ("train", "eval"):
        args = DistillationConfig(str(run.folder), **_training_settings(run))
        if which == "eval" and args.eval_packing is not None:
            args.packing = args.eval_packing
        cache_teacher_logits(
            run.learned_teacher,
            run.dataset(which),
            run.folder / CACHE_DIR / which,
            top_k=section.top_k,
            dtype=section.dtype,
            args=args,
            processing_class=run.tokenizer,
        )
    run.forget("teacher")
    run.forget("corrected_teacher")


def cached_arguments() -> tuple[str, ...]:
    """Fields of `DistillationConfig` that shape what the teacher is asked, and so its cache."""
    from ..distillation.teacher_cache import ROW_ARGUMENTS

    names = ("temperature", "hidden_loss", "hidden_layers", "embedding_loss", "bf16", "fp16", "eval_packing")
    return (*names, "shuffle_dataset", "seed", *ROW_ARGUMENTS)


def _cache_settings(recipe: Recipe) -> Any:
    """What shapes the cache, of which the learning rate, for example, is no part."""
    if recipe.teacher_cache is None:
        return None
    settings = {**DISTILL_DEFAULTS, **recipe.distill}
    return {
        "teacher": model_identity(recipe.teacher),
        "teacher_cache": asdict(recipe.teacher_cache),
        "distill": {name: settings[name] for name in cached_arguments() if name in settings},
        "train": dataset_identity(recipe.data.train),
        "eval": dataset_identity(recipe.data.eval),
    }


def _distill(run: Run) -> None:
    _train(run, run.folder / PRUNED_DIR, run.folder)


def _controls(run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    if run.recipe.rounds:
        run = run.in_round(len(run.recipe.rounds))
    seed = int(run.recipe.distill.get("seed", 42))
    for name in run.recipe.controls:
        folder = run.folder / CONTROLS_DIR / name
        if (folder / "config.json").is_file():
            continue  # finished before an interruption
        if name == "random_pruning":
            scores = estimate_importance(run.teacher, metric="random", seed=seed)
            student = run.carry_out(make_plan(run.teacher, PrunerConfig.from_dict(run.plan.pruner_config), scores))
        elif name == "random_init":
            set_seed(seed)
            config = run.plan.build_student_config()
            student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            _train(run, run.folder / PRUNED_DIR, folder, kd_weight=0.0, ce_weight=1.0)
            continue
        _save_student(student, run.tokenizer, folder / PRUNED_DIR, run.teacher_config)
        _train(run, folder / PRUNED_DIR, folder)


def _evaluate(run: Run) -> None:
    from ..evaluation.evaluate import evaluate_models
    from ..evaluation.samples import generate_samples
    from ..evaluation.tasks import evaluate_tasks

    section, last = run.recipe.evaluate, len(run.recipe.rounds)
    last_round = " in the last round" if last > 1 else ""
    models: dict[str, Any] = {
        # By path where possible, so that the size of a checkpoint is that of its files.
        "teacher": run.recipe.teacher.model if run.recipe.teacher.revision is None else run.teacher,
        "pruned": run.folder / PRUNED_DIR,
        **({"corrected_teacher": run.folder / CORRECTED_DIR} if run.recipe.teacher_correction else {}),
        **{f"round_{number}": run.folder / ROUNDS_DIR / str(number) for number in range(1, last)},
        "student": run.folder,
        **{name: run.folder / CONTROLS_DIR / name for name in run.recipe.controls},
    }
    run.forget("teacher")
    run.forget("corrected_teacher")
    evaluate_models(
        models,
        run.dataset("eval"),
        processing_class=run.tokenizer,
        max_length=section.max_length,
        num_rows=section.num_rows,
        batch_size=section.batch_size,
        text_field=run.dataset_section("eval").text_field,
        dataset_name=run.dataset_section("eval").source,
        descriptions={
            "pruned": f"the student before distillation{last_round}",
            "corrected_teacher": "the teacher after fine-tuning on the corpus, from which the student learnt",
            **{f"round_{number}": f"the student of round {number} of {last}, distilled" for number in range(1, last)},
            **{
                name: f"control: {CONTROLS[name]}; trained on the same tokens{last_round}"
                for name in run.recipe.controls
            },
        },
        dtype=None if run.recipe.teacher.dtype == "auto" else run.recipe.teacher.dtype,
        speed=section.speed,
        output_path=run.folder,
        show_progress=run.show_progress,
    )
    compared = {"teacher": run.teacher, "student": run.load(run.folder)} if section.prompts or section.tasks else {}
    if section.prompts:
        write_json(run.folder / "samples.json", generate_samples(compared, run.tokenizer, section.prompts))
    if section.tasks:
        results = {
            name: evaluate_tasks(model, section.tasks, processing_class=run.tokenizer, limit=section.task_limit)
            for name, model in compared.items()
        }
        write_json(run.folder / "benchmarks.json", results)


def _card(run: Run) -> None:
    from ..publishing.card import write_model_card
    from ..publishing.hub import write_teacher_metadata

    write_teacher_metadata(run.folder, run.recipe.teacher.model, revision=run.recipe.teacher.revision)
    write_model_card(run.folder)


def _publish(run: Run) -> None:
    from ..publishing.hub import push_student_to_hub

    section = run.recipe.publish
    assert section is not None
    push_student_to_hub(run.folder, section.repo_id, private=section.private, revision=section.revision)


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | str | None,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    plans: Sequence[PruningPlan] = (),
    peft_config: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Distil into `folder`, resuming from its last checkpoint; the student appears there whole or not at all.

    Args:
        student: the pruned model; trained in float32 weights.
        teacher: what it learns from; None where both corpora are caches of it.
        folder: where checkpoints and the final student go.
        tokenizer: of both.
        settings: fields of `DistillationConfig`.
        train_dataset: corpus.
        eval_dataset: held-out corpus.
        plans: how the student was cut, saved beside it; of several rounds, those of all of them from the teacher on.
        peft_config: a `peft` config; the adapter is merged into the student.
        dtype: dtype of the saved student; None: float32.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from ..distillation.config import DistillationConfig
    from ..distillation.trainer import DistillationTrainer

    folder = require_writable(folder)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(str(folder), **settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        pruning_plan=plans or None,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    if trainer.is_world_process_zero():
        with replacing_folder(folder / UNFINISHED_DIR) as temporary:
            trainer.save_student(temporary, dtype=dtype)
        move_into(folder / UNFINISHED_DIR, folder)
    else:
        trainer.save_student(folder)  # takes part in gathering what is split, and writes nothing


def _training_settings(run: Run) -> dict[str, Any]:
    """Fields of `DistillationConfig`."""
    return {
        "dataset_text_field": run.recipe.data.train.text_field,
        **DISTILL_DEFAULTS,
        **run.recipe.distill,
        "disable_tqdm": not run.show_progress,
    }


def _train(run: Run, student: Path, folder: Path, **changes: Any) -> None:
    """Distil with the recipe's settings, and `changes` to them."""
    if run.starts_processes:
        settings = [f"--set={name}={json.dumps(value)}" for name, value in changes.items()]
        run.start_processes("stage", "distill", run.whole.folder / RECIPE_NAME, student, folder, *settings)
    else:
        train(run, student, folder, changes)


def train(run: Run, student: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Distil the student in one folder into another, in all the processes that call this."""
    settings = {**_training_settings(run), **changes}
    teacher: PreTrainedModel | str | None
    if run.recipe.teacher_cache is None:
        corpora = [run.dataset("train"), run.dataset("eval")]
        if settings.get("teacher_offload") or settings.get("teacher_model_init_kwargs"):
            teacher = run.unloaded_teacher(settings)
        else:
            teacher = run.learned_teacher
    else:
        from ..distillation.teacher_cache import load_teacher_cache

        caches = run.whole.folder / CACHE_DIR
        teacher, corpora = None, [load_teacher_cache(caches / which) for which in ("train", "eval")]
    distill(
        run.load(student),
        teacher,
        folder,
        run.tokenizer,
        settings,
        *corpora,
        plans=run.plans if folder == run.folder else (),
        peft_config=lora_config(run.recipe),
        dtype=_checkpoint_dtype(run.teacher_config),
    )


def _checkpoint_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype in which a checkpoint is stored, which its student's follows."""
    import torch

    return getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype


def _save_student(student: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, teacher: PretrainedConfig) -> None:
    with replacing_folder(folder) as temporary:
        student.to(dtype=_checkpoint_dtype(teacher) or student.dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def lora_config(recipe: Recipe) -> Any:
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
    except (TypeError, ValueError) as error:
        raise DataError(f"lora: {error}. Expected fields of peft.LoraConfig.") from error


def model_identity(section: TeacherSection) -> Any:
    """What tells one teacher from another without reading all of it: the Hub commit, or local configs and sizes."""
    folder = Path(section.model).expanduser()
    if not folder.is_dir():
        config = load_config(section.model, revision=section.revision)
        return {"model": section.model, "revision": getattr(config, "_commit_hash", None) or section.revision}
    weights = sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    return {
        "config": file_digest(folder / "config.json"),
        "weights": {path.name: _edge_digest(path) for path in weights},
    }


def _edge_digest(path: Path, edge: int = 1 << 20) -> str:
    """Digest of a large file's length, beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(edge)
        file.seek(max(size - edge, 0))
        return digest(size, head, file.read(edge))


@functools.cache
def _file_digest_of(path: Path, size: int, modified: int) -> str:
    """`file_digest`, once as long as the file does not change: every stage asks, and a corpus may be large."""
    return file_digest(path)


def dataset_identity(section: DatasetSection) -> Any:
    path = Path(section.source).expanduser()
    values = asdict(section)
    if path.is_file():
        stat = path.stat()
        return {**values, "source": _file_digest_of(path, stat.st_size, stat.st_mtime_ns)}
    looks_local = section.source.startswith((".", os.sep, "~")) or Path(section.source).suffix in (".jsonl", ".txt")
    if looks_local and not path.exists():
        raise DataError(f"The dataset {section.source} does not exist. Expected a file, a saved dataset or a Hub id.")
    return values


def _what_is_trained(recipe: Recipe) -> Any:
    """The arguments of distillation, however the rows of a step are split over processes and batches."""
    settings = {**DISTILL_DEFAULTS, **recipe.distill}
    rows = settings.pop("per_device_train_batch_size", 8) * settings.pop("gradient_accumulation_steps", 1)
    return {**settings, "rows_in_a_step": rows * num_processes(recipe)}


def num_processes(recipe: Recipe) -> int:
    """In how many processes models are trained."""
    section = recipe.distributed
    return 1 if section is None else require_launchable(section.config, section.num_processes)


def _scoring_settings(recipe: Recipe) -> dict[str, Any]:
    """What scores depend on beside the model that is scored."""
    # What is to be cut matters to what is measured.
    cut = recipe.scores.keys() & {"depth_metric", "iterations"}
    return {
        "scores": recipe.scores,
        **({"prune": recipe.pruner_config.to_dict()} if cut else {}),
        "data": dataset_identity(recipe.data.calibration or recipe.data.train),
    }


def _evaluation_settings(recipe: Recipe) -> Any:
    return {"evaluate": asdict(recipe.evaluate), "data": dataset_identity(recipe.data.eval)}


STAGES: tuple[Stage, ...] = (
    Stage(
        "score",
        "score heads, neurons, channels and layers of the teacher on calibration text",
        (),
        lambda recipe: {"teacher": model_identity(recipe.teacher), **_scoring_settings(recipe)},
        (SCORES_NAME,),
        _score,
    ),
    Stage(
        "search",
        "compare shapes: prune, distil a little, keep the better half",
        ("score",),
        lambda recipe: {
            "search": search_arguments(recipe),
            "prune": recipe.pruner_config.to_dict(),
            "train": dataset_identity(recipe.data.train),
            "eval": dataset_identity(recipe.data.eval),
        },
        (SEARCH_NAME,),
        _search,
        lambda recipe: recipe.search is not None,
    ),
    Stage(
        "plan",
        "decide what stays",
        ("score", "search"),
        lambda recipe: {"prune": recipe.pruner_config.to_dict()},
        (PRUNER_CONFIG_NAME, PLAN_NAME, INDICES_NAME),
        _plan,
    ),
    Stage(
        "prune",
        "cut the student out of the teacher",
        ("plan",),
        lambda recipe: {"verify": True} if recipe.verify else {},
        (PRUNED_DIR,),
        _prune,
    ),
    Stage(
        "correct",
        "let the teacher learn the corpus",
        (),
        lambda recipe: {
            "teacher": model_identity(recipe.teacher),
            "teacher_correction": None if recipe.teacher_correction is None else asdict(recipe.teacher_correction),
            "train": dataset_identity(recipe.data.train),
        },
        (CORRECTED_DIR,),
        _correct,
        lambda recipe: recipe.teacher_correction is not None,
    ),
    Stage(
        "cache",
        "write down what the teacher says of the corpora",
        ("correct",),
        _cache_settings,
        (CACHE_DIR,),
        _cache,
        lambda recipe: recipe.teacher_cache is not None,
    ),
    Stage(
        "distill",
        "train the student to predict like the teacher",
        ("prune", "correct", "cache"),
        lambda recipe: {
            "distill": _what_is_trained(recipe),
            "lora": recipe.lora,
            "train": dataset_identity(recipe.data.train),
            "eval": dataset_identity(recipe.data.eval),
        },
        ("config.json", "distillation.json"),
        _distill,
    ),
    Stage(
        "controls",
        "train the controls in the same way",
        ("distill",),
        lambda recipe: {"controls": recipe.controls},
        (CONTROLS_DIR,),
        _controls,
        lambda recipe: bool(recipe.controls),
    ),
    Stage(
        "evaluate",
        "measure teacher, pruned and distilled student side by side",
        ("distill", "controls"),
        _evaluation_settings,
        ("evaluation.json",),
        _evaluate,
    ),
    Stage("card", "draw the plots and write the model card", ("evaluate",), lambda recipe: {}, ("README.md",), _card),
    Stage(
        "publish",
        "upload everything to the Hub in one commit",
        ("card",),
        lambda recipe: None if recipe.publish is None else asdict(recipe.publish),
        (),
        _publish,
        lambda recipe: recipe.publish is not None,
    ),
)
#: Those that every round has, and those that come once, before the first distillation; the others come at the end.
ROUND_STAGES, TEACHER_STAGES = ("score", "plan", "prune", "distill"), ("correct", "cache")


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe in their order; those of rounds before the last are called `1/score`, `1/plan`, …"""
    last = len(recipe.rounds)
    if not last:
        return STAGES
    stages = []
    for number, stage in itertools.product(range(1, last + 1), STAGES):
        if stage.name in ROUND_STAGES:
            stages.append(_in_round(stage, number, last))
        elif number == (1 if stage.name in TEACHER_STAGES else last):
            stages.append(stage)
    return tuple(stages)


def _in_round(stage: Stage, number: int, last: int) -> Stage:
    """A stage as a part of one of several rounds; the last one's files are at the root of the run folder."""

    def prefix(which: int) -> str:
        return f"{which}/" if which < last else ""

    def settings(recipe: Recipe) -> Any:
        own = recipe.in_round(number)
        if number == 1:
            return stage.settings(own)
        if stage.name == "score":  # what is scored is made by the stages before
            return _scoring_settings(own)
        teacher = recipe.rounds[number - 1].teacher
        changed = {"teacher": teacher} if stage.name == "distill" and teacher != "original" else {}
        return {**stage.settings(own), **changed}

    before = (f"{prefix(number - 1)}distill",) if stage.name == "score" and number > 1 else ()
    folder = f"{ROUNDS_DIR}/{number}/" if number < last else ""
    return replace(
        stage,
        name=prefix(number) + stage.name,
        inputs=(*before, *(prefix(number) + name if name in ROUND_STAGES else name for name in stage.inputs)),
        settings=settings,
        outputs=tuple(folder + output for output in stage.outputs),
        run=lambda run: stage.run(run.in_round(number)),
    )
