"""A recipe at work: stages that leave artefacts, skip what is done for the same inputs, and resume.

Every stage calls public functions of the package. A run folder is laid out like the Hub repository it becomes (the
student at its root), plus working folders that are never uploaded.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import (
    digest,
    file_digest,
    is_storage_error,
    read_json,
    replacing_folder,
    require_writable,
    versions,
    write_json,
    write_text,
)
from .data import load_text_dataset
from .errors import DataError, MinitronError, MismatchError, OutputError
from .families import spec_for
from .importance import SCORES_NAME, ImportanceScores, estimate_importance
from .models import compute_dtype, count_parameters, empty_model, load_config, load_model, load_tokenizer
from .planning import INDICES_NAME, PLAN_NAME, PruningPlan, make_plan
from .recipe import DISTILL_DEFAULTS, DatasetSection, Recipe, TeacherSection
from .sizes import PRUNER_CONFIG_NAME, resolve_sizes, student_config
from .surgery import apply_plan

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RECIPE_NAME = "recipe.yaml"
#: Working folders of a run, beside the published files.
STAGES_DIR, PRUNED_DIR, CONTROLS_DIR, UNFINISHED_DIR = "stages", "pruned", "controls", "unfinished.tmp"


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
    """A recipe at work: models and datasets loaded once, when first needed."""

    recipe: Recipe
    show_progress: bool = True
    _cache: dict[str, Any] = field(default_factory=dict)

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

    @property
    def teacher_config(self) -> PretrainedConfig:
        """The teacher's config, as in its checkpoint."""
        section = self.recipe.teacher
        return self._cached("config", lambda: load_config(section.model, revision=section.revision))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""
        section = self.recipe.teacher
        return self._cached("tokenizer", lambda: load_tokenizer(section.model, revision=section.revision))

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher, on the device and in the dtype that compute best here."""
        section = self.recipe.teacher
        return self._cached("teacher", lambda: self.load(section.model, revision=section.revision))

    def load(self, path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """Load a model for computing."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.recipe.teacher.dtype
        return load_model(
            path, dtype=compute_dtype(device) if dtype == "auto" else getattr(torch, dtype), device=device, **kwargs
        )

    def dataset(self, which: str) -> Dataset:
        """One of the recipe's corpora, reduced to its text (or whatever TRL understands)."""
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

    @property
    def plan(self) -> PruningPlan:
        """The plan that the stage `plan` left."""
        return PruningPlan.from_pretrained(self.folder)


def _score(run: Run) -> None:
    section = run.dataset_section("calibration")
    texts = run.dataset("calibration")
    texts = [row[section.text_field] for row in texts] if section.text_field in texts.column_names else texts
    scores = estimate_importance(
        run.teacher, texts, processing_class=run.tokenizer, show_progress=run.show_progress, **run.recipe.scores
    )
    scores.save_pretrained(run.folder)


def _plan(run: Run) -> None:
    request = run.recipe.pruner_config
    scores = ImportanceScores.from_pretrained(run.folder)
    request.save_pretrained(run.folder)
    make_plan(run.teacher_config, request, scores).save_pretrained(run.folder)


def _prune(run: Run) -> None:
    student = apply_plan(run.teacher, run.plan)
    _save_student(student, run.tokenizer, run.folder / PRUNED_DIR, run.teacher_config)


def _distill(run: Run) -> None:
    student = run.load(run.folder / PRUNED_DIR)
    _train(run, student, run.folder)


def _controls(run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    seed = int(run.recipe.distill.get("seed", 42))
    for name in run.recipe.controls:
        folder = run.folder / CONTROLS_DIR / name
        if (folder / "config.json").is_file():
            continue  # finished before an interruption
        if name == "random_pruning":
            scores = estimate_importance(run.teacher, metric="random", seed=seed)
            student = apply_plan(run.teacher, make_plan(run.teacher, run.recipe.pruner_config, scores))
            _save_student(student, run.tokenizer, folder / PRUNED_DIR, run.teacher_config)
        elif name == "random_init":
            set_seed(seed)
            config = run.plan.build_student_config()
            student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(run.teacher.device)
        else:
            student = run.load(run.folder / PRUNED_DIR)
        _train(run, student, folder, **({"kd_weight": 0.0, "ce_weight": 1.0} if name == "cross_entropy" else {}))


def _evaluate(run: Run) -> None:
    from .evaluation import evaluate_models, evaluate_tasks, generate_samples

    section = run.recipe.evaluate
    models: dict[str, Any] = {
        # By path where possible, so that the size of a checkpoint is that of its files.
        "teacher": run.recipe.teacher.model if run.recipe.teacher.revision is None else run.teacher,
        "pruned": run.folder / PRUNED_DIR,
        "student": run.folder,
        **{name: run.folder / CONTROLS_DIR / name for name in run.recipe.controls},
    }
    run.forget("teacher")
    evaluate_models(
        models,
        run.dataset("eval"),
        processing_class=run.tokenizer,
        max_length=section.max_length,
        num_rows=section.num_rows,
        batch_size=section.batch_size,
        text_field=run.dataset_section("eval").text_field,
        dataset_name=run.dataset_section("eval").source,
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
    from .card import write_model_card
    from .hub import write_teacher_metadata

    write_teacher_metadata(run.folder, run.recipe.teacher.model, revision=run.recipe.teacher.revision)
    write_model_card(run.folder)


def _publish(run: Run) -> None:
    from .hub import push_student_to_hub

    section = run.recipe.publish
    assert section is not None
    push_student_to_hub(run.folder, section.repo_id, private=section.private, revision=section.revision)


def _evaluation_settings(recipe: Recipe) -> Any:
    return {"evaluate": asdict(recipe.evaluate), "data": _dataset_identity(recipe.data.eval)}


STAGES: tuple[Stage, ...] = (
    Stage(
        "score",
        "score heads, neurons, channels and layers of the teacher on calibration text",
        (),
        lambda recipe: {
            "teacher": _model_identity(recipe.teacher),
            "scores": recipe.scores,
            "data": _dataset_identity(recipe.data.calibration or recipe.data.train),
        },
        (SCORES_NAME,),
        _score,
    ),
    Stage(
        "plan",
        "decide what stays",
        ("score",),
        lambda recipe: {"prune": recipe.pruner_config.to_dict()},
        (PRUNER_CONFIG_NAME, PLAN_NAME, INDICES_NAME),
        _plan,
    ),
    Stage("prune", "cut the student out of the teacher", ("plan",), lambda recipe: {}, (PRUNED_DIR,), _prune),
    Stage(
        "distill",
        "train the student to predict like the teacher",
        ("prune",),
        lambda recipe: {
            "distill": {**DISTILL_DEFAULTS, **recipe.distill},
            "lora": recipe.lora,
            "train": _dataset_identity(recipe.data.train),
            "eval": _dataset_identity(recipe.data.eval),
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
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_digests(recipe: Recipe) -> dict[str, str]:
    """Digest of everything each stage depends on: its settings, its external inputs, and the stages before it."""
    digests: dict[str, str] = {}
    for stage in STAGES:
        if stage.wanted(recipe):
            above = [digests.get(name) for name in stage.inputs]
            digests[stage.name] = digest(stage.name, stage.settings(recipe), above)
    return digests


def run_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    redo: bool = False,
    show_progress: bool = True,
    report: Callable[[str], None] = print,
) -> Path:
    """Run the stages of a recipe, skipping those that are done for the same inputs.

    Args:
        recipe: what to do.
        until: last stage to run; None: all of them.
        redo: do stages again whose recorded inputs differ, instead of refusing.
        show_progress: show progress bars.
        report: receives one line per stage.

    Returns:
        The run folder.

    Raises:
        OutputError: if the folder holds something else, or a stage made from other inputs (without `redo`).
        MinitronError: whatever a stage refuses.
    """
    if until is not None and until not in STAGE_NAMES:
        raise DataError(f"There is no stage {until!r}. Expected one of {', '.join(STAGE_NAMES)}.")
    check_recipe(recipe)
    run = Run(recipe, show_progress=show_progress)
    digests = stage_digests(recipe)
    _claim_folder(run.folder)
    wanted = [stage for stage in STAGES if stage.name in digests]
    for stage in wanted:  # every refusal before the first computation
        if not redo:
            _require_same_inputs(run.folder, stage, recipe, digests[stage.name])
        if stage.name == until:
            break
    write_text(run.folder / RECIPE_NAME, recipe.to_yaml())
    for stage in wanted:
        record = _record(run.folder, stage.name)
        done = record is not None and record["status"] == "done" and record["digest"] == digests[stage.name]
        if done and all((run.folder / output).exists() for output in stage.outputs):
            report(f"[{stage.name}] done before, skipped")
        else:
            if record is not None and record["digest"] != digests[stage.name]:
                _clear(run.folder, stage)
            report(f"[{stage.name}] {stage.help}")
            _write_record(run.folder, stage, recipe, digests[stage.name], "running", None)
            start = time.monotonic()
            with _clear_errors():
                stage.run(run)
            _write_record(run.folder, stage, recipe, digests[stage.name], "done", time.monotonic() - start)
            gc.collect()
        if stage.name == until:
            break
    return run.folder


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Make every refusal that needs no weights and no data, in seconds; what `--dry-run` prints.

    Returns:
        Sizes and parameter counts of teacher and student.

    Raises:
        MinitronError: naming what is wrong.
    """
    run = Run(recipe)
    config = run.teacher_config
    spec = spec_for(config)
    spec.check(empty_model(config))
    request = recipe.pruner_config
    sizes, notes = resolve_sizes(spec, config, request)
    student = student_config(config, request)
    for which in ("train", "eval", "calibration"):
        _dataset_identity(run.dataset_section(which))
    tokenizer = run.tokenizer
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"The tokenizer of {recipe.teacher.model} has {len(tokenizer)} tokens, the model {config.vocab_size}. "
            "Use the tokenizer that belongs to the model."
        )
    if tokenizer.eos_token is None:
        raise DataError(
            f"The tokenizer of {recipe.teacher.model} has neither an end-of-text nor a padding token to close and pad "
            "documents with. Set tokenizer.eos_token and save it beside the model."
            if tokenizer.pad_token is None
            else f"The tokenizer of {recipe.teacher.model} has no end-of-text token to close documents with. "
            "Set tokenizer.eos_token and save it beside the model."
        )
    _check_arguments(recipe)
    require_writable(run.folder.parent if not run.folder.exists() else run.folder)
    before = spec.sizes(config)
    return {
        "model_type": spec.model_type,
        "sizes": {axis: {"teacher": before[axis], "student": sizes[axis]} for axis in before},
        "num_parameters": {"teacher": count_parameters(config), "student": count_parameters(student)},
        "num_parameters_without_embeddings": {
            "teacher": count_parameters(config, embeddings=False),
            "student": count_parameters(student, embeddings=False),
        },
        "notes": notes,
    }


# ---------------------------------------------------------------------------------------------------------- the parts


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    plan: PruningPlan | None = None,
    peft_config: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Distil into `folder`, resuming from its last checkpoint; the student appears there whole or not at all.

    Args:
        student: the pruned model; trained in float32 weights.
        teacher: what it learns from.
        folder: where checkpoints and the final student go.
        tokenizer: of both.
        settings: fields of `DistillationConfig`.
        train_dataset: corpus.
        eval_dataset: held-out corpus.
        plan: how the student was cut, saved beside it.
        peft_config: a `peft` config; the adapter is merged into the student.
        dtype: dtype of the saved student; None: float32.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from .trainer import DistillationConfig, DistillationTrainer

    folder = require_writable(folder)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(str(folder), **settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        pruning_plan=plan,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    with replacing_folder(folder / UNFINISHED_DIR) as temporary:
        trainer.save_student(temporary, dtype=dtype)
    _move_into(folder / UNFINISHED_DIR, folder)


def _train(run: Run, student: PreTrainedModel, folder: Path, **changes: Any) -> None:
    """Distil with the recipe's settings, and `changes` to them."""
    settings = {"dataset_text_field": run.recipe.data.train.text_field, **DISTILL_DEFAULTS, **run.recipe.distill}
    distill(
        student,
        run.teacher,
        folder,
        run.tokenizer,
        {**settings, **changes, "disable_tqdm": not run.show_progress},
        run.dataset("train"),
        run.dataset("eval"),
        plan=run.plan if folder == run.folder else None,
        peft_config=_lora_config(run.recipe),
        dtype=_checkpoint_dtype(run.teacher_config),
    )


def _move_into(source: Path, target: Path) -> None:
    """Move files one by one, `config.json` last: without it no loader takes the folder for a model."""
    (target / "config.json").unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    source.rmdir()


def _checkpoint_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype in which a checkpoint is stored, which its student's follows."""
    import torch

    return getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype


def _save_student(student: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, teacher: PretrainedConfig) -> None:
    with replacing_folder(folder) as temporary:
        student.to(dtype=_checkpoint_dtype(teacher) or student.dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _lora_config(recipe: Recipe) -> Any:
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
    except (TypeError, ValueError) as error:
        raise DataError(f"lora: {error}. Expected fields of peft.LoraConfig.") from error


def _check_arguments(recipe: Recipe) -> None:
    """Refuse arguments that a stage would only stumble over after the ones before it have worked for hours."""
    from .trainer import DistillationConfig

    known = {name for name in inspect.signature(estimate_importance).parameters if name not in ("model", "data")}
    if unknown := sorted(set(recipe.scores) - known):
        raise DataError(
            f"scores: {', '.join(unknown)} is unknown. Expected arguments of estimate_importance: "
            f"{', '.join(sorted(known))}."
        )
    known = {field.name for field in fields(DistillationConfig)}
    if unknown := sorted(set(recipe.distill) - known):
        raise DataError(f"distill: {', '.join(unknown)} is unknown. Expected fields of DistillationConfig.")
    try:
        DistillationConfig(str(Path(recipe.output_dir)), **{**DISTILL_DEFAULTS, **recipe.distill})
    except MinitronError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise DataError(f"distill: {error}") from error
    _lora_config(recipe)


def _model_identity(section: TeacherSection) -> Any:
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


def _dataset_identity(section: DatasetSection) -> Any:
    path = Path(section.source).expanduser()
    values = asdict(section)
    if path.is_file():
        return {**values, "source": file_digest(path)}
    looks_local = section.source.startswith((".", os.sep, "~")) or Path(section.source).suffix in (".jsonl", ".txt")
    if looks_local and not path.exists():
        raise DataError(f"The dataset {section.source} does not exist. Expected a file, a saved dataset or a Hub id.")
    return values


def _claim_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STAGES_DIR).is_dir():
        raise OutputError(
            f"The output folder {folder} already holds files that are not a run of minitron-hf. "
            "Choose another output_dir, or empty it."
        )
    require_writable(folder)
    (folder / STAGES_DIR).mkdir(exist_ok=True)


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / STAGES_DIR / f"{name}.json"
    return read_json(path) if path.is_file() else None


def _write_record(
    folder: Path, stage: Stage, recipe: Recipe, stage_digest: str, status: str, seconds: float | None
) -> None:
    write_json(
        folder / STAGES_DIR / f"{stage.name}.json",
        {
            "stage": stage.name,
            "status": status,
            "digest": stage_digest,
            "seconds": None if seconds is None else round(seconds, 2),
            "settings": stage.settings(recipe),
            "versions": versions(),
        },
    )


def _require_same_inputs(folder: Path, stage: Stage, recipe: Recipe, stage_digest: str) -> None:
    record = _record(folder, stage.name)
    if record is None or record["digest"] == stage_digest:
        return
    old, new = _flatten(record["settings"]), _flatten(stage.settings(recipe))
    changed = [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    what = "; ".join(changed[:5]) or f"an earlier stage ({', '.join(stage.inputs)})"
    raise MismatchError(
        f"The output folder {folder} holds another run: its stage '{stage.name}' was made from other inputs ({what}). "
        "Choose another output_dir, or pass --redo to do this stage and those after it again."
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _clear(folder: Path, stage: Stage) -> None:
    """Remove what an earlier run of a stage left, so that nothing stale is resumed or published."""
    stale = [folder / output for output in stage.outputs]
    if stage.name == "distill":
        stale += [*folder.glob("checkpoint-*"), *folder.glob("model*.safetensors*"), folder / UNFINISHED_DIR]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what the file system says into one clear message; leave everything else alone."""
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise OutputError(
            f"A file could not be read or written: {error}. If the disk is full, free space; the same command then "
            "resumes the run."
        ) from error
